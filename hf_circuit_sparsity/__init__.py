"""Train weight-sparse transformers with the Hugging Face `Trainer` and cut circuits out of them.

Importing this package registers CircuitGPT with transformers' Auto classes.
"""

from .circuits import Circuit, PruningConfig, TaskNotLearnedError, find_circuit
from .modeling import CircuitGPTConfig, CircuitGPTForCausalLM, CircuitGPTModel, NodeSite
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
    SparseTrainer,
    SparseTrainingArguments,
    TopKAdamW,
    sparse_param_groups,
)

__version__ = "0.1.0"

__all__ = [
    "BinaryTask",
    "Circuit",
    "CircuitGPTConfig",
    "CircuitGPTForCausalLM",
    "CircuitGPTModel",
    "NodeSite",
    "PruningConfig",
    "SparseTrainer",
    "SparseTrainingArguments",
    "TaskNotLearnedError",
    "TopKAdamW",
    "build_corpus",
    "build_task_dataset",
    "find_circuit",
    "list_tasks",
    "load_task",
    "pack",
    "sparse_param_groups",
    "tokenizer_from_openai",
    "train_tokenizer",
]
