"""The step that both optimizers share: normalize the gradients, move, make sparse, or skip."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from .keep_largest import INTEGER_VIEW
from .schedules import sharkfin
from .settings import check, is_whole
from .sharding import is_finite, local

logger = logging.getLogger(__name__)

Normalization = Literal["always", "clip", "off"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

# One broken batch should not end a run, a run that has gone wrong should end.
MAX_SKIPPED_IN_A_ROW = 3

# Kept in the first parameter group, because groups are what torch saves, loads and copies.
_COUNTERS = ("steps_taken", "skipped_steps", "skipped_in_a_row")


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that keep weights sparse.

    A subclass says how dense a group is (`_scheduled_density`), how large its gradients are
    (`_measure_gradients`), how it moves (`_update`) and what ends every step (`_sparsify`).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        defaults: settings of the groups.
        normalize_gradients: "always" brings the root-mean-square of the gradients to 1, "clip"
            only where it is above 1, "off" leaves the gradients alone.

    Attributes:
        grad_rms: root-mean-square of the gradients of the last step, before scaling; None before
            the first step.
        effective_lr: learning rate of the first group in the last step, sharkfin included.
    """

    # On the class, so that they also exist on a copy, for which torch calls no __init__.
    grad_rms: float | None = None
    effective_lr: float | None = None
    # Whether `_check_start` was passed since groups were last added or loaded.
    _started = False

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], normalize_gradients: Normalization
    ) -> None:
        expected = f"one of {', '.join(NORMALIZATIONS)}"
        known = normalize_gradients in NORMALIZATIONS
        check("normalize_gradients", normalize_gradients, known, expected)
        # torch adds the last one itself to what it loads.
        own = {"normalize_gradients": normalize_gradients, "differentiable": False}
        super().__init__(params, {**defaults, **own})
        self.param_groups[0].update(dict.fromkeys(_COUNTERS, 0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved by an earlier release
            if "grad_rms_mode" in group:
                group["normalize_gradients"] = group.pop("grad_rms_mode")
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            _choose_fused(group)
        for counter in _COUNTERS:
            self.param_groups[0].setdefault(counter, 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and check its settings; see [`torch.optim.Optimizer`]."""
        super().add_param_group(param_group)
        self._started = False
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        _choose_fused(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; see [`torch.optim.Optimizer`]. What a plain AdamW lacks stays as it is.

        Raises:
            ValueError: if the state is of another kind of optimizer; nothing has been changed then.
        """
        self._started = False
        # Behind the hooks of users, which may match parameters by name.
        hook = self.register_load_state_dict_pre_hook(type(self)._adapted)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What torch is to load in place of a state, whose parameters are matched by position."""
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            return state_dict  # which torch refuses
        groups = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            group = {name: own[name] for name in self.defaults} | saved
            # As the fused kernel wants its step counters beside the parameters.
            group["fused"] = own["fused"] if group["fused"] is None else group["fused"]
            groups.append(group)
            expected = self._state_names(group)
            for number in saved["params"]:
                state = state_dict["state"].get(number)
                if state and not expected <= state.keys():
                    names = ", ".join(sorted(expected))
                    raise ValueError(
                        f"a state with {', '.join(map(str, state))} was passed, expected "
                        f"{names}, as {type(self).__name__} saves them: load it with the optimizer "
                        "(sparsifier) that made it, or go on from the weights alone."
                    )
        return {**state_dict, "param_groups": groups}

    def _state_names(self, group: dict[str, Any]) -> set[str]:
        """What a saved state of a parameter of the group holds at least."""
        return {"step", "exp_avg", "exp_avg_sq"}

    @property
    def steps_taken(self) -> int:
        """Steps taken so far, skipped ones included. Set it to go on within a schedule."""
        return self.param_groups[0]["steps_taken"]

    @steps_taken.setter
    def steps_taken(self, steps: int) -> None:
        self.param_groups[0]["steps_taken"] = steps

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose gradients were not finite."""
        return self.param_groups[0]["skipped_steps"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step; see the class.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            FloatingPointError: at the third step in a row with gradients that are not finite.
            ValueError: before the first step, if parameters are spread over processes in a way that
                this optimizer cannot train.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._started:
            self._check_start()
            self._started = True
        counters = self.param_groups[0]
        counters["steps_taken"] += 1
        for group in self.param_groups:
            group["density"] = self._scheduled_density(group)
        rms = self.grad_rms = self._measure_gradients()
        self.effective_lr = learning_rate(counters)
        if math.isfinite(rms):
            counters["skipped_in_a_row"] = 0
            mode = counters["normalize_gradients"]
            normalize = rms > 0.0 and (mode == "always" or (mode == "clip" and rms > 1.0))
            self._update(1.0 / rms if normalize else 1.0)
        else:
            self._skip_step()
        self._sparsify()
        return loss

    def _check_start(self) -> None:
        """Raise ValueError before the first step if it cannot be taken."""
        for group in self.param_groups:  # whose parameters FSDP may have exchanged for others
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a setting of the group is out of range."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr={group['lr']!r} was passed: Tensor lr must be 1-element.")
        for name in ("lr", "eps", "weight_decay"):
            check(name, group[name], 0.0 <= float(group[name]) < math.inf, "a finite number >= 0")
        holds = all(0.0 <= beta < 1.0 for beta in group["betas"])
        check("betas", group["betas"], holds, "two numbers in [0, 1)")
        minimum, row_dim = group["min_nonzeros"], group["row_dim"]
        check("min_nonzeros", minimum, is_whole(minimum, 0), "a whole number >= 0")
        check("row_dim", row_dim, row_dim in (0, 1), "0 (nn.Linear) or 1 (Conv1D)")
        for name, p in named_parameters(group):
            rule = self._unmet_rule(group, p)
            if rule is not None:
                raise ValueError(
                    f"{name} ({p.dtype}, shape {tuple(p.shape)}) cannot be sparse, expected {rule}:"
                    " leave it out, or put it into a group with sparse=False."
                )

    def _unmet_rule(self, group: dict[str, Any], p: Tensor) -> str | None:
        """What a parameter would have to be for its group; None if it is."""
        if not group["sparse"]:
            return None
        if p.dtype not in INTEGER_VIEW:
            return "float16, bfloat16, float32 or float64"
        if group["row_dim"] == 1 and p.ndim > 2:
            return "a matrix, as row_dim=1 is for those stored as inputs × outputs (Conv1D)"
        return None

    def _scheduled_density(self, group: dict[str, Any]) -> float | None:
        """Share of nonzeros that the current step leaves in a group; None for no such limit."""
        raise NotImplementedError

    def _measure_gradients(self) -> float:
        """Root-mean-square of all gradients."""
        raise NotImplementedError

    def _gradients_of(self, group: dict[str, Any], p: Tensor) -> Iterable[Tensor | None]:
        """All that is known of the gradient of a parameter."""
        return (p.grad,)

    def _update(self, scale: float) -> None:
        """Move the parameters, by gradients multiplied by `scale`."""
        raise NotImplementedError

    def _sparsify(self) -> None:
        """End the step: set to zero what is not to stay."""
        raise NotImplementedError

    def _adamw(self, group: dict[str, Any], scale: float) -> None:
        """AdamW on the parameters of a group as a whole."""
        params = [p for p in group["params"] if p.grad is not None]
        fused = group["fused"]
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=step, **moments)
        states = [self.state[p] for p in params]
        gradients = [local(p.grad) for p in params]
        adamw(
            [local(p) for p in params],
            gradients if scale == 1.0 else [g * scale for g in gradients],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=learning_rate(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _skip_step(self) -> None:
        counters = self.param_groups[0]
        counters["skipped_steps"] += 1
        counters["skipped_in_a_row"] += 1
        step, where = self.steps_taken, self._first_not_finite()
        if counters["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (now at "
                f"step {step}, first in {where}): lower the learning rate, train in float32, or "
                "look for batches without labels."
            )
        logger.warning("Step %d skipped: the gradients were not finite (first in %s).", step, where)

    def _first_not_finite(self) -> str:
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                gradients = self._gradients_of(group, p)
                if any(g is not None and not is_finite(g) for g in gradients):
                    names = group.get("param_names")
                    return names[i] if names else f"parameter {i} of group {number}"
        return "no parameter alone; their squares overflow in sum"


def _choose_fused(group: dict[str, Any]) -> None:
    if group["fused"] is None:
        group["fused"] = all(
            p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"]
        )


def learning_rate(group: dict[str, Any]) -> float:
    """The learning rate of a group in the current step, with its sharkfin factor."""
    density = group["density"]
    factor = sharkfin(density) if group["sharkfin"] and density is not None else 1.0
    return float(group["lr"]) * factor


def named_parameters(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters of a group with what to call them."""
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def refuse_sparse(gradient: Tensor) -> None:
    """Raise RuntimeError if a gradient is a sparse tensor."""
    if gradient.is_sparse:
        raise RuntimeError(
            "a gradient is a sparse tensor, expected dense ones: build embeddings with "
            "sparse=False."
        )
