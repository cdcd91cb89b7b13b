"""Cut circuits out of a model, check them and look at them."""

from ..modeling.fingerprint import model_fingerprint
from .ablation import mean_ablated, mean_activations
from .circuit import Circuit
from .edges import Edge
from .evaluation.checks import Check, Verification
from .evaluation.faithfulness import evaluate_circuit
from .evaluation.verification import verify_circuit
from .hub import CircuitOnHub, list_circuits
from .pruning.config import PruningConfig
from .pruning.exhaust import Ways, exhaust_circuits
from .pruning.find import TaskNotLearnedError, find_circuit, find_circuits
from .pruning.tune import search_circuit
from .task_scores import Calibration, TaskScore, binary_accuracy, binary_loss, evaluate_tasks
from .viewer.plot import plot_circuit
from .viewer.report import write_report
from .viewer.report_data import ReportConfig

__all__ = [
    "Calibration",
    "Check",
    "Circuit",
    "CircuitOnHub",
    "Edge",
    "PruningConfig",
    "ReportConfig",
    "TaskNotLearnedError",
    "TaskScore",
    "Verification",
    "Ways",
    "binary_accuracy",
    "binary_loss",
    "evaluate_circuit",
    "evaluate_tasks",
    "exhaust_circuits",
    "find_circuit",
    "find_circuits",
    "list_circuits",
    "mean_ablated",
    "mean_activations",
    "model_fingerprint",
    "plot_circuit",
    "search_circuit",
    "verify_circuit",
    "write_report",
]
