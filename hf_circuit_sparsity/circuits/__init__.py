"""Cut circuits out of a model, check them and look at them."""

from ..modeling.fingerprint import model_fingerprint
from .ablation import mean_ablated, mean_activations
from .checks import Check, Verification
from .circuit import Circuit
from .circuit_hub import CircuitOnHub, list_circuits
from .edges import Edge
from .faithfulness import evaluate_circuit
from .pruning import TaskNotLearnedError, find_circuit, find_circuits, find_frontier
from .pruning_config import PruningConfig
from .search import search_circuit
from .steering import SteeringCandidate, SteeringSweep, steering_candidates, steering_sweep
from .task_loss import Calibration, binary_accuracy, binary_loss
from .task_scores import TaskScore, evaluate_tasks
from .viewer import ReportConfig

__all__ = [
    "Calibration",
    "Check",
    "Circuit",
    "CircuitOnHub",
    "Edge",
    "PruningConfig",
    "ReportConfig",
    "SteeringCandidate",
    "SteeringSweep",
    "TaskNotLearnedError",
    "TaskScore",
    "Verification",
    "binary_accuracy",
    "binary_loss",
    "evaluate_circuit",
    "evaluate_tasks",
    "find_circuit",
    "find_circuits",
    "find_frontier",
    "list_circuits",
    "mean_ablated",
    "mean_activations",
    "model_fingerprint",
    "search_circuit",
    "steering_candidates",
    "steering_sweep",
]
