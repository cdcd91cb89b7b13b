"""What a run of training should leave, and what it logged."""

import torch

from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.projection import nonzero_budget


def expected_nonzeros(model, density, **kwargs):
    """Parameter name → what every sparse parameter must hold at this density."""
    expected = {}
    for group in sparse_param_groups(model, **kwargs):
        for name, p in group["params"]:
            if group["sparse"]:
                rows = p.shape[group["row_dim"]] * group["min_nonzeros"]
                budget = p.numel() if density == 1 else nonzero_budget(p.numel(), density)
                expected[name] = max(budget, rows)
    return expected


def nonzeros(model, names):
    parameters = dict(model.named_parameters())
    return {name: int(torch.count_nonzero(parameters[name])) for name in names}


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]
