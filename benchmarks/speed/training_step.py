"""A training step: dense and on the nonzeros, against the plain implementation."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch

from hf_circuit_sparsity.kernels.cpu import without_kernels
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.projection import nonzero_budget
from hf_circuit_sparsity.optim.sparse_compute import on_nonzeros
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW

from ..experiment import Experiment, table
from .plain import plainly, project_plain_, random_sparse_model
from .timing import Timing, interleaved, main, now, ratio, settings

PARTS = ("forward", "backward", "AdamW", "projection")


class TrainingStep:
    """One step of training, with the time each part takes."""

    def __init__(
        self,
        model: CircuitGPTForCausalLM,
        batch: torch.Tensor,
        density: float,
        plain: bool = False,
        nonzeros: bool = True,
        kernels: bool = True,
    ):
        self.around = nullcontext if kernels else without_kernels
        self.model, self.batch = model.train(), batch
        self.density, self.plain, self.nonzeros = density, plain, nonzeros
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
        groups = sparse_param_groups(model)
        if plain:
            self.sparse = [(p, g["min_nonzeros"]) for g in groups for _, p in g["params"]
                           if g["sparse"]]  # fmt: skip
            decay = [
                {"params": [p for _, p in g["params"]], "weight_decay": g["weight_decay"]}
                for g in groups
            ]
            self.optimizer = torch.optim.AdamW(decay, lr=1e-5, betas=(0.9, 0.95), eps=0.1)
        else:
            self.optimizer = TopKAdamW(
                groups, lr=1e-5, target_density=density, anneal_start=0.0, anneal_end=0.0
            )

    def __call__(self) -> None:
        with self.around():
            self._step()

    def _step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # where it is compiled
        self.model.zero_grad(set_to_none=True)
        plain = plainly(self.model) if self.plain else nullcontext()
        with plain, on_nonzeros(self.model) if self.nonzeros else nullcontext():
            loss = self._timed("forward", lambda: self.model(self.batch, labels=self.batch).loss)
            self._timed("backward", loss.backward)
        if not self.plain:
            self._timed("AdamW", self.optimizer.step)  # the projection is part of it
            return
        self._timed("AdamW", self._plain_adamw)
        self._timed("projection", self._plain_projection)

    def _plain_adamw(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        squares = sum(float(g.pow(2).sum()) for g in grads)
        rms = (squares / sum(g.numel() for g in grads)) ** 0.5
        for grad in grads:
            grad.div_(rms)
        self.optimizer.step()

    def _plain_projection(self) -> None:
        if self.density < 1:
            for weight, minimum in self.sparse:
                minimum = minimum if weight.dim() > 1 else 0
                project_plain_(weight, nonzero_budget(weight.numel(), self.density), minimum)

    def _timed(self, part: str, call: Callable[[], object]) -> object:
        start = now(self.batch.device.type)
        result = call()
        self.parts[part].append(now(self.batch.device.type) - start)
        return result

    def shares(self) -> str:
        medians = {part: Timing(tuple(s[1:])).median for part, s in self.parts.items() if s[1:]}
        total = sum(medians.values())
        return ", ".join(f"{part} {100 * m / total:.0f} %" for part, m in medians.items())


def run(experiment: Experiment) -> str:
    """The table."""
    device, dtype, quick = settings(experiment)
    width, layers, context, batch = (128, 2, 64, 4) if quick else (1024, 4, 128, 16)
    config = CircuitGPTConfig(
        n_layer=layers, d_model=width, d_head=16, block_size=context, vocab_size=2048
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, context), generator=generator).to(device)
    rows = []
    for density, label in ((0.5, "1/2 (annealing)"), (1 / 64, "1/64")):
        model = random_sparse_model(config, density, device, dtype)
        sides = {
            "plain": TrainingStep(
                copy.deepcopy(model), tokens, density, plain=True, nonzeros=False
            ),
            "ours, every product dense": TrainingStep(
                copy.deepcopy(model), tokens, density, nonzeros=False
            ),
            "ours": TrainingStep(copy.deepcopy(model), tokens, density),
            "ours without kernels": TrainingStep(
                copy.deepcopy(model), tokens, density, kernels=False
            ),
        }
        times = interleaved(sides, rounds=3, device=device)
        for name, step in sides.items():
            rows.append(
                {
                    "density": label,
                    "implementation": name,
                    "ms": times[name],
                    "plain / this": ratio(times["plain"], times[name]),
                    "of which": step.shares(),
                }
            )
    return (
        f"d_model {width}, {layers} layers, {batch} × {context} tokens, {dtype}; ms per step, "
        f"median (range). In ours the projection is part of AdamW's time.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main(run, __doc__, "training_step")
