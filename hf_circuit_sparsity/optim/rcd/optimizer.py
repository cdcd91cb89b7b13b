"""Random coordinate descent on sparse weights, at the cost of what it touches."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from ...modeling.sparse_layers import SparseWeight
from ..schedules import geometric_density
from ..sparse_optimizer import (
    Normalization,
    SparseOptimizer,
    learning_rate,
    named_parameters,
    refuse_sparse,
)
from .config import RCDConfig
from .distributed import LostRankError, RCDProcessGroup
from .exchange import Exchange, Gradients
from .start import computed_by, digest, warn_of_other_rounding, warn_of_row_minima
from .state import NonzeroState, SparseState
from .updates import (
    find_growth,
    gradient_rms,
    grow_and_drop,
    match_stale_growth,
    move,
    no_growth,
    replaced_share,
)


class _Uncast:
    """A saved state on its way through torch, which would cast it and so round positions."""

    def __init__(self, saved: dict[str, Any]) -> None:
        self.saved = saved

    def copy(self) -> dict[str, Any]:
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in self.saved.items()
        }


class RCDSparseOptimizer(SparseOptimizer):
    """Random coordinate descent that starts sparse and stays sparse.

    A block of each sparse parameter (some rows, columns or entries) is drawn at random and stays
    for `block_steps` steps. In every step the active coordinates (those that are not zero; with
    `move_active=False` only those in the block) move, `x - lr * direction`, where the direction is
    Adam's or, with `update="plain"`, the gradient. At the end of the stay the block's zeros make
    the same move from the mean of the gradients seen. Then what is below `clip_threshold` is set to
    zero, and with a `target_density` only the largest stay: a coordinate grows by outgrowing
    another, which drops.

    Moments exist for active coordinates alone. Gradients are needed for active coordinates and
    block alone: [`PartialGradients`] computes no others; gradients in `.grad` are taken as well.

    With blocks of one entry, `block_steps=1`, `move_active=False` and `update="plain"` this is the
    coordinate descent of Nesterov 2012 ("Efficiency of coordinate descent methods on huge-scale
    optimization problems") with zero-clipping. Parameters of a group with `sparse=False` are
    trained by AdamW or gradient descent as a whole.

    All arguments except `params`, `normalize_gradients`, `seed`, `process_group`, `staleness`,
    `average_gradients` and `init` can be set per group; [`sparse_param_groups`] makes groups in
    which norms are left alone.
    Everything a run depends on is in `state_dict()`, the current block included. Change the weights
    by hand only before the first step: which coordinates are active is read from them once.

    Args:
        params: parameters, (name, parameter) pairs, or groups; contiguous floating-point tensors.
        lr, betas, eps, sharkfin, sparse, row_dim: as of [`TopKAdamW`].
        weight_decay: decoupled, of active coordinates.
        config: the settings of the descent.
        target_density: at most this share of each sparse parameter stays nonzero, in (0, 1]; None
            for no such budget.
        anneal_end: where `start_density` has fallen to the target, as a fraction of `total_steps`.
        total_steps: number of steps of the whole run; needed with a `start_density`, or an
            `explore_end` below 1.
        min_nonzeros: with a budget, nonzeros that each row of a matrix keeps in any case.
        normalize_gradients: see [`SparseOptimizer`]; the root-mean-square is estimated from what is
            computed of the gradients.
        seed: of the blocks; the global generators are not touched.
        process_group: processes that share the coordinates. Every one then computes the gradients
            of its own part of them alone, and ships these. All must begin with the same weights,
            and what a block has seen in the middle of its stay is not saved. Needs `move_active`.
        settings: settings of [`RCDConfig`] by name; they win over `config`.

    Raises:
        TypeError: if a setting is not known.
        ValueError: if a setting is out of range, or a parameter fits no rule.
        FloatingPointError: from `step()`, at the third step in a row with gradients that are not
            finite.
        LostRankError: from `step()`, once another process of the group is gone. Model and optimizer
            can be saved then, and go on with fewer.
    """

    # On the class, so that they also exist on a copy, for which torch calls no __init__.
    process_group: RCDProcessGroup | None = None
    _staleness = 0
    _averages = False
    _used: Gradients | None = None
    _begun = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 0.1,
        weight_decay: float = 0.0,
        *,
        config: RCDConfig | None = None,
        target_density: float | None = None,
        anneal_end: float = 0.5,
        total_steps: int | None = None,
        min_nonzeros: int = 0,
        sharkfin: bool = False,
        sparse: bool = True,
        row_dim: int = 0,
        normalize_gradients: Normalization = "off",
        seed: int = 0,
        process_group: RCDProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        config = replace(config or RCDConfig(), **settings)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "target_density": target_density, "anneal_end": anneal_end, "total_steps": total_steps,
            "min_nonzeros": min_nonzeros, "sharkfin": sharkfin, "sparse": sparse,
            "row_dim": row_dim, "fused": None, **config.group_settings(),
        }  # fmt: skip
        super().__init__(params, defaults, normalize_gradients)
        self.param_groups[0]["seed"] = seed
        self.process_group, self._staleness = process_group, config.staleness
        self._averages = config.average_gradients
        # The layers that hold a parameter as their nonzeros.
        self._layers: dict[Tensor, list[SparseWeight]] = {}
        self._start_exchange()

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles no more than parameters, state and settings.
        own = ("process_group", "_staleness", "_averages", "_layers")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", ()):
            if "move_live" in group:  # its name in earlier releases
                group["move_active"] = group.pop("move_live")
        super().__setstate__(state)
        for p, saved in self.state.items():
            if isinstance(saved, _Uncast):
                self.state[p] = saved.copy()
        self._start_exchange()  # what was in flight is not saved

    def _start_exchange(self) -> None:
        late = self.process_group is not None or self._staleness
        if late and not all(g["move_active"] for g in self.param_groups if g["sparse"]):
            raise ValueError(
                "move_active=False was passed with several processes or staleness: leave it True."
            )
        self._begun = False
        self._exchange = Exchange(self.process_group, self._staleness, self._averages)

    def state_dict(self) -> dict[str, Any]:
        """The state; see [`torch.optim.Optimizer`]. That of sparse parameters is in dicts as well.

        In-flight gradients are not saved.
        """
        # Before the hooks of users.
        hook = self.register_state_dict_post_hook(type(self)._with_plain_states, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _with_plain_states(self, saved: dict[str, Any]) -> None:
        groups = saved["param_groups"]
        saved["param_groups"] = [{**groups[0], "computed_by": self._computed_by()}, *groups[1:]]
        for number, state in saved["state"].items():
            if isinstance(state, SparseState):
                saved["state"][number] = state.to_dict()

    def _computed_by(self) -> dict[str, Any]:
        return computed_by(self.process_group, self.param_groups[0]["params"][0])

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapted(state_dict)
        for group in adapted["param_groups"]:
            if "computed_by" in group and adapted is not state_dict:
                warn_of_other_rounding(group.pop("computed_by"), self._computed_by())
        state = {n: _Uncast(s) if "live" in s else s for n, s in adapted["state"].items()}
        return {**adapted, "state": state}

    def _state_names(self, group: dict[str, Any]) -> set[str]:
        return {"live", "block"} if group["sparse"] else super()._state_names(group)

    @property
    def density(self) -> float:
        """Share of the sparse parameters' coordinates that are active."""
        states = [state for _, state in self._sparse_states()]
        return sum(len(s.active) for s in states) / max(1, sum(s.numel for s in states))

    @property
    def block_number(self) -> int:
        """How many blocks of the first sparse parameter have been drawn."""
        return self._sparse_states()[0][1].draws

    def sparse_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) of every sparse parameter."""
        return [(g, p) for g in self.param_groups if g["sparse"] for p in g["params"]]

    def sparse_state(self, parameter: Tensor) -> SparseState:
        """The state of a sparse parameter, with the coordinates whose gradients are needed next.

        Raises:
            ValueError: if it holds nonzeros of layers that [`train_nonzeros`] was not told.
        """
        state = self.state.get(parameter)
        if isinstance(state, SparseState):
            return state
        group = next(g for g, p in self.sparse_parameters() if p is parameter)
        return self._make_state(parameter, group)

    def train_nonzeros(self, layers: Iterable[SparseWeight]) -> None:
        """Train layers that hold only their nonzeros; their patterns change as they learn.

        [`PartialGradients`] does this for the layers of its model.

        Args:
            layers: those whose `values` are sparse parameters of this optimizer; tied ones all.
        """
        by_parameter: dict[Tensor, list[SparseWeight]] = {}
        for layer in layers:
            by_parameter.setdefault(layer.values, []).append(layer)
        for _, p in self.sparse_parameters():
            own, state = by_parameter.get(p), self.state.get(p)
            if own and isinstance(state, NonzeroState):
                state.layers = own
            elif own:
                self._layers[p] = own

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, partial ones included."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            if isinstance(state, SparseState):
                state.gradient = None

    def _check_group(self, group: dict[str, Any]) -> None:
        for name, p in named_parameters(group):
            if isinstance(p, DTensor):
                raise ValueError(
                    f"{name} is sharded (a DTensor), expected a whole parameter: random coordinate "
                    "descent has its own way of many processes, in which each computes the "
                    "gradients of its own coordinates; pass process_group=RCDProcessGroup()."
                )
        super()._check_group(group)
        config = RCDConfig.of_group(group)
        config.check_run(group["target_density"], group["anneal_end"], group["total_steps"])

    def _unmet_rule(self, group: dict[str, Any], p: Tensor) -> str | None:
        if group["sparse"] and (p.numel() == 0 or not p.is_contiguous()):
            return "entries, and all of them contiguous"
        return super()._unmet_rule(group, p)

    def _scheduled_density(self, group: dict[str, Any]) -> float | None:
        target, start = group["target_density"], group["start_density"]
        if target is None or start is None:
            return target
        return geometric_density(
            self.steps_taken, target, start, group["anneal_end"], group["total_steps"]
        )

    def _sparse_states(self) -> list[tuple[dict[str, Any], SparseState]]:
        return [(group, self.sparse_state(p)) for group, p in self.sparse_parameters()]

    @torch.no_grad()
    def _make_state(self, p: Tensor, group: dict[str, Any]) -> SparseState:
        saved = self.state.get(p)
        layers = self._layers.get(p)
        if layers is None and group.get("nonzeros"):
            raise ValueError(
                f"a sparse parameter with {p.numel()} entries holds the nonzeros of a layer the "
                "optimizer does not know: train with PartialGradients(model, optimizer), or call "
                "train_nonzeros(layers) before the first step."
            )
        if layers is None:
            state = SparseState(p, group, saved, self.process_group, self._averages)
        else:
            state = NonzeroState(layers, p, group, saved, self.process_group, self._averages)
        self.state[p] = state
        if not saved:
            self._draw(state, group)
        return state

    def _draw(self, state: SparseState, group: dict[str, Any]) -> None:
        """Draw the next block of a parameter."""
        fraction = group["block_fraction"]
        if group["explore_end"] < 1.0:
            explored = self.steps_taken >= group["explore_end"] * group["total_steps"]
            fraction = 0.0 if explored else fraction
        if group["rest_steps"] and state.drawn is not None and not state.rests:
            fraction = 0.0
        state.draw(group, fraction, self._generator(state, state.draws))

    def _generator(self, state: SparseState, draw: int) -> torch.Generator:
        """Of one draw of a parameter.

        Every draw has one of its own, so that it depends on its number alone and not on what was
        drawn for other parameters.
        """
        parameters = (p for g in self.param_groups for p in g["params"])
        number = next(i for i, p in enumerate(parameters) if p is state.parameter)
        seed = self.param_groups[0].get("seed", 0)
        key = (seed * 1_000_003 + number) * 1_000_003 + draw
        return torch.Generator().manual_seed(key % (1 << 63))

    def _measure_gradients(self) -> float:
        dense = [p for g in self.param_groups if not g["sparse"] for p in g["params"]]
        states = [state for _, state in self._sparse_states()]
        for state in states:
            self._take_dense_gradient(state)
        known = [state for state in states if state.gradient is not None]
        try:
            self._begin()
            self._used = self._exchange.swap_gradients(
                known, {p: p.grad for p in dense if p.grad is not None}
            )
        except (LostRankError, ValueError):
            self.steps_taken -= 1  # nothing has moved
            raise
        for p in dense:
            p.grad = None if self._used is None else self._used.dense.get(p)
        return 0.0 if self._used is None else gradient_rms(self._used)

    def _begin(self) -> None:
        """Before the first step, look at what all are to have in common."""
        if self._begun:
            return
        group = self.process_group
        if group is not None:
            device = self.param_groups[0]["params"][0].device
            group.check_alike(digest(self.param_groups, self.state), device)
        if group is None or group.rank == 0:
            warn_of_row_minima(self._sparse_states())
        self._begun = True

    def _take_dense_gradient(self, state: SparseState) -> None:
        gradient = state.parameter.grad
        if gradient is None:
            return
        refuse_sparse(gradient)
        gradient = gradient.to(state.dtype)
        flat = gradient.reshape(-1)
        active = flat[state.own_pattern.positions] if state.move_active else None
        state.add_gradient(active, state.own_block.take(gradient))

    def _gradients_of(self, group: dict[str, Any], p: Tensor) -> Iterable[Tensor | None]:
        if not group["sparse"] or self._used is None:
            return (p.grad,)
        for i, state in enumerate(self._used.states):
            if state.parameter is p:
                return (self._used.active[i], self._used.in_block[i])
        return ()

    def _update(self, scale: float) -> None:
        used = self._used
        if used is None:
            return  # the first gradients are on their way
        for group in self.param_groups:
            if not group["sparse"]:
                self._move_dense(group, scale)
        arrived = zip(used.positions, used.active, strict=True)
        arrived = dict(zip(used.states, arrived, strict=True))
        for group, state in self._sparse_states():
            block = None if state.gradient is None else state.gradient[1].to(state.dtype) * scale
            if state in arrived:
                move(state, group, *arrived[state], block, scale)
            # Of a stale scale, which does not tell whether these gradients are finite.
            if block is not None and (not self._staleness or bool(block.isfinite().all())):
                state.remember_block(block)

    def _move_dense(self, group: dict[str, Any], scale: float) -> None:
        """AdamW or gradient descent on the parameters of a group as a whole."""
        if group["update"] == "adam":
            self._adamw(group, scale)
            return
        lr = learning_rate(group)
        for p in group["params"]:
            if p.grad is not None:
                p.mul_(1 - lr * group["weight_decay"]).add_(p.grad, alpha=-lr * scale)

    def _sparsify(self) -> None:
        """End the stay of those blocks that have stayed their time, and let arrivals grow."""
        self._used = None
        due = {}
        for group, state in self._sparse_states():
            state.gradient = None
            state.stayed += 1
            rests = group["rest_steps"] and state.rests
            if state.stayed >= group["rest_steps" if rests else "block_steps"]:
                replaced = replaced_share(group, self.steps_taken)
                generator = partial(self._generator, state, -state.draws)
                due[state] = find_growth(state, group, replaced, generator)
        arrived = self._exchange.swap_growth(due)
        for group, state in self._sparse_states():
            growth = arrived.get(state)
            if growth is not None and self._staleness:
                growth = match_stale_growth(growth, state.active)
            if growth is not None or state in due:
                grow_and_drop(state, group, growth or no_growth(state))
            if state in due:
                self._draw(state, group)
