"""Train weight-sparse transformers with the Hugging Face `Trainer` and cut circuits out of them.

Importing this package registers CircuitGPT with transformers' Auto classes.
"""

from . import (
    adapters,  # noqa: F401  registers our PEFT methods
    hub_cards,  # noqa: F401  fills the slot of what is known about the Hub
    kernels,  # noqa: F401  fills the slot that `modeling` asks for faster loops
)
from .circuits import (
    Circuit,
    PruningConfig,
    TaskNotLearnedError,
    evaluate_tasks,
    find_circuit,
    list_circuits,
    search_circuit,
)
from .modeling import (
    BridgedCausalLM,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    CircuitGPTModel,
    NodeSite,
)
from .tasks import (
    BinaryTask,
    build_corpus,
    build_task_dataset,
    list_tasks,
    load_task,
    pack,
    tokenizer_from_openai,
    train_tokenizer,
)
from .trainer import (
    BridgeTrainer,
    BridgeTrainingArguments,
    PartialGradients,
    RCDSparseOptimizer,
    SparseTrainer,
    SparseTrainingArguments,
    TopKAdamW,
    extract_mask,
    sparse_param_groups,
    sparsify_initialization_,
)

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
