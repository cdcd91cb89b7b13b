"""Training of weight-sparse models: the optimizer, and the Hugging Face Trainer around it."""

from .callbacks import InterruptCallback
from .nonzero_linear import on_nonzeros
from .param_groups import sparse_param_groups
from .projection import nonzero_budget, project_topk_, project_topk_reference_
from .schedules import DensitySchedule, sharkfin
from .sparse_config import SparseTrainingArguments
from .sparse_trainer import SparseTrainer
from .sparsity_monitor import SparsityMonitor
from .topk import TopKAdamW

__all__ = [
    "DensitySchedule",
    "InterruptCallback",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsityMonitor",
    "TopKAdamW",
    "nonzero_budget",
    "on_nonzeros",
    "project_topk_",
    "project_topk_reference_",
    "sharkfin",
    "sparse_param_groups",
]
