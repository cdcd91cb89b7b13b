"""Optimizers that keep weights sparse; usable without any Trainer."""

from .param_groups import sparse_param_groups
from .projection import nonzero_budget, project_topk_, project_topk_reference_
from .rcd.config import RCDConfig
from .rcd.distributed import RCDProcessGroup
from .rcd.forward_mode import add_forward_gradients, directional_derivative
from .rcd.optimizer import RCDSparseOptimizer
from .rcd.partial_gradients import PartialGradients
from .saved_activations import compact_activations
from .schedules import geometric_density, linear_density, sharkfin
from .sparse_compute import on_nonzeros
from .sparse_init import sparse_from_config, sparsify_initialization_
from .topk_adamw import TopKAdamW
from .weight_mask import WeightMask, extract_mask

__all__ = [
    "PartialGradients",
    "RCDConfig",
    "RCDProcessGroup",
    "RCDSparseOptimizer",
    "TopKAdamW",
    "WeightMask",
    "add_forward_gradients",
    "compact_activations",
    "directional_derivative",
    "extract_mask",
    "geometric_density",
    "linear_density",
    "nonzero_budget",
    "on_nonzeros",
    "project_topk_",
    "project_topk_reference_",
    "sharkfin",
    "sparse_from_config",
    "sparse_param_groups",
    "sparsify_initialization_",
]
