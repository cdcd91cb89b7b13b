"""The plain implementation: what one writes first, and what the others are measured against.

Dense matrices, AbsTopK by `torch.topk` and scatter, attention written out with the sink as one more
column of the softmax, and a projection by `torch.topk` over the flattened matrix.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_circuit_sparsity.modeling import modeling_circuitgpt
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM


def abs_topk_plain(x: torch.Tensor, k: int) -> torch.Tensor:
    """AbsTopK by topk and scatter."""
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


@torch.no_grad()
def project_plain_(weight: torch.Tensor, k: int, min_nonzeros: int = 0) -> None:
    """The projection by topk over the flattened matrix, and over rows for the row minimum."""
    magnitude = weight.abs()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.view(-1)[magnitude.view(-1).topk(k, sorted=False).indices] = True
    if min_nonzeros:
        keep.scatter_(1, magnitude.topk(min_nonzeros, dim=1).indices, True)
    weight.masked_fill_(~keep, 0.0)


@contextmanager
def plainly(model: CircuitGPTForCausalLM) -> Iterator[None]:
    """Within it, `model` runs as the plain implementation."""
    fast = modeling_circuitgpt.abs_topk
    attention = model.config._attn_implementation
    modeling_circuitgpt.abs_topk = abs_topk_plain
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        modeling_circuitgpt.abs_topk = fast
        model.set_attn_implementation(attention)


def sparse_matrices(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The weights of linear layers and embeddings, which are made sparse."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            yield f"{name}.weight", module.weight


@torch.no_grad()
def random_sparse_model(
    config: CircuitGPTConfig,
    density: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CircuitGPTForCausalLM:
    """A model with random weights of which the share `density` is nonzero, at even odds."""
    with torch.device("meta"):
        model = CircuitGPTForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    matrices = dict(sparse_matrices(model))
    for name, tensor in model.state_dict().items():
        if name in matrices:
            width = tensor.shape[1]
            std = max(1.0, density * width) ** -0.5  # so that activations keep their size
            if density < 1:
                count = max(1, round(density * tensor.numel()))
                # Of places drawn twice, which value stays would depend on the threads.
                place = torch.randint(tensor.numel(), (count,), generator=generator).unique()
                values = std * torch.randn(len(place), generator=generator)
                tensor.zero_().view(-1)[place] = values
            else:
                tensor.normal_(std=std, generator=generator)
        elif ".ln_" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=0.1, generator=generator)
    return model.to(device=device, dtype=dtype)
