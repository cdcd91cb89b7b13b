"""AdamW that keeps every weight matrix sparse."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from .projection import nonzero_budget, project_topk_
from .schedules import DensitySchedule, sharkfin
from .skipped_steps import COUNTERS, count_skipped_step

GRAD_RMS_MODES = ("always", "clip", "off")


class TopKAdamW(torch.optim.AdamW):
    """AdamW whose ``step()`` ends with a magnitude projection of the sparse parameters.

    One step, in this order (Gao et al. 2025, section 2):

    1. The gradients are brought to a root-mean-square of 1 over all entries of all groups together.
    2. AdamW with decoupled weight decay, at the learning rate times ``1 / sqrt(density)``
       ("sharkfin").
    3. Each parameter of a group with ``sparse=True`` keeps its ``density`` share of largest
       entries, never fewer than ``min_nonzeros`` per row; see :func:`project_topk_`.

    ``density`` follows :class:`DensitySchedule`, counted in steps of this optimizer. A step whose
    gradients are not finite changes no weight but for the projection, and still counts, so that the
    schedule keeps its pace; the third in a row raises.

    All arguments below except ``params`` and ``grad_rms`` can be set per group. In a plain list of
    parameters all are sparse: use :func:`sparse_param_groups` to have norms left alone. The state,
    schedule and step count included, is in ``state_dict()``; as with every torch optimizer, loading
    one replaces the settings of the groups by the stored ones.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: learning rate before the sharkfin factor.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment. Far larger than usual because the
            gradients have a root-mean-square of 1.
        weight_decay: decoupled weight decay.
        target_density: kept fraction of each sparse parameter at the end, in (0, 1].
        total_steps: number of steps of the whole run; needed unless ``target_density`` is 1 or
            ``anneal_end`` is 0.
        anneal_start, anneal_end: where the density leaves 1 and where it reaches the target, as
            fractions of ``total_steps``.
        min_nonzeros: entries that each row of a matrix keeps in any case; vectors have no rows.
        sparse: whether to project; False leaves the parameters dense.
        row_dim: dimension of the weights that counts output neurons: 0 for ``nn.Linear``, 1 for
            ``Conv1D``.
        sharkfin: whether to multiply the learning rate by ``1 / sqrt(density)``.
        grad_rms: "always" brings the root-mean-square of the gradients to 1, "clip" only where it
            is above 1, "off" leaves the gradients alone. The gradients are scaled in place.
        fused: torch's fused kernel; None uses it where it exists (CPU and CUDA).

    Attributes:
        grad_rms: root-mean-square of the gradients of the last step, before scaling; None before
            the first step.
        effective_lr: learning rate of the first group in the last step, sharkfin included.

    Raises:
        ValueError: if a setting is out of range or ``total_steps`` is missing.
        FloatingPointError: from ``step()``, at the third step in a row with gradients that are not
            finite.
    """

    # On the class, so that they also exist on a copy, for which torch calls no __init__.
    grad_rms: float | None = None
    effective_lr: float | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 0.1,
        weight_decay: float = 0.1,
        *,
        target_density: float = 1 / 64,
        total_steps: int | None = None,
        anneal_start: float = 0.01,
        anneal_end: float = 0.5,
        min_nonzeros: int = 4,
        sparse: bool = True,
        row_dim: int = 0,
        sharkfin: bool = True,
        grad_rms: Literal["always", "clip", "off"] = "always",
        fused: bool | None = None,
    ) -> None:
        if grad_rms not in GRAD_RMS_MODES:
            raise ValueError(
                f"grad_rms={grad_rms!r} is unknown: expected one of {', '.join(GRAD_RMS_MODES)}."
            )
        # AdamW fills the groups in from its own defaults only, and add_param_group runs within its
        # __init__: ours wait here.
        self._own_defaults = {
            "target_density": target_density,
            "total_steps": total_steps,
            "anneal_start": anneal_start,
            "anneal_end": anneal_end,
            "min_nonzeros": min_nonzeros,
            "sparse": sparse,
            "row_dim": row_dim,
            "sharkfin": sharkfin,
            "grad_rms_mode": grad_rms,
        }
        super().__init__(params, lr, betas, eps, weight_decay, fused=False)
        self.defaults.update(self.__dict__.pop("_own_defaults"))
        if fused is None:
            fused = all(
                p.device.type in ("cpu", "cuda") and p.is_floating_point()
                for group in self.param_groups
                for p in group["params"]
            )
        self.defaults["fused"] = fused
        for group in self.param_groups:
            group["fused"] = fused
        # Counters live in the first group because groups are what torch saves, loads and copies.
        self.param_groups[0].update(dict.fromkeys(COUNTERS, 0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state saved by a plain AdamW lacks ours
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        for counter in COUNTERS:
            self.param_groups[0].setdefault(counter, 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checking its settings first; see :class:`torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            ours = self.__dict__.get("_own_defaults", {})
            for name, default in ours.items():
                param_group.setdefault(name, default)
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

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
        """Kept fraction that the first group's schedule set at the last step."""
        return self._density(self.param_groups[0])

    def _density(self, group: dict[str, Any]) -> float:
        return _schedule(group).density(self.steps_taken)

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
        counters = self.param_groups[0]
        counters["steps_taken"] += 1
        if self._normalize_gradients():
            counters["skipped_in_a_row"] = 0
            self._adamw_step()
        else:
            count_skipped_step(counters, self._first_not_finite())
        for group in self.param_groups:
            density = self._density(group)
            if group["sparse"] and density < 1.0:
                for p in group["params"]:
                    minimum = group["min_nonzeros"] if p.ndim > 1 else 0
                    budget = nonzero_budget(p.numel(), density)
                    project_topk_(p, budget, minimum, group["row_dim"])
        return loss

    def _normalize_gradients(self) -> bool:
        """Scale all gradients to a common root-mean-square of 1; False if they are not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        gradients = [g for g in gradients if g is not None]
        if not gradients:
            return True
        if any(g.is_sparse for g in gradients):
            raise RuntimeError(
                "a gradient is a sparse tensor, expected dense ones: build embeddings with "
                "sparse=False."
            )
        # In float32 at least: a sum of squares of half-precision numbers loses digits or overflows.
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
            for g in gradients
        ]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        rms = norm.item() / math.sqrt(sum(g.numel() for g in gradients))
        self.grad_rms = rms
        if not math.isfinite(rms):
            return False
        mode = self.param_groups[0]["grad_rms_mode"]
        if rms > 0.0 and (mode == "always" or (mode == "clip" and rms > 1.0)):
            torch._foreach_mul_(gradients, 1.0 / rms)
        return True

    def _adamw_step(self) -> None:
        scheduled = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                if group["sharkfin"]:
                    group["lr"] = group["lr"] * sharkfin(self._density(group))
            self.effective_lr = float(self.param_groups[0]["lr"])
            _unhooked(torch.optim.AdamW.step)(self)
        finally:
            for group, lr in zip(self.param_groups, scheduled, strict=True):
                group["lr"] = lr  # schedulers read it

    def _first_not_finite(self) -> str:
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and not p.grad.isfinite().all():
                    names = group.get("param_names")
                    return names[i] if names else f"parameter {i} of group {number}"
        return "no parameter alone; their squares overflow in sum"


def _schedule(group: dict[str, Any]) -> DensitySchedule:
    return DensitySchedule(
        target_density=group["target_density"],
        anneal_start=group["anneal_start"],
        anneal_end=group["anneal_end"],
        # Where it may be missing (see _check_group) its value does not matter.
        total_steps=1 if group["total_steps"] is None else group["total_steps"],
    )


def _check_group(group: dict[str, Any]) -> None:
    _schedule(group)
    if group.get("nonzeros"):
        raise ValueError(
            "a group holds layers' nonzeros alone, but top-k needs the whole matrices, as any "
            "entry may come back: call to_dense() on the model, or use RCDSparseOptimizer."
        )
    needs_steps = group["target_density"] < 1.0 and group["anneal_end"] > 0.0
    if needs_steps and group["total_steps"] is None:
        raise ValueError(
            f"total_steps is missing, but the density is to fall to {group['target_density']} by "
            f"{group['anneal_end']} of it: pass the number of optimizer steps of the run, or "
            "anneal_start=0 and anneal_end=0 to be sparse from the first step."
        )
    minimum, row_dim = group["min_nonzeros"], group["row_dim"]
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise ValueError(f"min_nonzeros={minimum!r} is not a whole number >= 0.")
    if row_dim not in (0, 1):
        raise ValueError(f"row_dim={row_dim!r} is neither 0 (nn.Linear) nor 1 (Conv1D).")


def _unhooked(step: Callable) -> Callable:
    """``step`` without the wrapper torch puts around it to run step hooks.

    Once any AdamW has been created, torch has wrapped ``AdamW.step`` as it wraps ours: calling it
    from ours as it is would run this optimizer's hooks twice.
    """
    return step.__wrapped__ if getattr(step, "hooked", False) else step
