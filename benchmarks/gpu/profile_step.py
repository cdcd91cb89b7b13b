"""Where the time of a training step goes: three steps of the run, under torch's profiler."""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_circuit_sparsity.commands.console import quiet_libraries

from .sizes import stage_arguments
from .train import Run

STEPS, WARM_UP = 3, 24


class Profiled(TrainerCallback):
    """Profiles the steps after the warm-up, and prints what took longest."""

    def __init__(self, device: str) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU]
        self.profile = profile(activities=activities + [ProfilerActivity.CUDA] * (device != "cpu"))
        self.started = 0.0

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self._wait()
            self.started = time.perf_counter()
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP + STEPS:
            self._wait()
            per_step = 1e3 * (time.perf_counter() - self.started) / STEPS
            self.profile.stop()
            print(f"{per_step:.1f} ms per step under the profiler")
            averages = self.profile.key_averages()
            for order in ("self_cpu_time_total", "cuda_time_total")[: 1 + (self.device != "cpu")]:
                print(averages.table(sort_by=order, row_limit=25, max_name_column_width=50))


def main() -> None:
    parser = stage_arguments(__doc__)
    parser.set_defaults(rates=[2e-3], compile=False)
    args = parser.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Run(args).trainer(WARM_UP + STEPS, args.rates[0])
    trainer.add_callback(Profiled(args.device))
    trainer.train()


if __name__ == "__main__":
    main()
