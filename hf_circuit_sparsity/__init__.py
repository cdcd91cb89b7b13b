"""Train weight-sparse transformers with the Hugging Face `Trainer` and cut circuits out of them.

Importing this package registers CircuitGPT with transformers' Auto classes.
"""

from contextlib import suppress

from . import (
    hub_cards,  # noqa: F401  fills the slot of what is known about the Hub
    kernels,  # noqa: F401  fills the slot that `modeling` asks for faster loops
)
from .bridge.bridge_config import BridgeTrainingArguments
from .bridge.bridge_trainer import BridgeTrainer
from .bridge.modeling_bridge import BridgedCausalLM
from .circuits.circuit import Circuit
from .circuits.hub import list_circuits
from .circuits.pruning.config import PruningConfig
from .circuits.pruning.find import TaskNotLearnedError, find_circuit
from .circuits.pruning.tune import search_circuit
from .circuits.task_scores import evaluate_tasks
from .modeling.configuration_circuitgpt import CircuitGPTConfig
from .modeling.modeling_circuitgpt import CircuitGPTForCausalLM, CircuitGPTModel, NodeSite
from .optim.param_groups import sparse_param_groups
from .optim.rcd.optimizer import RCDSparseOptimizer
from .optim.rcd.partial_gradients import PartialGradients
from .optim.sparse_init import sparsify_initialization_
from .optim.topk_adamw import TopKAdamW
from .optim.weight_mask import extract_mask
from .tasks.binary_task import BinaryTask
from .tasks.corpus import build_corpus
from .tasks.load import build_task_dataset, list_tasks, load_task
from .tasks.packing import pack
from .tasks.tokenizer import tokenizer_from_openai, train_tokenizer
from .trainer.sparse_config import SparseTrainingArguments
from .trainer.sparse_trainer import SparseTrainer

with suppress(ImportError):  # PEFT is not installed, or too old
    from . import adapters  # noqa: F401  makes our methods known to PEFT

__version__ = "0.1.0"

__all__ = [
    "BinaryTask",
    "BridgeTrainer",
    "BridgeTrainingArguments",
    "BridgedCausalLM",
    "Circuit",
    "CircuitGPTConfig",
    "CircuitGPTForCausalLM",
    "CircuitGPTModel",
    "NodeSite",
    "PartialGradients",
    "PruningConfig",
    "RCDSparseOptimizer",
    "SparseTrainer",
    "SparseTrainingArguments",
    "TaskNotLearnedError",
    "TopKAdamW",
    "build_corpus",
    "build_task_dataset",
    "evaluate_tasks",
    "extract_mask",
    "find_circuit",
    "list_circuits",
    "list_tasks",
    "load_task",
    "pack",
    "search_circuit",
    "sparse_param_groups",
    "sparsify_initialization_",
    "tokenizer_from_openai",
    "train_tokenizer",
]
