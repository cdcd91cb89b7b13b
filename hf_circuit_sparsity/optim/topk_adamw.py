"""AdamW that keeps every weight matrix sparse."""

import math
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .projection import nonzero_budget, project_topk_each_
from .schedules import check_linear_density, linear_density
from .sharding import check_ranks_agree, check_sharding, local, norms_over_ranks, shard_group
from .sparse_optimizer import Normalization, SparseOptimizer, named_parameters, refuse_sparse

# Settings of groups which ranks that hold parts of one matrix, or copies of it, have to share.
_AGREED = (
    "target_density", "total_steps", "anneal_start", "anneal_end", "min_nonzeros", "sparse",
    "row_dim",
)  # fmt: skip


class TopKAdamW(SparseOptimizer):
    """AdamW whose `step()` ends with a magnitude projection of the sparse parameters.

    One step, in this order (Gao et al. 2025, section 2):

    1. The gradients are brought to a root-mean-square of 1 over all entries of all groups together.
    2. AdamW with decoupled weight decay, at the learning rate times `1 / sqrt(density)`
       ("sharkfin").
    3. Each parameter of a group with `sparse=True` keeps its `density` share of largest entries,
       never fewer than `min_nonzeros` per row; see [`project_topk_`].

    `density` follows [`linear_density`], counted in steps of this optimizer. A step whose
    gradients are not finite changes no weight but for the projection. It still counts, so that the
    schedule keeps its pace; the third in a row raises.

    Parameters may be `DTensor`s sharded on dimension 0, as `fully_shard` (FSDP2) makes them: the
    budget and the normalization are of the whole matrices, and the same entries are kept as in one
    process. All ranks have to take each step together.

    All arguments below except `params` and `normalize_gradients` can be set per group. In a plain
    list of parameters all are sparse: [`sparse_param_groups`] leaves norms alone. The state,
    schedule and step count included, is in `state_dict()`; as with every torch optimizer, loading
    one replaces the settings of the groups by the stored ones.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: learning rate before the sharkfin factor.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment. Far larger than usual because the
            gradients have a root-mean-square of 1.
        weight_decay: decoupled weight decay.
        target_density: kept fraction of each sparse parameter at the end, in (0, 1].
        total_steps: number of steps of the whole run; needed unless `target_density` is 1 or
            `anneal_end` is 0.
        anneal_start, anneal_end: where the density leaves 1 and where it reaches the target, as
            fractions of `total_steps`.
        min_nonzeros: entries that each row of a matrix keeps in any case; vectors have no rows.
        sparse: whether to project; False leaves the parameters dense.
        row_dim: dimension of the weights that counts output neurons: 0 for `nn.Linear`, 1 for
            `Conv1D`.
        sharkfin: whether to multiply the learning rate by `1 / sqrt(density)`.
        normalize_gradients: see [`SparseOptimizer`]. Gradients are scaled in place.
        fused: torch's fused kernel; None uses it where it exists (CPU and CUDA).

    Raises:
        ValueError: if a setting is out of range or `total_steps` is missing; from the first
            `step()`, if sharded parameters are offloaded or not sharded on dimension 0, rows that
            have a minimum are cut, or ranks disagree on the density schedule.
        FloatingPointError: from `step()`, at the third step in a row with gradients that are not
            finite.
    """

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
        normalize_gradients: Normalization = "always",
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "target_density": target_density, "total_steps": total_steps,
            "anneal_start": anneal_start, "anneal_end": anneal_end, "min_nonzeros": min_nonzeros,
            "sparse": sparse, "row_dim": row_dim, "sharkfin": sharkfin, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, normalize_gradients)

    @property
    def density(self) -> float:
        """Kept fraction that the first group's schedule set at the last step."""
        return self._scheduled_density(self.param_groups[0])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_linear_density(
            group["target_density"], group["anneal_start"], group["anneal_end"],
            group["total_steps"],
        )  # fmt: skip
        if group.get("nonzeros"):
            raise ValueError(
                "a group holds layers' nonzeros alone, but top-k needs the whole matrices, as any "
                "entry may come back: call to_dense() on the model, or use RCDSparseOptimizer."
            )
        for name, p in named_parameters(group):
            minimum = group["min_nonzeros"] if p.ndim > 1 else 0
            check_sharding(name, p, group["sparse"], minimum, group["row_dim"])

    def _check_start(self) -> None:
        super()._check_start()
        every = [p for group in self.param_groups for p in group["params"]]
        together = {group: p for p in every if (group := shard_group(p)) is not None}
        for process_group, p in together.items():
            check_ranks_agree(self.shared_settings(), process_group, local(p).device)

    def shared_settings(self) -> dict[str, Any]:
        """What has to be the same on ranks that train one model, by name."""
        return {"steps_taken": self.steps_taken} | {
            name: [group[name] for group in self.param_groups] for name in _AGREED
        }

    def _scheduled_density(self, group: dict[str, Any]) -> float:
        return linear_density(
            self.steps_taken,
            group["target_density"],
            group["anneal_start"],
            group["anneal_end"],
            group["total_steps"] or 1,  # where it may be missing its value does not matter
        )

    def _measure_gradients(self) -> float:
        gradients = self._gradients()
        if not gradients:
            return 0.0
        for gradient in gradients:
            refuse_sparse(gradient)
        # In float32 at least: a sum of squares of half-precision numbers loses digits or overflows.
        by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for g in gradients:
            by_kind.setdefault((g.device, g.dtype), []).append(g)
        norms = []
        for (_, dtype), alike in by_kind.items():
            dtype = torch.promote_types(dtype, torch.float32)
            own = torch._foreach_norm([local(g) for g in alike], dtype=dtype)
            norms += norms_over_ranks(alike, own)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        return norm.item() / math.sqrt(max(1, sum(g.numel() for g in gradients)))

    def _update(self, scale: float) -> None:
        gradients = [local(g) for g in self._gradients()]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        for group in self.param_groups:
            self._adamw(group, 1.0)

    def _sparsify(self) -> None:
        cases = [
            (
                p,
                nonzero_budget(p.numel(), group["density"]),
                group["min_nonzeros"] if p.ndim > 1 else 0,
                group["row_dim"],
            )
            for group in self.param_groups
            if group["sparse"] and group["density"] < 1.0
            for p in group["params"]
        ]
        if cases:
            project_topk_each_(*zip(*cases, strict=True))

    def _gradients(self) -> list[torch.Tensor]:
        every = [p.grad for group in self.param_groups for p in group["params"]]
        return [gradient for gradient in every if gradient is not None]
