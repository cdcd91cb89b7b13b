"""Training of weight-sparse models: the optimizer, and the Hugging Face Trainer around it."""

from .bigram_start import initialize_bigram_table_
from .bridge_config import BridgeTrainingArguments
from .bridge_trainer import BridgeTrainer
from .callbacks import InterruptCallback
from .curves import plot_training_curves
from .forward_gradients import add_forward_gradients, directional_derivative
from .mask_graph import MaskGraph, extract_mask
from .nonzero_linear import on_nonzeros
from .param_groups import sparse_param_groups
from .partial_gradients import PartialGradients
from .projection import nonzero_budget, project_topk_, project_topk_reference_
from .rcd import RCDSparseOptimizer
from .rcd_workers import Workers
from .ridge_bridges import ridge_bridges_, standardize_bridges_
from .schedules import DensitySchedule, sharkfin
from .sparse_config import SparseTrainingArguments
from .sparse_start import sparse_from_config, sparsify_initialization_
from .sparse_trainer import SparseTrainer
from .sparsity_monitor import SparsityMonitor
from .topk import TopKAdamW

__all__ = [
    "BridgeTrainer",
    "BridgeTrainingArguments",
    "DensitySchedule",
    "InterruptCallback",
    "MaskGraph",
    "PartialGradients",
    "RCDSparseOptimizer",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsityMonitor",
    "TopKAdamW",
    "Workers",
    "add_forward_gradients",
    "directional_derivative",
    "extract_mask",
    "initialize_bigram_table_",
    "nonzero_budget",
    "on_nonzeros",
    "plot_training_curves",
    "project_topk_",
    "project_topk_reference_",
    "ridge_bridges_",
    "sharkfin",
    "sparse_from_config",
    "sparse_param_groups",
    "sparsify_initialization_",
    "standardize_bridges_",
]
