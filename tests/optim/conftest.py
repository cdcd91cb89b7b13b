"""What tests of the optimizers share: parameters with gradients, and a watch over memory."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_circuit_sparsity import PartialGradients, RCDSparseOptimizer, sparse_param_groups


def random_parameters(dtype=torch.float32):
    """Two matrices, a tensor of three dimensions, and two vectors."""
    g = torch.Generator().manual_seed(0)
    shapes = ((40, 30), (20, 40), (20, 4, 5), (25,), (6,))
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def groups_of(params):
    """The second parameter is stored inputs × outputs; the last is dense; the others are sparse."""
    return [
        {"params": [params[0], *params[2:-1]]},
        {"params": [params[1]], "row_dim": 1, "min_nonzeros": 2},
        {"params": [params[-1]], "sparse": False, "weight_decay": 0.0},
    ]


def set_gradients(params, step):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def train(model, batches, process_group=None, **settings):
    """Random coordinate descent with partial gradients: losses, and the optimizer."""
    groups = sparse_param_groups(model)
    optimizer = RCDSparseOptimizer(groups, process_group=process_group, **settings)
    losses = []
    with PartialGradients(model, optimizer):
        for batch in batches:
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, optimizer


class Largest(TorchDispatchMode):
    """The size of the largest tensor made, in entries and in bytes.

    Args:
        ignored: tensors whose storage does not count.
    """

    def __init__(self, *ignored):
        super().__init__()
        self.entries = self.bytes = 0
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.is_meta:
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.ignored:
                self.bytes = max(self.bytes, storage.nbytes())
                self.entries = max(self.entries, storage.nbytes() // x.element_size())
        return out
