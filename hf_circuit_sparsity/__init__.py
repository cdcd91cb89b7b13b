"""Train weight-sparse transformers with the Hugging Face `Trainer` and cut circuits out of them.

The names below are imported when they are first used, so a model costs neither `Trainer` nor
`datasets` nor PEFT. Importing this package makes its models known to the Auto classes of
transformers and its adapters to PEFT.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_lazily

if TYPE_CHECKING:
    from .bridge.bridge_config import BridgeTrainingArguments
    from .bridge.bridge_trainer import BridgeTrainer
    from .bridge.modeling_bridge import BridgedCausalLM
    from .circuits.circuit import Circuit
    from .circuits.evaluation.faithfulness import evaluate_circuit
    from .circuits.evaluation.verification import verify_circuit
    from .circuits.hub import list_circuits
    from .circuits.pruning.config import PruningConfig
    from .circuits.pruning.find import TaskNotLearnedError, find_circuit
    from .circuits.pruning.tune import search_circuit
    from .circuits.task_scores import evaluate_tasks
    from .circuits.viewer.plot import plot_circuit
    from .circuits.viewer.report import write_report
    from .example import load_example
    from .modeling.causal_lm import load_causal_lm, save_nonzeros
    from .modeling.configuration_circuitgpt import ArtifactError, CircuitGPTConfig
    from .modeling.modeling_circuitgpt import CircuitGPTForCausalLM, CircuitGPTModel, NodeSite
    from .modeling.sparse_layers import to_dense, to_sparse
    from .optim.param_groups import sparse_param_groups
    from .optim.rcd.config import RCDConfig
    from .optim.rcd.optimizer import RCDSparseOptimizer
    from .optim.rcd.partial_gradients import PartialGradients
    from .optim.sparse_init import sparse_from_config, sparsify_initialization_
    from .optim.topk_adamw import TopKAdamW
    from .optim.weight_mask import WeightMask, extract_mask
    from .tasks.binary_task import BinaryTask, TaskTooLongError
    from .tasks.corpus import build_corpus
    from .tasks.documents import load_documents
    from .tasks.encoding import TaskNotExpressibleError
    from .tasks.load import build_task_datasets, list_tasks, load_task
    from .tasks.packing import pack_dataset
    from .tasks.tokenizer import tokenizer_from_openai, train_tokenizer
    from .trainer.bigram_init import initialize_bigram_table_
    from .trainer.sparse_config import SparseTrainingArguments
    from .trainer.sparse_trainer import SparseTrainer

__version__ = "0.1.0"

# Where each public name is defined; the imports above say the same to editors and type checkers.
_MODULES = {
    "ArtifactError": "modeling.configuration_circuitgpt",
    "BinaryTask": "tasks.binary_task",
    "BridgeTrainer": "bridge.bridge_trainer",
    "BridgeTrainingArguments": "bridge.bridge_config",
    "BridgedCausalLM": "bridge.modeling_bridge",
    "Circuit": "circuits.circuit",
    "CircuitGPTConfig": "modeling.configuration_circuitgpt",
    "CircuitGPTForCausalLM": "modeling.modeling_circuitgpt",
    "CircuitGPTModel": "modeling.modeling_circuitgpt",
    "NodeSite": "modeling.modeling_circuitgpt",
    "PartialGradients": "optim.rcd.partial_gradients",
    "PruningConfig": "circuits.pruning.config",
    "RCDConfig": "optim.rcd.config",
    "RCDSparseOptimizer": "optim.rcd.optimizer",
    "SparseTrainer": "trainer.sparse_trainer",
    "SparseTrainingArguments": "trainer.sparse_config",
    "TaskNotExpressibleError": "tasks.encoding",
    "TaskNotLearnedError": "circuits.pruning.find",
    "TaskTooLongError": "tasks.binary_task",
    "TopKAdamW": "optim.topk_adamw",
    "WeightMask": "optim.weight_mask",
    "build_corpus": "tasks.corpus",
    "build_task_datasets": "tasks.load",
    "evaluate_circuit": "circuits.evaluation.faithfulness",
    "evaluate_tasks": "circuits.task_scores",
    "extract_mask": "optim.weight_mask",
    "find_circuit": "circuits.pruning.find",
    "initialize_bigram_table_": "trainer.bigram_init",
    "list_circuits": "circuits.hub",
    "list_tasks": "tasks.load",
    "load_causal_lm": "modeling.causal_lm",
    "load_documents": "tasks.documents",
    "load_example": "example",
    "load_task": "tasks.load",
    "pack_dataset": "tasks.packing",
    "plot_circuit": "circuits.viewer.plot",
    "save_nonzeros": "modeling.causal_lm",
    "search_circuit": "circuits.pruning.tune",
    "sparse_from_config": "optim.sparse_init",
    "sparse_param_groups": "optim.param_groups",
    "sparsify_initialization_": "optim.sparse_init",
    "to_dense": "modeling.sparse_layers",
    "to_sparse": "modeling.sparse_layers",
    "tokenizer_from_openai": "tasks.tokenizer",
    "train_tokenizer": "tasks.tokenizer",
    "verify_circuit": "circuits.evaluation.verification",
    "write_report": "circuits.viewer.report",
}

__all__ = sorted(_MODULES)

register_lazily()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
