"""A training run of a given time: top-k annealed AdamW from bigram counts, by `SparseTrainer`."""

import argparse
import csv
import gc
import math
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, TrainerCallback, default_data_collator, set_seed

from hf_circuit_sparsity.commands.console import quiet_libraries
from hf_circuit_sparsity.files import replacing, write_json
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.projection import project_topk_, project_topk_reference_
from hf_circuit_sparsity.trainer.bigram_init import initialize_bigram_table_
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer
from hf_circuit_sparsity.trainer.training_curves import plot_training_curves

from ..experiment import machine, table
from .sizes import SIZES, TokenBlocks, compile_mode, stage_arguments, write_section

DENSITY = 1 / 64
LOGS = 50


class Clock(TrainerCallback):
    """Notes when each step ended; stops a training that takes far longer than planned."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self.seconds, self.ends = seconds, [time.perf_counter()]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        if self.ends[-1] - self.ends[0] > self.seconds:
            control.should_training_stop = True

    def seconds_per_step(self) -> float:
        """Mean over the second half, whose kernels are loaded."""
        half = self.ends[len(self.ends) // 2 :]
        return (half[-1] - half[0]) / (len(half) - 1)


class Run:
    """What the trials of learning rates and the run itself have in common."""

    def __init__(self, args: Any) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
        self.train = TokenBlocks(args.data / "train.bin", self.size.block_size)
        self.validation = TokenBlocks(args.data / "validation.bin", self.size.block_size)
        self.bigrams: torch.Tensor | None = None

    def model(self) -> CircuitGPTForCausalLM:
        """A new one, always the same, with the bigram table at the counts of the token file."""
        set_seed(0)
        config = self.size.config(len(self.tokenizer), self.tokenizer.eos_token_id)
        model = CircuitGPTForCausalLM(config)
        if self.bigrams is None:
            initialize_bigram_table_(model, torch.from_numpy(self.train.blocks.astype("int32")))
            self.bigrams = model.bigram_table.detach().clone()
        with torch.no_grad():
            model.bigram_table.copy_(self.bigrams)
        return model

    def bigram_loss(self) -> float:
        """Held-out loss of the bigram table alone, in nats per token."""
        blocks = self.validation.spread(self.size.validation_blocks)
        table = self.bigrams.to(self.args.device)
        losses = [
            F.cross_entropy(table[b[:, :-1]].flatten(0, 1), b[:, 1:].flatten()).item()
            for b in blocks.to(self.args.device).split(32)
        ]
        return statistics.mean(losses)

    def trainer(
        self, steps: int, rate: float, seconds: float = float("inf"), logs: int = 0
    ) -> SparseTrainer:
        """A trainer of so many steps, whose schedules are scaled to them.

        Args:
            steps: of the optimizer.
            rate: learning rate.
            seconds: after which it stops, done or not.
            logs: how many; each counts all nonzeros, which takes longer than a step.
        """
        model = self.model()
        if self.args.compile:
            for block in model.transformer.h:
                block.compile(dynamic=False, mode=compile_mode(self.args.device))
        arguments = SparseTrainingArguments(
            output_dir=str(self.args.work / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=self.size.batch_size,
            per_device_eval_batch_size=self.size.batch_size,
            learning_rate=rate,
            target_density=DENSITY,
            bf16=True,
            use_cpu=self.args.device == "cpu",
            compute_on_nonzeros=False,
            dataloader_drop_last=True,
            logging_strategy="steps" if logs else "no",
            logging_steps=max(1, steps // max(1, logs)),
            logging_nan_inf_filter=False,  # it waits for the device in every step
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        validation = self.validation.spread(self.size.validation_blocks)
        trainer = SparseTrainer(
            model=model,
            args=arguments,
            train_dataset=self.train,
            eval_dataset=[{"input_ids": row, "labels": row} for row in validation],
            data_collator=default_data_collator,
            processing_class=self.tokenizer,
        )
        trainer.clock = Clock(seconds)
        trainer.add_callback(trainer.clock)
        return trainer

    def time_step(self) -> tuple[float, float, float]:
        """Seconds of a step and of a log, and the loss, from a training that is thrown away."""
        timing = self.trainer(self.size.timed_steps, self.args.rates[0])
        loss = timing.train().training_loss
        started = time.perf_counter()
        timing._monitor.measure()
        return timing.clock.seconds_per_step(), time.perf_counter() - started, loss


def main() -> None:
    parser = stage_arguments(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="tried in turn")
    parser.add_argument("--trial-seconds", type=float, default=6, help="for each of several rates")
    parser.add_argument("--seconds", type=float, help="of training; else by the size")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile every block; on CUDA it is done unless it fails",
    )
    quiet_libraries()
    train(parser.parse_args())


@torch.no_grad()
def check_device(device: str) -> None:
    """Hold what computes fast on a device against the plain paths, before time is spent on it."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(512, 1024, device=device).to(dtype)
        fast, plain = (f(x, 256).abs().sort(-1).values for f in (abs_topk, abs_topk_reference))
        assert torch.equal(fast, plain), f"AbsTopK is wrong on {device} in {dtype}"
    for shape, minimum in (((3072, 1024), 4), ((1024, 4096), 4), ((2048, 1024), 0), ((4096,), 0)):
        fast = torch.randn(shape, device=device)
        plain = fast.clone()
        project_topk_(fast, fast.numel() // 64, minimum)
        project_topk_reference_(plain, plain.numel() // 64, minimum)
        assert torch.equal(fast, plain), f"the projection of {shape} is wrong on {device}"


def train(args: Any) -> None:
    """Time a step, try the learning rates if there are several, train, save, report."""
    check_device(args.device)
    run, seconds = Run(args), args.seconds or SIZES[args.size].train_seconds
    wanted = args.device == "cuda" if args.compile is None else args.compile
    args.compile = False
    per_step, per_log, loss = run.time_step()
    eager_step = per_step
    if wanted:
        try:
            args.compile = True
            per_step, per_log, compiled_loss = run.time_step()
            print(f"Loss of the same steps: {loss:.4f}, compiled {compiled_loss:.4f}", flush=True)
            if not math.isclose(loss, compiled_loss, rel_tol=0.005):
                raise ArithmeticError(f"compiled, {loss:.4f} became {compiled_loss:.4f}")
        except Exception as error:
            print(f"Compiling failed, so blocks run as they are: {error!r:.2000}", flush=True)
            args.compile, per_step = False, eager_step
    print(f"{1e3 * eager_step:.1f} ms per step as it is")
    print(f"{1e3 * per_step:.1f} ms per step, {1e3 * per_log:.0f} ms per log", flush=True)
    rate, trials = args.rates[0], []
    for tried in args.rates if len(args.rates) > 1 else []:
        steps = max(8, int(args.trial_seconds / per_step))
        trainer = run.trainer(steps, tried, 2 * args.trial_seconds)
        trainer.train()
        trials.append({"learning rate": tried, "steps": steps, "held-out loss": held_out(trainer)})
        print(trials[-1], flush=True)
        del trainer
        gc.collect()  # a trainer and its parts hold each other
    if trials:
        write_section(args.work, "2-rates", "## Learning rates tried\n\n" + table(trials))
        rate = min(trials, key=lambda trial: trial["held-out loss"])["learning rate"]

    logs = min(LOGS, int(0.05 * seconds / per_log) + 1)
    steps = max(8, int((0.97 * seconds - logs * per_log) / per_step))
    trainer = run.trainer(steps, rate, 1.04 * seconds, logs)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model = trainer.accelerator.unwrap_model(trainer.model).cpu()
    model.save_pretrained(args.work / "model", sparse=True)
    run.tokenizer.save_pretrained(args.work / "model")
    model.to(args.device)
    report(args.work, run, trainer, rate, seconds, per_step, eager_step)


def held_out(trainer: SparseTrainer) -> float:
    """Loss on the validation packages, nats per token."""
    with torch.compiler.set_stance("force_eager"):  # the graphs are for training
        return round(trainer.evaluate()["eval_loss"], 4)


def report(
    work: Path,
    run: Run,
    trainer: SparseTrainer,
    rate: float,
    seconds: float,
    per_step: float,
    eager_step: float,
) -> None:
    """Write the curves and the section on training."""
    size, state = run.size, trainer.state
    trainer.save_state()
    logs = [log for log in state.log_history if "loss" in log]
    columns = ["step", "loss", "nonzero_fraction", "nonzeros", "mask_churn", "effective_lr"]
    with replacing(work / "loss.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(logs)
    with suppress(ImportError):
        plot_training_curves(work / "trainer", work / "loss.png", width=5)
    done, tokens = state.global_step, state.global_step * size.batch_size * size.block_size
    row = {
        "steps": f"{done} of {state.max_steps}",
        "tokens": f"{tokens:,}",
        "passes over the data": f"{done * size.batch_size / len(run.train):.2f}",
        "seconds": round(seconds, 1),
        "tokens/s": f"{tokens / seconds:,.0f}",
        "learning rate": rate,
        "held-out loss": held_out(trainer),
        "bigram table alone": round(run.bigram_loss(), 4),
        "density": round(logs[-1]["nonzero_fraction"], 5),
        "nonzeros": f"{logs[-1]['nonzeros']:,}",
    }
    memory = f"; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" * torch.cuda.is_available()
    write_json(work / "training.json", {**row, "log": logs})
    write_section(
        work,
        "1-training",
        f"# Run on {machine(run.args.device)}\n\n## Training\n\nCircuitGPT, d_model "
        f"{size.d_model}, {size.n_layer} layers, context {size.block_size}, {size.batch_size} "
        f"sequences per step, blocks {'' if run.args.compile else 'not '}compiled; "
        f"{1e3 * per_step:.1f} ms per step when timed, {1e3 * eager_step:.1f} if not "
        f"compiled{memory}. The held-out packages share no file with the training ones.\n\n"
        f"{table([row])}\n\n![Loss and density](loss.png)",
    )


if __name__ == "__main__":
    main()
