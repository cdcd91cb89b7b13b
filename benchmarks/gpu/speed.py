"""Training step, forward and generation against the plain code, eager and compiled.

Cases come in the order of their worth; each is guarded, and what does not fit into the time is a
line of the table that says so.
"""

import copy
import functools
import gc
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from hf_circuit_sparsity.commands.console import quiet_libraries
from hf_circuit_sparsity.files import write_json
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

from ..experiment import table
from ..speed.plain import plainly, random_sparse_model
from ..speed.timing import Timing, now, ratio
from ..speed.training_step import TrainingStep
from .sizes import SIZES, compile_mode, stage_arguments, write_section

DENSITY = 1 / 64
NEW_TOKENS, ROUNDS = 32, 5
WARM_UP = {
    False: 1,
    True: 4,
}  # what is compiled is compiled, tried, recorded, and only then replayed
LONGEST_CASE = 60  # seconds; compiling may take longer than all the rest


def main() -> None:
    args = stage_arguments(__doc__).parse_args()
    quiet_libraries()
    deadline = time.monotonic() + SIZES[args.size].speed_seconds
    rows: list[dict[str, object]] = []
    for case in cases(args):
        rows.append(measured(args, *case, deadline))
        print(rows[-1], flush=True)
        # After every case, so that a run that is cut off has a table.
        write_json(args.work / "speed.json", rows)
        size = SIZES[args.size]
        write_section(
            args.work,
            "5-speed",
            f"## Speed against plain code\n\n{size.n_layer} layers, density 1/64, "
            f"{size.speed_batch} × {size.block_size} tokens; {NEW_TOKENS} tokens generated after "
            "as many prompts of 32. ms, median (range). bfloat16 trains float32 weights under "
            'autocast. Compiled: `block.compile(mode="reduce-overhead")` for every block, on both '
            "sides. Plain is `torch.topk` for AbsTopK and the projection, and attention "
            "written out.\n\n" + table(rows),
        )


def cases(args: Any) -> Iterator[tuple[int, str, str, bool]]:
    """Width, dtype, what is measured, and whether compiled."""
    widths = SIZES[args.size].speed_widths
    for dtype, width in itertools.product(("bfloat16", "float32"), widths):
        yield from ((width, dtype, "training step", compiled) for compiled in (False, True))
        yield from ((width, dtype, what, False) for what in ("forward", "generate"))


def measured(
    args: Any, width: int, dtype: str, what: str, compiled: bool, deadline: float
) -> dict[str, object]:
    """One line: both sides in turn, on the same inputs."""
    row: dict[str, object] = {"d_model": width, "dtype": dtype, "what": what}
    row |= {"compiled": "yes" if compiled else "no", "plain": "", "ours": "", "plain / ours": ""}
    row["problem"] = ""
    seconds = min(LONGEST_CASE, deadline - time.monotonic())
    if seconds < 2:
        return {**row, "problem": "no time left"}
    try:
        with alarm(seconds):
            times = {}
            for side in ("plain", "ours"):
                call = prepared(args, width, dtype, what, compiled, side == "plain")
                times[side] = timed(call, args.device, WARM_UP[compiled])
                row[side] = str(times[side])
            row["plain / ours"] = ratio(times["plain"], times["ours"])
    except Exception as error:  # a table with holes is worth more than none
        row["problem"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:150]
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return row


@functools.lru_cache(1)
def base_model(args_size: str, width: int, device: str) -> CircuitGPTForCausalLM:
    """A random sparse model, float32; the last one is kept."""
    config = replace(SIZES[args_size], d_model=width).config(vocab_size=2048)
    return random_sparse_model(config, DENSITY, device)


def prepared(
    args: Any, width: int, dtype: str, what: str, compiled: bool, plain: bool
) -> Callable[[], object]:
    """What is to be timed."""
    model = copy.deepcopy(base_model(args.size, width, args.device))
    shape = (SIZES[args.size].speed_batch, model.config.block_size)
    tokens = torch.randint(2048, shape, device=args.device)
    if compiled:
        for block in model.transformer.h:
            block.compile(dynamic=False, mode=compile_mode(args.device))
    if what == "training step":
        model.config.use_cache = False  # as in a Trainer
        step = TrainingStep(model, tokens, DENSITY, plain, nonzeros=False)
        if dtype == "bfloat16":
            step.around = functools.partial(torch.autocast, args.device, torch.bfloat16)
        return step
    model = model.to(getattr(torch, dtype))

    @torch.no_grad()
    def call() -> object:
        with plainly(model) if plain else nullcontext():
            if what == "forward":
                return model(tokens, use_cache=False).logits
            return model.generate(
                tokens[:, :32], attention_mask=torch.ones_like(tokens[:, :32]),
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

    return call


def timed(call: Callable[[], object], device: str, warm_up: int) -> Timing:
    """Several calls, after some that load or compile kernels."""
    seconds = []
    for _ in range(warm_up + ROUNDS):
        start = now(device)
        call()
        seconds.append(now(device) - start)
    return Timing(tuple(seconds[warm_up:]))


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Within it, a `TimeoutError` is raised when the time is up."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
