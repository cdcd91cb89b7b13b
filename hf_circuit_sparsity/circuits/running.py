"""A model that runs on a circuit alone, and the weights of that circuit."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..decoders.decoder import decoder_of
from ..modeling.fingerprint import model_fingerprint
from .ablation import TOKENS, hooked, node_sites, unwrapped
from .circuit_file import model_source, model_text
from .collapse import kept_alone
from .edges import Edge, circuit_edges, count_edges, edge_hooks
from .node_set import NodeSet
from .task_scores import Calibration


class Running(NodeSet):
    """What can be done with a circuit and its model."""

    means: dict[str, torch.Tensor]
    edge_offsets: dict[str, dict[int, float]]
    calibration: Calibration
    model_name: str
    model_revision: str
    example: dict[str, Any]

    def masks(self) -> dict[str, torch.Tensor]:
        """Site → bool `(width,)`, true for the circuit's nodes; every site of the model."""
        return {s: _mask(len(mean), self.nodes.get(s, [])) for s, mean in self.means.items()}

    def masks_and_means(
        self, model: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """[`masks`] and `means`, with an entry `TOKENS` where tokens were pruned."""
        masks, means = self.masks(), dict(self.means)
        if self.tokens is not None:
            vocabulary = model.get_input_embeddings().num_embeddings
            masks[TOKENS], means[TOKENS] = _mask(vocabulary, self.tokens), self.token_mean
        return masks, means

    def edges(self, model: nn.Module) -> list[Edge]:
        """The nonzero weights of `model` between the circuit's nodes, without pruned ones."""
        self.check_model(model)
        return self.split_edges(model)[0]

    def split_edges(self, model: nn.Module) -> tuple[list[Edge], list[Edge]]:
        """The circuit's edges, and those between its nodes that were pruned."""
        edges = circuit_edges(unwrapped(model), self.nodes)
        if self.kept_edges is None:
            return edges, []
        kept = set(self.kept_edges)
        return [e for e in edges if e.name in kept], [e for e in edges if e.name not in kept]

    def edge_cuts(self, model: nn.Module) -> list[tuple[nn.Module, Callable]]:
        """Forward hooks that cut the pruned edges; none where edges were not pruned."""
        if self.kept_edges is None:
            return []
        return edge_hooks(unwrapped(model), self.split_edges(model)[1], self.edge_offsets)

    def count_edges(self, model: nn.Module) -> int:
        """How many [`edges`] there are, without listing the millions of a dense model."""
        if self.kept_edges is None:
            return count_edges(unwrapped(model), self.nodes)
        return len(self.edges(model))

    def check_model(self, model: nn.Module) -> None:
        """Raise a `ValueError` if `model` is not the one this circuit was cut out of.

        What `torch.compile`, data parallelism or PEFT put around the model does not count. In
        float16 weights are no longer those that were fingerprinted, so there is a warning, and only
        the shapes are compared.
        """
        model = unwrapped(model)
        if any(weight.dtype == torch.float16 for weight in model.parameters()):
            warnings.warn(
                "The model is in float16, so whether it is the one this circuit was cut out of "
                "cannot be told from its weights; load it in float32 or bfloat16 to be sure.",
                stacklevel=3,
            )
        elif (fingerprint := model_fingerprint(model)) != self.model_fingerprint:
            expected = model_text(self.model_fingerprint, self.model_name, self.model_revision)
            passed = model_text(fingerprint, *model_source(model))
            raise ValueError(
                f"This circuit for {self.task!r} was cut out of the model {expected}, but the "
                f"model passed is {passed}; load that model, or find the circuit anew in this one."
            )
        adapters = {a for module in model.modules() for a in _active_adapters(module)}
        if adapters:
            warnings.warn(
                f"The adapter {', '.join(sorted(adapters))} changes what the model computes, and "
                "the circuit was cut out of the model without it; leave it out by "
                "`with model.disable_adapter():` if that is what you mean to run.",
                stacklevel=3,
            )
        self._check_fits(model)

    def _check_fits(self, model: nn.Module) -> None:
        # A file may claim any fingerprint.
        widths = {site: module.width for site, module in node_sites(model).items()}
        for site in {**widths, **self.means}:
            mean, width = len(self.means.get(site, ())), widths.get(site, 0)
            if mean != width:
                raise ValueError(
                    f"means[{site!r}] has {mean} entries, but the model has {width} nodes there; "
                    "the circuit was made by other code or is damaged, find it anew."
                )
        width = model.get_input_embeddings().embedding_dim
        if self.token_mean is not None and len(self.token_mean) != width:
            raise ValueError(
                f"token.mean has {len(self.token_mean)} entries, but the model's embeddings have "
                f"{width}; the circuit was made by other code or is damaged, find it anew."
            )
        vocabulary = model.get_input_embeddings().num_embeddings
        example = self.example
        tokens = [*self.calibration.shift, *(self.tokens or ()), *example.get("token_ids", [])]
        tokens += example.get("counterfactual_token_ids", [])
        tokens += [example[n] for n in ("target_id", "counterfactual_target_id") if n in example]
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ValueError(
                f"The circuit names token {max(tokens)}, but the model's vocabulary has "
                f"{vocabulary}; the circuit is damaged, find it anew."
            )

    @contextmanager
    def apply(
        self,
        model: nn.Module,
        *,
        calibrated: bool = True,
        inverse: bool = False,
        beside: Mapping[str, torch.Tensor] | None = None,
        collapsed: bool = False,
    ) -> Iterator[nn.Module]:
        """Within the block, `model` runs on this circuit alone: all other nodes are mean-ablated.

        Args:
            model: the model this circuit was cut out of, also compiled, data-parallel or with a
                PEFT adapter.
            calibrated: also scale and shift the logits as fitted. Never done for the inverse.
            inverse: ablate the circuit instead, and keep everything else (a test of necessity):
                its nodes, and its tokens' embeddings where it names any.
            beside: site → bool `(width,)`, other nodes that stay on as well.
            collapsed: compute no more than what is on needs: the same logits up to the order of
                additions, and sooner. Other activations are then not to be looked at, for some are
                not there, and weights that change within the block are not seen.

        Raises:
            ValueError: the circuit was made for another model.
        """
        self.check_model(model)
        inner = unwrapped(model)
        masks, means = self.masks_and_means(inner)
        if inverse:
            masks = {site: ~mask for site, mask in masks.items()}
        for site, mask in (beside or {}).items():
            masks[site] = masks[site] | mask
        hooks = [] if inverse else self.edge_cuts(inner)
        if calibrated and not inverse:
            calibrate = self.calibration.logits
            hooks.append(
                (decoder_of(inner).logits_site(), lambda module, args, logits: calibrate(logits))
            )
        with kept_alone(inner, masks, means, collapsed), hooked(hooks):
            yield model


def _active_adapters(module: nn.Module) -> Sequence[str]:
    """Of a layer that PEFT put around another."""
    if not hasattr(module, "base_layer") or module.disable_adapters or module.merged:
        return ()
    return module.active_adapters


def _mask(width: int, kept: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(width, dtype=torch.bool)
    mask[list(kept)] = True
    return mask
