"""Random coordinate descent on sparse weights, at the cost of what it touches."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...modeling.sparse_layers import SparseWeight
from ..schedules import scheduled_density
from ..skipped_steps import COUNTERS, count_skipped_step
from ..topk_adamw import GRAD_RMS_MODES
from .blocks import Block, BlockKind, Selection
from .config import check_group
from .distributed import GradientExchange, Workers, share_births
from .gradients import first_not_finite, gradient_rms, of_those_still_live, scale_for
from .storage import MatrixStorage, NonzeroStorage, Storage
from .updates import (
    Coordinates,
    block_dim,
    draw_for,
    find_births,
    learning_rate,
    move_dense_parameters,
    move_live_coordinates,
    remember_block,
    seeded,
    settle_live_coordinates,
    working_dtype,
)

# Per coordinate, in the state of a sparse parameter: torch would cast them on loading.
_SEEN = ("block_sum", "block_square")
_TENSORS = ("live", "exp_avg", "exp_avg_sq", "age", "block", *_SEEN)


class RCDSparseOptimizer(torch.optim.Optimizer):
    """Random coordinate descent that starts sparse and stays sparse.

    A block of each sparse parameter (some rows, columns or entries) is chosen at random and stays
    for ``block_steps`` steps. In every step the live coordinates (those that are not zero; with
    ``move_live=False`` only those in the block) move, ``x - lr * direction``, where the direction
    is the gradient (``update="plain"``) or Adam's. At the end of the stay the block's zeros make
    the same move from the mean of the gradients seen, then what is below ``clip_threshold`` is set
    to zero, and with a ``target_density`` only the largest stay: a coordinate comes alive by
    outgrowing another. Moments exist for live coordinates alone, gradients are needed for live
    coordinates and block alone; see :class:`PartialGradients`, which computes no others. Gradients
    in ``.grad`` are taken as well.

    With blocks of one entry, ``block_steps=1``, ``move_live=False`` and ``update="plain"`` this is
    the coordinate descent of Nesterov 2012 ("Efficiency of coordinate descent methods on huge-scale
    optimization problems") with zero-clipping. Parameters of a group with ``sparse=False`` are
    trained by gradient descent or AdamW as a whole.

    All arguments except ``params``, ``grad_rms`` and ``seed`` can be set per group;
    :func:`sparse_param_groups` makes groups in which norms are left alone. Everything a run depends
    on is in ``state_dict()``, the current block included. Change the weights by hand only before
    the first step: which coordinates live is read from them once.

    Args:
        params: parameters, (name, parameter) pairs, or groups; contiguous floating-point tensors.
        lr: learning rate.
        betas, eps: of Adam; ``eps`` is added to the square root of the second moment.
        weight_decay: decoupled, of live coordinates.
        selection: how blocks are drawn, see :func:`draw_block`: ``"uniform"``, ``"magnitude"``,
            ``"cyclic"``, or ``"gradient"`` (Gauss-Southwell on the block: drawn uniformly, but of
            its zeros only the ``greedy_fraction`` with the largest gradients move).
        block: ``"rows"`` (output neurons), ``"columns"`` (inputs) or single ``"entries"``; vectors
            have entries only.
        block_fraction: share of each sparse parameter in a block, in (0, 1].
        block_steps: steps for which a block stays.
        update: ``"adam"`` or ``"plain"``.
        move_live: whether live coordinates outside the block move.
        clip_threshold: what is smaller in magnitude becomes zero.
        l1: weight of an L1 penalty, applied as a proximal step (soft threshold ``lr * l1``).
        target_density: at most this share of each sparse parameter stays nonzero, in (0, 1]; None
            for no such budget.
        start_density: the budget before the first step, in [``target_density``, 1]; it then falls
            by equal factors and reaches the target at ``anneal_end``. None: the target all along.
        anneal_end, explore_end: as fractions of ``total_steps``; from ``explore_end`` on no blocks
            are drawn, no zeros are looked at, and only what lives moves.
        total_steps: number of steps of the whole run; needed with a ``start_density``, or an
            ``explore_end`` below 1.
        min_nonzeros: with a budget, nonzeros that each row of a matrix keeps in any case.
        magnitude_power, magnitude_floor: exponent and evenly spread share of ``"magnitude"``.
        greedy_fraction: of ``"gradient"``, in (0, 1].
        sharkfin: whether to multiply the learning rate by ``1 / sqrt(target_density)``.
        sparse: False trains the group's parameters as a whole.
        row_dim: dimension that counts output neurons: 0 for ``nn.Linear``, 1 for ``Conv1D``.
        grad_rms: "always" brings the root-mean-square of the gradients to 1, estimated from what is
            computed of them, "clip" only where it is above 1, "off" leaves them alone.
        seed: of the blocks; the global generators are not touched.
        workers: ranks that share the coordinates; every one then computes the gradients of its own
            part of them alone, and ships these. All must begin with the same weights, and what a
            block has seen in the middle of its stay is not saved. Needs ``move_live``.
        staleness: gradients of live coordinates are used so many steps after they were computed, so
            that the ranks need not wait for each other; what is under way is not saved.

    Attributes:
        grad_rms: root-mean-square of the last step's gradients, before scaling.
        effective_lr: learning rate of the first group in the last step, sharkfin included.

    Raises:
        ValueError: if a setting is out of range, or a parameter fits no rule.
        FloatingPointError: from ``step()``, at the third step in a row with gradients that are not
            finite.
    """

    # On the class, so that they also exist on a copy, for which torch calls no __init__.
    grad_rms: float | None = None
    effective_lr: float | None = None
    workers: Workers | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 0.1,
        weight_decay: float = 0.0,
        *,
        selection: Selection = "uniform",
        block: BlockKind = "rows",
        block_fraction: float = 1 / 16,
        block_steps: int = 1,
        update: Literal["adam", "plain"] = "adam",
        move_live: bool = True,
        clip_threshold: float = 0.0,
        l1: float = 0.0,
        target_density: float | None = None,
        start_density: float | None = None,
        anneal_end: float = 0.5,
        explore_end: float = 1.0,
        total_steps: int | None = None,
        min_nonzeros: int = 0,
        magnitude_power: float = 1.0,
        magnitude_floor: float = 0.1,
        greedy_fraction: float = 1 / 16,
        sharkfin: bool = False,
        sparse: bool = True,
        row_dim: int = 0,
        grad_rms: Literal["always", "clip", "off"] = "off",
        seed: int = 0,
        workers: Workers | None = None,
        staleness: int = 0,
    ) -> None:
        if grad_rms not in GRAD_RMS_MODES:
            raise ValueError(
                f"grad_rms={grad_rms!r} is unknown: expected one of {', '.join(GRAD_RMS_MODES)}."
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "selection": selection,
            "block": block,
            "block_fraction": block_fraction,
            "block_steps": block_steps,
            "update": update,
            "move_live": move_live,
            "clip_threshold": clip_threshold,
            "l1": l1,
            "target_density": target_density,
            "start_density": start_density,
            "anneal_end": anneal_end,
            "explore_end": explore_end,
            "total_steps": total_steps,
            "min_nonzeros": min_nonzeros,
            "magnitude_power": magnitude_power,
            "magnitude_floor": magnitude_floor,
            "greedy_fraction": greedy_fraction,
            "sharkfin": sharkfin,
            "sparse": sparse,
            "row_dim": row_dim,
        }
        super().__init__(params, defaults)
        if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
            raise ValueError(f"staleness={staleness!r} is not a whole number of steps >= 0.")
        if (workers is not None or staleness) and not all(
            g["move_live"] for g in self.param_groups if g["sparse"]
        ):
            raise ValueError(
                "move_live=False was passed with several workers or staleness: leave it True."
            )
        self.workers = workers
        self._exchange = GradientExchange(workers, staleness)
        self._forget()
        first = self.param_groups[0]
        first.update(dict.fromkeys(COUNTERS, 0), grad_rms_mode=grad_rms, seed=seed)
        self._set_densities()

    def _forget(self) -> None:
        """Drop what is derived from the state, or belongs to a step under way."""
        self._storages: dict[Tensor, Storage] = self.__dict__.get("_storages", {})
        self._coordinates: dict[Tensor, Coordinates] = {}
        self._partial: dict[Tensor, tuple[Tensor | None, Tensor]] = {}
        if "_exchange" not in self.__dict__:
            self._exchange = GradientExchange(self.workers, 0)
        self._exchange.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state saved by an older release
            for name in ("start_density", "anneal_end", "explore_end", "total_steps"):
                group.setdefault(name, self.defaults[name])
        self._set_densities()
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checking it first; see :class:`torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; see :class:`torch.optim.Optimizer`."""
        super().load_state_dict(state_dict)
        # torch casts all state to the dtype of its parameter, which would round positions.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name in _TENSORS and "live" in state_dict["state"][i]:
                    self.state[p][name] = value.detach().clone().to(p.device)

    @property
    def steps_taken(self) -> int:
        """Steps taken so far, skipped ones included."""
        return self.param_groups[0]["steps_taken"]

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose gradients were not finite."""
        return self.param_groups[0]["skipped_steps"]

    @property
    def density(self) -> float:
        """Share of the sparse parameters' coordinates that are live."""
        self._prepare()
        pairs = [
            (len(self.state[p]["live"]), self.storage(p).numel) for _, p in self.sparse_parameters()
        ]
        return sum(live for live, _ in pairs) / max(1, sum(size for _, size in pairs))

    @property
    def block_number(self) -> int:
        """How many blocks of the first sparse parameter have been drawn."""
        self._prepare()
        return self.state[self.sparse_parameters()[0][1]]["draws"]

    def sparse_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) of every sparse parameter."""
        return [(g, p) for g in self.param_groups if g["sparse"] for p in g["params"]]

    def coordinates(self, parameter: Tensor) -> Coordinates:
        """The coordinates of a sparse parameter whose gradient the coming step uses."""
        found = self._coordinates.get(parameter)
        if found is None:
            self._prepare()
            found = self._coordinates[parameter]
        return found

    def storage(self, parameter: Tensor) -> Storage:
        """Where a sparse parameter's weights lie.

        Raises:
            ValueError: if they are the nonzeros of layers that :meth:`train_nonzeros` was not told.
        """
        found = self._storages.get(parameter)
        if found is None:
            if any(g.get("nonzeros") and any(p is parameter for p in g["params"])
                   for g in self.param_groups):  # fmt: skip
                raise ValueError(
                    f"a sparse parameter with {parameter.numel()} entries holds the nonzeros of a "
                    "layer the optimizer does not know: train with PartialGradients(model, "
                    "optimizer), or call train_nonzeros(layers) before the first step."
                )
            found = self._storages[parameter] = MatrixStorage(parameter)
        return found

    def train_nonzeros(self, layers: Iterable[SparseWeight]) -> None:
        """Train layers that hold only their nonzeros; their patterns change as they learn.

        :class:`PartialGradients` does this for the layers of its model.

        Args:
            layers: those whose ``values`` are sparse parameters of this optimizer; tied ones all.
        """
        owners: dict[Tensor, list[SparseWeight]] = {}
        for layer in layers:
            owners.setdefault(layer.values, []).append(layer)
        sparse = {p for _, p in self.sparse_parameters()}
        for parameter, own in owners.items():
            if parameter in sparse:
                self._storages[parameter] = NonzeroStorage(own)

    @torch.no_grad()
    def add_gradient(self, parameter: Tensor, live: Tensor | None, block: Tensor) -> None:
        """Add to the gradient the coming step uses; it and ``zero_grad`` use it up.

        Args:
            parameter: a sparse one.
            live: gradient at ``coordinates(parameter).own_live``; None where live coordinates
                outside the block do not move.
            block: gradient at the coordinates of the block, flat, in its order.
        """
        before = self._partial.get(parameter)
        if before is not None:
            live = live if before[0] is None else before[0] + live
            block = before[1] + block
        self._partial[parameter] = (live, block)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, partial ones included."""
        super().zero_grad(set_to_none)
        self._partial.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step; see the class.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            FloatingPointError: at the third step in a row with gradients that are not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        counters = self.param_groups[0]
        self._set_densities()
        counters["steps_taken"] += 1
        if self.workers is not None and self.workers.average_dense:
            dense = [p for g in self.param_groups if not g["sparse"] for p in g["params"]]
            self.workers.average([p.grad for p in dense if p.grad is not None])
        gradients = {p: self._gradient(p) for _, p in self.sparse_parameters()}
        self._partial.clear()
        scale = self._scale(gradients)
        self.effective_lr = learning_rate(counters)
        if scale is None:
            count_skipped_step(counters, first_not_finite(self.param_groups, gradients))
        else:
            counters["skipped_in_a_row"] = 0
            for group in self.param_groups:
                if not group["sparse"]:
                    move_dense_parameters(group, self.state, scale)
            self._move(gradients, scale)
        self._settle()
        return loss

    def _move(self, gradients: dict[Tensor, Any], scale: float) -> None:
        """Move what is live, wherever its gradients come from, and remember the block's."""
        own, live = {}, {}
        for group, p in self.sparse_parameters():
            if gradients[p] is None:
                continue
            weight, state, wanted = self.storage(p), self.state[p], self._coordinates[p]
            live_gradient, block_gradient = gradients[p]
            if live_gradient is None:
                moving, places = wanted.live_in_block
                gradient = block_gradient[places]
                move_live_coordinates(weight, group, state, gradient, moving, scale)
            else:
                own[p], live[p] = live_gradient, wanted.live.live
            remember_block(weight, state, block_gradient, scale)
        if not own:
            return
        self._exchange.send(own, live, scale)
        received = self._exchange.receive()
        if received is None:
            return
        arrived, scale = received
        for group, p in self.sparse_parameters():
            positions, gradient = arrived.get(p, ((), ()))
            if not len(positions):
                continue
            state, moving = self.state[p], slice(None)
            if positions is not state["live"]:
                moving, gradient = of_those_still_live(positions, gradient, state["live"])
            move_live_coordinates(self.storage(p), group, state, gradient, moving, scale)

    def _settle(self) -> None:
        """Settle what is live in those parameters whose block has stayed its time."""
        due = []
        for group, p in self.sparse_parameters():
            self.state[p]["stayed"] += 1
            if self.state[p]["stayed"] >= group["block_steps"]:
                due.append((group, p))
        births = [
            find_births(self.storage(p), g, self.state[p], self._coordinates[p]) for g, p in due
        ]
        if self.workers is not None:
            births = share_births(self.workers, births)
        for (group, p), found in zip(due, births, strict=True):
            wanted = self._coordinates[p]
            born = found if len(found[0]) else None
            settle_live_coordinates(self.storage(p), group, self.state[p], wanted, born)
            self._choose(p, group)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _prepare(self) -> None:
        """Make sure that every sparse parameter has its live coordinates and a block."""
        if len(self._coordinates) == sum(
            len(g["params"]) for g in self.param_groups if g["sparse"]
        ):
            return
        for group, p in self.sparse_parameters():
            state = self.state[p]
            if "live" not in state:
                live = self.storage(p).find()
                state.update(live=live, draws=0)
                if group["update"] == "adam":
                    moments = torch.zeros(len(live), dtype=working_dtype(p), device=p.device)
                    state.update(exp_avg=moments, exp_avg_sq=moments.clone())
                    state["age"] = torch.zeros_like(moments, dtype=torch.int32)
                self._choose(p, group)
            elif p not in self._coordinates:
                weight = self.storage(p)
                weight.restore(state["live"])
                block = Block(weight.shape, block_dim(weight, group), state["block"])
                new = Coordinates(state["live"], block, group["move_live"], self.workers)
                self._coordinates[p] = new
                if self.workers is not None and "block_sum" in state:
                    # One rank's state was saved; what the others had seen of the block is gone.
                    state.update(seen=0)
                    for name in _SEEN:
                        state.pop(name, None)

    def _set_densities(self) -> None:
        for group in self.param_groups:
            group["density"] = scheduled_density(group, self.steps_taken + 1)

    def _choose(self, p: Tensor, group: dict[str, Any]) -> None:
        """Draw the next block of a parameter."""
        state = self.state[p]
        fraction = group["block_fraction"]
        if group["explore_end"] < 1.0:
            explored = self.steps_taken >= group["explore_end"] * group["total_steps"]
            fraction = 0.0 if explored else fraction
        # Every draw has a generator of its own, so that it depends on its number alone and not on
        # what was drawn for other parameters.
        ordinal = next(i for i, q in enumerate(self._parameters()) if q is p)
        key = (self.param_groups[0].get("seed", 0), ordinal, state["draws"])
        block = draw_for(self.storage(p), group, state, fraction, seeded(*key))
        state.update(block=block.ids, draws=state["draws"] + 1, stayed=0, seen=0)
        for name in _SEEN:
            state.pop(name, None)
        old = self._coordinates.get(p)
        new = Coordinates(state["live"], block, group["move_live"], self.workers)
        if old is not None and old.live.live is state["live"]:
            new.live = old.live  # what is known of the pattern
        self._coordinates[p] = new

    def _gradient(self, p: Tensor) -> tuple[Tensor | None, Tensor] | None:
        """Gradient at the live coordinates (None: take it from the block) and at the block."""
        if p.grad is not None:
            if p.grad.is_sparse:
                raise RuntimeError(
                    "a gradient is a sparse tensor, expected dense ones: build embeddings with "
                    "sparse=False."
                )
            wanted, grad = self._coordinates[p], p.grad.to(working_dtype(p))
            live = grad.reshape(-1)[wanted.own_live.live] if wanted.move_live else None
            self.add_gradient(p, live, wanted.block.take(grad))
        return self._partial.get(p)

    def _scale(self, gradients: dict[Tensor, Any]) -> float | None:
        """What to multiply all gradients by; None if they are not finite."""
        parts = [
            (self.storage(p).numel, self.state[p], self._coordinates[p], *gradient)
            for p, gradient in gradients.items()
            if gradient is not None
        ]
        groups = [g for g in self.param_groups if not g["sparse"]]
        dense = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        self.grad_rms = gradient_rms(parts, dense, self.workers)
        return scale_for(self.grad_rms, self.param_groups[0].get("grad_rms_mode", "off"))
