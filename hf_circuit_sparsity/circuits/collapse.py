"""Computing a circuit without computing the model: matrices shrink to the nodes that are open.

Where a node is fixed at its mean, what the next layer reads of it is a constant. So a linear layer
between node sites reads only the nodes that may be open, and the rest of its product is part of its
bias; what only writes nodes that are shut anyway is not computed; an attention or MLP none of whose
writes are open is a constant as a whole. This is exact, up to the order of additions, for every
forward pass whose gates are shut outside the nodes named: the hooks that ablate are the reference,
and stay in place. Attention is computed for the heads that count ([`collapsed_attention`]).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoders.decoder import Decoder, decoder_of
from ..decoders.hooks import temporary_hooks
from ..decoders.layer import Projection
from .ablation import mean_ablated, unwrapped
from .collapsed_attention import OpenHeads, attending, open_heads

Forward = Callable[..., Tensor | tuple]

# A layer of which more is open is left as it is.
_MOST_OPEN = 0.5
# What is left may be smaller by this factor before it is worth collapsing anew.
_MOST_LEFT = 1.5


class Collapse:
    """The layers of a model on the nodes that may be open; the others are fixed at their means.

    Built of the weights as they are: not to be kept while these change.

    Args:
        model: of an architecture that is described.
        live: site → bool `(width,)`, nodes that may be open; a site that is not named is all open.
        means: site → `(width,)`, what the others are.
    """

    def __init__(
        self, model: nn.Module, live: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> None:
        decoder = decoder_of(unwrapped(model))
        sites = decoder.node_sites()
        self.live = {site: live[site] for site in sites if site in live}
        self._open = sum(int(mask.sum()) for mask in self.live.values())
        self._forwards: dict[nn.Module, Forward] = {}
        self._heads: dict[nn.Module, OpenHeads] = {}
        # AbsTopK compares a node with all others of its site, so all of them are computed, unless
        # all are shut.
        selects = {name for name, site in sites.items() if getattr(site, "k", None) is not None}
        shut = {name for name in selects if name in self.live and not self.live[name].any()}
        self._forwards |= {sites[name]: _identity for name in shut}
        selects -= shut
        with torch.no_grad():
            for projection in decoder.projections():
                narrow = _narrow(projection, self.live, means, selects, decoder)
                if narrow is not None:
                    self._forwards[projection.module] = narrow
            for i, layer in enumerate(decoder.layers):
                heads = open_heads(decoder, i, self.live)
                if heads is not None:
                    self._heads[layer.attention] = heads
                for part, module, norm in (
                    ("attn", layer.attention, layer.attn_norm),
                    ("mlp", layer.mlp, layer.mlp_norm),
                ):
                    site = f"h.{i}.{part}.resid_delta"
                    if site not in self.live or self.live[site].any():
                        continue
                    self._forwards[module] = _constant(means[site], part == "attn")
                    if not layer.parallel:  # there both may read one norm
                        self._forwards[norm] = _identity

    def fits(self, live: Mapping[str, Tensor]) -> bool:
        """Whether these nodes may all be open here, and are not so few that less would do."""
        if not all(s in live and not (live[s] & ~mask).any() for s, mask in self.live.items()):
            return False
        return sum(int(live[s].sum()) for s in self.live) >= self._open / _MOST_LEFT

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the model computes no more than that."""
        before = {module: module.__dict__.get("forward") for module in self._forwards}
        try:
            for module, forward in self._forwards.items():
                module.forward = forward
            # A compiled forward pass would not know of it.
            with temporary_hooks([]), attending(self._heads):
                yield
        finally:
            for module, own in before.items():
                del module.forward
                if own is not None:
                    module.forward = own


@contextmanager
def kept_alone(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    collapsed: bool = True,
) -> Iterator[None]:
    """Within the block every node not marked in `keep` is fixed at its mean.

    Args:
        model: of an architecture that is described, see `docs/decoders.md`.
        keep: as for [`mean_ablated`].
        means: as for [`mean_ablated`].
        collapsed: compute no more than the kept nodes need; if not, hooks alone ablate, which is
            slower and the reference.
    """
    running = Collapse(model, keep, means).running() if collapsed else nullcontext()
    with mean_ablated(model, keep, means), running:
        yield


def _identity(x: Tensor) -> Tensor:
    """In the place of what makes something that nobody reads."""
    return x


def _narrow(
    projection: Projection,
    live: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    selects: set[str],
    decoder: Decoder,
) -> Forward | None:
    """A linear layer that reads open nodes and writes those that count; `None` to leave it."""
    # What PEFT put around a layer adds to what its weight says.
    if projection.source not in live or hasattr(projection.module, "base_layer"):
        return None
    weight = projection.weight().detach()
    open_nodes = live[projection.source].to(weight.device)
    mean = means[projection.source].to(weight)
    if projection.columns is not None:
        columns = projection.columns.to(weight.device)
        open_nodes, mean = open_nodes[columns], mean[columns]
    if open_nodes.float().mean() > _MOST_OPEN:
        return None
    rows = _rows(projection, live, selects, len(weight))
    if rows is not None:
        weight = weight[rows]
    bias = getattr(projection.module, "bias", None)
    if bias is not None:
        bias = bias.detach() if rows is None else bias.detach()[rows]
    read, shut = open_nodes.nonzero()[:, 0], ~open_nodes
    if projection.source.endswith(".v"):
        # What attention makes of a constant is that times the sum of its weights, which with a sink
        # is not 1. It is read off one shut channel of each head.
        by_head = (mean * shut).view(-1, decoder.head_dim)
        largest, at = by_head.abs().max(1)
        heads = largest.nonzero()[:, 0]
        shown = heads * decoder.head_dim + at[heads]
        relative = by_head[heads] / mean[shown, None]
        sums = torch.einsum("rhc,hc->rh", weight.unflatten(1, by_head.shape)[:, heads], relative)
        weight, read = torch.cat([weight[:, read], sums], 1), torch.cat([read, shown])
    else:
        constant = weight[:, shut] @ mean[shut]
        bias = constant if bias is None else bias + constant
        weight = weight[:, read]
    outputs = len(projection.weight()) if rows is not None else None

    def forward(x: Tensor) -> Tensor:
        narrow = F.linear(x[..., read], weight, bias)
        if rows is None:
            return narrow
        return narrow.new_zeros(*x.shape[:-1], outputs).index_copy(-1, rows, narrow)

    return forward


def _rows(
    projection: Projection, live: Mapping[str, Tensor], selects: set[str], outputs: int
) -> Tensor | None:
    """The outputs of a layer that count, of what is shut behind it none; `None` is all."""
    targets = projection.targets
    if any(t.site in selects or t.site not in live for t in targets):
        return None
    counts = torch.zeros(outputs, dtype=torch.bool)
    for target in targets:
        nodes = live[target.site].cpu()
        counts[nodes if target.rows is None else target.rows.cpu()[nodes]] = True
    return counts.nonzero()[:, 0].to(projection.weight().device)


def _constant(mean: Tensor, with_weights: bool) -> Forward:
    """An attention or an MLP of which nothing is open: the mean of what it writes."""

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, None]:
        x = args[0] if args else kwargs["hidden_states"]
        written = mean.to(x).expand(*x.shape[:2], -1)
        return (written, None) if with_weights else written

    return forward
