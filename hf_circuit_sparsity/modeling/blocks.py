"""The blocks of a CircuitGPT where nobody looks on, by kernels that do all of a block.

What a block computes on one token, as text is generated, takes less time than the calls of its
modules do; on many, writing and reading what every module gives takes more than computing it. So
without hooks and gradients, where all weights are held by their nonzeros, the modules are not
called one by one; see `kernels/blocks.py`. They are the plain path beside it. This file stays
behind when the model's code travels.
"""

import ctypes
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .functional import compiled_kernels
from .modeling_circuitgpt import (
    AbsTopK,
    AttentionSink,
    CircuitGPTAttention,
    CircuitGPTBlock,
    CircuitGPTMLP,
    CircuitGPTModel,
    NodeSite,
)
from .sparse_layers import SparseLinear

_kernels = importlib.import_module("..kernels.blocks", __package__)
_HEAD_WIDTHS = importlib.import_module("..kernels.attention", __package__).ATTENTION_WIDTHS

# Exactly these: what is derived from them, or put in their place, may compute something else.
_PLAIN = frozenset({
    CircuitGPTBlock, CircuitGPTAttention, CircuitGPTMLP, AttentionSink, NodeSite, AbsTopK,
    SparseLinear, nn.RMSNorm, nn.Dropout, nn.GELU, nn.ReLU, nn.Identity,
})  # fmt: skip
# What others may have hung on a module, and what is called in place of its forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INSTEAD = ("forward", "_call_impl")
_EPS = torch.finfo(torch.float32).eps  # of the norms


