"""`hf-circuit-sparsity train`: train a CircuitGPT on a folder of Python."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset
from ..tasks.tokenizer import train_tokenizer
from ..trainer.bigram_init import initialize_bigram_table_
from ..trainer.callbacks import InterruptCallback
from ..trainer.sparse_config import SparseTrainingArguments
from ..trainer.sparse_trainer import SparseTrainer
from ..trainer.training_curves import plot_training_curves
from .console import TrainingDisplay, quiet_libraries, say, table


@dataclass
class ModelArguments:
    """The architecture, where it is not the paper's."""

    d_model: int = field(default=256, metadata={"help": "Width of the residual stream."})
    n_layer: int = field(default=4, metadata={"help": "Transformer blocks."})
    d_head: int = field(default=16, metadata={"help": "Width of an attention head."})
    d_mlp: int | None = field(default=None, metadata={"help": "Neurons; 4 * d_model if not given."})
    block_size: int = field(default=128, metadata={"help": "Context, in tokens."})
    afrac: float | None = field(
        default=0.25, metadata={"help": "Share of activations AbsTopK keeps."}
    )


@dataclass
class DataArguments:
    """What to train on."""

    corpus: str | None = field(
        default=None,
        metadata={"help": "Folder of Python files; the standard library if not given."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a tokenizer; one is trained if not given."},
    )
    vocab_size: int = field(default=2048, metadata={"help": "Entries of a trained tokenizer."})


class Interrupted(Exception):
    """Ctrl-C came; a checkpoint was saved."""


def run_train(
    model_arguments: ModelArguments, data: DataArguments, args: SparseTrainingArguments
) -> dict[str, Any]:
    """Train, evaluate and save model and tokenizer into `args.output_dir`.

    Returns:
        The numbers of the summary.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint to resume from in `args.output_dir`.
    """
    quiet_libraries()
    # One tokenizer for one model is decided by the corpus; a bad corpus ends here.
    corpus = build_corpus(data.corpus)
    resume = checkpoint_to_resume(args)
    tokenizer, blocks = prepare_data(
        corpus, model_arguments.block_size, data.tokenizer, data.vocab_size
    )
    set_seed(args.seed)
    config = CircuitGPTConfig(
        **vars(model_arguments), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    return train_model(config, tokenizer, blocks, args, resume_from_checkpoint=resume)


def checkpoint_to_resume(args: SparseTrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint` means, where "last" is the run's last one."""
    resume = args.resume_from_checkpoint
    if resume in ("last", "true", "True", True):
        output = Path(args.output_dir)
        resume = get_last_checkpoint(args.output_dir) if output.is_dir() else None
        if resume is None:
            raise ValueError(f"There is no checkpoint in {output}; start without resuming.")
    return resume


def prepare_data(
    corpus: DatasetDict, block_size: int, tokenizer: str | None = None, vocab_size: int = 2048
) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """The tokenizer, trained on the corpus unless one is named, and the corpus in blocks."""
    if tokenizer is None:
        fast = train_tokenizer(corpus["train"], vocab_size=vocab_size)
    else:
        fast = AutoTokenizer.from_pretrained(tokenizer)
    blocks = DatasetDict(
        {name: pack_dataset(split, fast, block_size) for name, split in corpus.items()}
    )
    tokens = sum(len(split) for split in blocks.values()) * block_size
    files = sum(len(split) for split in corpus.values())
    say(f"  {files:,} files, {tokens:,} tokens of {len(fast):,} kinds")
    return fast, blocks


def train_model(
    config: CircuitGPTConfig,
    tokenizer: PreTrainedTokenizerBase,
    blocks: DatasetDict,
    args: SparseTrainingArguments,
    *,
    resume_from_checkpoint: str | None = None,
    measure: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    start_at_bigrams: bool = False,
) -> dict[str, Any]:
    """Train one model from scratch or from a checkpoint, evaluate it and save it.

    Args:
        start_at_bigrams: whether the bigram table begins at the counts of the training blocks.
        measure: called with the model at every log; returns cells for the progress lines.
        callbacks: more callbacks for the Trainer.

    Returns:
        Loss, perplexity, density, nonzeros, tokens per second, and where the model is.
    """
    model = CircuitGPTForCausalLM(config)
    if start_at_bigrams and resume_from_checkpoint is None:
        initialize_bigram_table_(model, torch.tensor(blocks["train"]["input_ids"]))
    trainer = SparseTrainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=spread_sample(blocks["validation"], 512),
        processing_class=tokenizer,
    )
    tokens_per_step, seconds = fit(
        trainer,
        config.block_size,
        resume_from_checkpoint,
        None if measure is None else lambda: measure(model),
        callbacks,
    )
    steps = trainer.state.global_step
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    picture = Path(args.output_dir) / "training.png"
    # Pictures are an extra, and a short run may have logged nothing to draw.
    with suppress(ImportError, ValueError):
        plot_training_curves(args.output_dir, picture)
    last = next((log for log in reversed(trainer.state.log_history) if "nonzeros" in log), {})
    done = {
        "parameters": model.num_parameters(),
        "loss": metrics["eval_loss"],
        "perplexity": metrics["eval_perplexity"],
        "density": last.get("nonzero_fraction", 1.0),
        "nonzeros": last.get("nonzeros", model.num_parameters()),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "train_seconds": seconds,
        "model": str(args.output_dir),
    }
    write_json(Path(args.output_dir) / "training_summary.json", done)
    return done


def fit(
    trainer: SparseTrainer,
    block_size: int,
    resume_from_checkpoint: str | None = None,
    measure: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[int, float]:
    """Train with the commands' own display, stopping after a step and a checkpoint on Ctrl-C.

    Returns:
        Tokens per step, and the seconds it took.

    Raises:
        Interrupted: Ctrl-C came.
    """
    args = trainer.args
    tokens_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    )
    TrainingDisplay.attach(trainer, tokens_per_step, measure)
    interrupt = InterruptCallback()
    for callback in (*callbacks, interrupt):
        trainer.add_callback(callback)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        raise Interrupted(f"stopped at step {trainer.state.global_step}")
    return tokens_per_step, time.perf_counter() - started


def training_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary table's rows about training."""
    return [
        ("validation loss", f"{done['loss']:.3f} nats per token"),
        ("perplexity", f"{done['perplexity']:.2f}"),
        ("density", f"{done['density']:.4f} of the sparse weights"),
        ("nonzeros", f"{done['nonzeros']:,} of {done['parameters']:,} parameters"),
        ("tokens seen", f"{done['tokens']:,} in {done['steps']:,} steps"),
        ("tokens/s", f"{done['tokens'] / done['train_seconds']:,.0f}"),
    ]


def print_train_summary(done: dict[str, Any]) -> None:
    """What `hf-circuit-sparsity train` prints at its end."""
    say("\n" + table([*training_rows(done), ("model", done["model"])]))
    say(f"\nNext: hf-circuit-sparsity prune {done['model']} --task single_double_quote")


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its place and move it there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def spread_sample(split: Dataset, most: int) -> Dataset:
    """Rows spread evenly over the split: neighbouring blocks come from the same file."""
    step = max(1, len(split) // most)
    return split.select(range(0, len(split), step))