def run_blocks(
    model: CircuitGPTModel,
    x: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """The residual stream after all blocks; None where they are to be called one by one.

    Args:
        model: in evaluation, with `to_sparse()`.
        x: `(B, T, D)`, the stream before them.
        positions: `(B or 1, T, d_pos_emb)`, where positions are concatenated.
        mask: `(B, 1, 1, past + 1)`, True for tokens; None where all before a token are.
        cache: to which the new keys and values are added: of at least one token before where T is
            1, else an empty one or none.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if x.shape[-1] != model.config.d_model:  # the blocks say so
        return None
    kernels = compiled_kernels(x) if positions is None else compiled_kernels(x, positions)
    fits = _one_more if x.shape[1] == 1 else _from_the_first
    if kernels is None or not fits(cache, model, x, mask) or not _unwatched(model.h):
        return None
    width = 0 if positions is None else positions.shape[-1]
    described = _described(model) if width == (model.config.d_pos_emb or 0) else None
    if described is None:
        return None
    if positions is not None:
        positions = positions.expand(*x.shape[:2], -1).flatten(0, 1).contiguous()
    if x.shape[1] == 1:
        return _decoded(kernels, model, described, x, positions, mask, cache)
    sinks = [_sink(block) for block in model.h]
    keep = None if cache is None else cache.update
    return kernels.all_tokens(described, _shape(model), sinks, x, positions, keep)


def _decoded(
    kernels: Any, model: CircuitGPTModel, described: "ctypes.Array[Any]", x: Tensor,
    positions: Tensor | None, mask: Tensor | None, cache: DynamicCache,
) -> Tensor:  # fmt: skip
    blocks = type(described).from_buffer_copy(described)  # other threads have caches of their own
    past = cache.layers[0].keys.shape[2]
    rooms = [_room_of(layer) for layer in cache.layers]
    if any(room.size != rooms[0].size for room in rooms):
        rooms = [_Room(layer) for layer in cache.layers]
    for block, room in zip(blocks, rooms, strict=True):
        block.keys, block.values = room.keys.data_ptr(), room.values.data_ptr()
    seen = None if mask is None else mask.expand(len(x), 1, 1, -1).contiguous()
    out = kernels.decode(blocks, _shape(model), x[:, 0], positions, seen, past, rooms[0].size)
    for layer, room in zip(cache.layers, rooms, strict=True):
        room.used = past + 1
        room.show(layer)
    return out[:, None]


class _Room:
    """Keys and values of a cache's layer, `(B, H, size, K)`, of which `used` are filled.

    The layer's tensors are views of what is filled, so that nothing is copied for a token more.
    Only who sees all that is filled writes behind it: another cache with the same tensors, or this
    one cut shorter, gets memory of its own.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self.used = layer.keys.shape[2]
        self.size = self.used + max(64, self.used // 2)
        self.keys, self.values = self._grown(layer.keys), self._grown(layer.values)
        layer._room = self

    def _grown(self, filled: Tensor) -> Tensor:
        grown = torch.empty(*filled.shape[:2], self.size, filled.shape[3])
        grown[:, :, : self.used] = filled
        return grown

    def show(self, layer: DynamicLayer) -> None:
        """Let the layer's tensors be what is filled."""
        layer.keys, layer.values = self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def continues(self, layer: DynamicLayer) -> bool:
        """Whether the layer's tensors are all that is filled, and one more token has room."""
        return self.used < self.size and all(
            seen.data_ptr() == held.data_ptr()
            and seen.shape == (*held.shape[:2], self.used, held.shape[3])
            and seen.stride() == held.stride()
            for seen, held in ((layer.keys, self.keys), (layer.values, self.values))
        )


def _room_of(layer: DynamicLayer) -> _Room:
    room = layer.__dict__.get("_room")
    return room if room is not None and room.continues(layer) else _Room(layer)


def _from_the_first(
    cache: Cache | None, model: CircuitGPTModel, x: Tensor, mask: Tensor | None
) -> bool:
    """Whether these are all tokens, each of which sees those before it."""
    config = model.config
    if mask is not None or config._attn_implementation != "sdpa" or not x.numel():
        return False
    if config.d_head not in _HEAD_WIDTHS:
        return False
    return cache is None or (_is_plain(cache, model) and not cache.get_seq_length())


def _one_more(cache: Cache | None, model: CircuitGPTModel, x: Tensor, mask: Tensor | None) -> bool:
    """Whether the cache is of the plain kind, and the mask says nothing but what is padding."""
    config = model.config
    if cache is None or not _is_plain(cache, model):
        return False
    if config._attn_implementation not in ("sdpa", "eager") or config.d_head not in _HEAD_WIDTHS:
        return False
    if any(not layer.get_seq_length() for layer in cache.layers):
        return False
    past = cache.layers[0].keys.shape[2]
    shape = (len(x), config.n_head, past, config.d_head)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if any(tensor.shape != shape for tensor in tensors) or not compiled_kernels(*tensors):
        return False
    if mask is None:
        return True
    fits = mask.dtype == torch.bool and mask.shape[1:] == (1, 1, past + 1)
    return fits and bool(mask[..., -1].all())  # a token sees itself at least


def _is_plain(cache: Cache, model: CircuitGPTModel) -> bool:
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != len(model.h):
        return False
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _unwatched(blocks: nn.ModuleList) -> bool:
    """Whether calling the modules would do nothing but compute what they were made for."""
    if nn.modules.module._has_any_global_hook():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    for module in _modules(blocks):
        state = module.__dict__
        if module.training or type(module) not in _PLAIN or state.get("_compiled_call_impl"):
            return False
        if any(state[hooks] for hooks in _HOOKS) or any(name in state for name in _INSTEAD):
            return False
    return True


def _modules(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """All modules in the list; `modules()` takes several times as long."""
    waiting = list(blocks._modules.values())
    while waiting:
        module = waiting.pop()
        yield module
        waiting.extend(child for child in module._modules.values() if child is not None)


def _described(model: CircuitGPTModel) -> "ctypes.Array[Any] | None":
    """The blocks as the kernel wants them, made anew where a tensor or a k is another than before;
    None if the kernel cannot take them."""
    if not all(_as_configured(block, i, model.config) for i, block in enumerate(model.h)):
        return None
    ks = [site.k for block in model.h for site in _sites(block)]
    tensors = [tensor for block in model.h for tensor in _tensors(block) if tensor is not None]
    patterns = [tensor for tensor in tensors if tensor.dtype == torch.int32]
    if 0 in ks or not compiled_kernels(*(t for t in tensors if t.dtype != torch.int32)):
        return None
    # Tensors of inference mode do not say whether they were changed.
    if any(not t.is_contiguous() for t in tensors) or any(t.is_inference() for t in patterns):
        return None
    key = [t.data_ptr() for t in tensors] + [t._version for t in patterns] + ks
    kept = model.__dict__.get("_decoded")
    if kept is None or kept.key != key:
        kept = model.__dict__["_decoded"] = _Decoded(model, key, tensors)
    return kept.blocks


def _as_configured(block: CircuitGPTBlock, index: int, config: Any) -> bool:
    """Whether nobody has put another part into a block, or another block in this place.

    The kernel goes by the config's sizes, so all that it reads must have these.
    """
    act_fn = nn.ReLU if config.activation_type == "relu" else nn.GELU
    residual = nn.ReLU if config.residual_activation_type == "relu" else nn.Identity
    width, inner = config.d_model_in, config.n_head * config.d_head
    shapes = [
        (3 * inner, width), (config.d_model, inner), (config.d_mlp, width),
        (config.d_model, config.d_mlp),
    ]  # fmt: skip
    linears, norms, sink = _linears(block), _norms(block), block.attn.attn_imp
    widths = [config.d_model, config.d_model, config.d_pos_emb, config.d_pos_emb][: len(norms)]
    return (
        block.attn.layer_idx == index
        and block.attn.scaling == config.d_head**-0.5
        and type(block.mlp.act_fn) is act_fn
        and getattr(block.mlp.act_fn, "approximate", "none") == "none"
        and type(block.residual_act) is residual
        and all(type(norm) is nn.RMSNorm and norm.eps == _EPS for norm in norms)
        and all(
            norm.weight is not None and norm.weight.shape == (width,)
            for norm, width in zip(norms, widths, strict=True)
        )
        and [layer.shape for layer in linears] == shapes
        and all(layer.bias is None or len(layer.bias) == layer.shape[0] for layer in linears)
        and (sink is None or sink.sink_logit.shape == (config.n_head,))
    )


class _Decoded:
    """The blocks as the kernel wants them, and all tensors it points to.

    Copies and pickles of a model go without: they have tensors of their own.
    """

    def __init__(self, model: CircuitGPTModel, key: list[int], tensors: list[Tensor]) -> None:
        self.key, self.held = key, tensors
        self.blocks = (_kernels.Block * len(model.h))(*map(self._block, model.h))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def _block(self, block: CircuitGPTBlock) -> Any:
        sink = block.attn.attn_imp
        # As `_linears`, `_norms` and `_sites` have them.
        linears = ("attention_in", "attention_out", "mlp_in", "mlp_out")
        norms = ("norm_1", "norm_2", "position_norm_1", "position_norm_2")
        ks = (
            "k_read", "k_query", "k_key", "k_value", "k_attended", "k_after_attention",
            "k_mlp_read", "k_neuron", "k_mlp", "k_after_mlp",
        )  # fmt: skip
        return _kernels.Block(
            sink=None if sink is None else sink.sink_logit.data_ptr(),
            **dict(zip(linears, map(self._linear, _linears(block)), strict=True)),
            **{n: norm.weight.data_ptr() for n, norm in zip(norms, _norms(block), strict=False)},
            **dict(zip(ks, map(_k, _sites(block)), strict=True)),
        )

    def _linear(self, layer: SparseLinear) -> Any:
        rows, width = layer.shape
        pattern = compiled_kernels().transpose_pattern(layer.row_starts, layer.columns, width)
        self.held += pattern
        by_rows = (layer.row_starts.data_ptr(), layer.columns.data_ptr())
        by_columns = (tensor.data_ptr() for tensor in pattern)
        bias = None if layer.bias is None else layer.bias.data_ptr()
        # The values themselves, not a copy: they may be trained in between.
        values = layer.values.data_ptr()
        return _kernels.Linear(*by_rows, *by_columns, values, bias, rows, width)


def _sink(block: CircuitGPTBlock) -> Tensor:
    """The sinks of a block; where it has none, what adds nothing to a softmax."""
    sink, heads = block.attn.attn_imp, block.attn.config.n_head
    return torch.full((heads,), -1e30) if sink is None else sink.sink_logit


def _nothing() -> None:
    return None


def _tensors(block: CircuitGPTBlock) -> list[Tensor | None]:
    """All that the kernel reads of a block."""
    attention = block.attn
    of_linears = [
        tensor
        for layer in _linears(block)
        for tensor in (layer.row_starts, layer.columns, layer.values, layer.bias)
    ]
    sink = None if attention.attn_imp is None else attention.attn_imp.sink_logit
    return [*of_linears, *(norm.weight for norm in _norms(block)), sink]


def _linears(block: CircuitGPTBlock) -> list[SparseLinear]:
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def _norms(block: CircuitGPTBlock) -> list[nn.Module]:
    names = ("ln_1", "ln_2", "ln_p1", "ln_p2")
    return [block._modules[name] for name in names if name in block._modules]


def _sites(block: CircuitGPTBlock) -> list[AbsTopK]:
    """Where a block keeps its largest activations, in the order of computation."""
    attention, mlp = block.attn, block.mlp
    return [
        attention.act_in, attention.q, attention.k, attention.v, attention.resid_delta,
        block.resid_post_attn, mlp.act_in, mlp.post_act, mlp.resid_delta, block.resid_post_mlp,
    ]  # fmt: skip


def _k(site: AbsTopK) -> int:
    """k, or 0 where all is kept."""
    return 0 if site.k is None or site.k >= site.width else site.k


def _shape(model: CircuitGPTModel) -> Any:
    config = model.config
    return _kernels.BlockShape(
        width=config.d_model,
        position_width=config.d_pos_emb or 0,
        heads=config.n_head,
        head_width=config.d_head,
        neurons=config.d_mlp,
        relu=config.activation_type == "relu",
        relu_residual=config.residual_activation_type == "relu",
        eps=_EPS,
        scale=config.d_head**-0.5,
    )
