"""What `train`, `quickstart` and `bridge` share: data, a training run, its summary."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    default_data_collator,
)

from ..files import write_json
from ..hub_cards.markdown import number
from ..tasks.documents import documents_of
from ..tasks.packing import pack_dataset, spread_sample
from ..tasks.tokenizer import train_tokenizer
from ..trainer.bigram_init import initialize_bigram_table_
from ..trainer.callbacks import InterruptCallback, ProgressTableCallback
from ..trainer.checkpoints import check_whole, last_whole_checkpoint
from ..trainer.sparse_config import SparseTrainingArguments
from ..trainer.sparse_trainer import SparseTrainer
from ..trainer.training_curves import plot_training_curves
from .console import Interrupted, say
from .loading import read_tokenizer

# How torch says that a process has ended which it works with, in a data loader or beside this one.
_ENDED = re.compile(
    "DataLoader worker .*(killed|exited)|Connection (closed|reset) by peer|Broken pipe", re.DOTALL
)
SUMMARY_NAME = "training_summary.json"
# Of a stream: what a tokenizer is trained on, what a bigram table is counted on, and the blocks
# among which the next one is drawn.
TOKENIZER_CHARACTERS = 20_000_000
BIGRAM_TOKENS = 2_000_000
SHUFFLE_BUFFER = 1000


def checkpoint_to_resume(args: SparseTrainingArguments) -> str | bool | None:
    """What `--resume-from-checkpoint` means: a folder, or True for the newest of this run.

    With "auto" a run that has none begins, so that the same command starts and goes on.
    """
    resume = args.resume_from_checkpoint
    if resume not in ("auto", "last", "true", "True", True):
        if resume is not None:
            check_whole(resume)  # before any data is read
        return resume
    newest = newest_if_any(args.output_dir)
    if newest is None and resume != "auto":
        raise ValueError(f"There is no checkpoint in {args.output_dir}; start without resuming.")
    return newest


def newest_if_any(folder: str | os.PathLike) -> Literal[True] | None:
    """What makes a trainer go on from the newest whole checkpoint of its folder, or begin."""
    # The trainer will say what it passes over.
    return True if last_whole_checkpoint(folder, say=lambda line: None) else None


def prepare_data(
    corpus: DatasetDict | IterableDatasetDict,
    block_size: int,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    vocab_size: int = 2048,
    text_column: str = "text",
) -> tuple[PreTrainedTokenizerBase, DatasetDict | IterableDatasetDict]:
    """Load a tokenizer, or train one on the corpus, and pack the corpus into blocks."""
    streaming = isinstance(corpus, IterableDatasetDict)
    learned = ""
    if tokenizer is None:
        documents = documents_of(corpus["train"], text_column, "train split")
        if streaming:
            documents = _beginning(documents, TOKENIZER_CHARACTERS)
            learned = f", learned from its first {TOKENIZER_CHARACTERS:,} characters at most"
        fast = train_tokenizer(documents, vocab_size=vocab_size)
    elif isinstance(tokenizer, str):
        fast = read_tokenizer(tokenizer)
    else:
        fast = tokenizer
    blocks = pack_dataset(corpus, fast, block_size, text_column=text_column)
    if streaming:
        next(iter(blocks["train"]))  # raises if there is none
        say(f"  a stream of documents, in tokens of {len(fast):,} kinds{learned}")
    else:
        tokens = sum(len(split) for split in blocks.values()) * block_size
        documents = sum(len(split) for split in corpus.values())
        say(f"  {documents:,} documents, {tokens:,} tokens of {len(fast):,} kinds")
    return fast, blocks


def _beginning(documents: Iterator[str], characters: int) -> Iterator[str]:
    for text in documents:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def train_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: DatasetDict | IterableDatasetDict,
    args: SparseTrainingArguments,
    *,
    resume_from_checkpoint: str | bool | None = None,
    measure: Callable[[PreTrainedModel], dict[str, str]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    start_at_bigrams: bool = False,
) -> dict[str, Any]:
    """Train one model from its start or from a checkpoint, evaluate it and save it.

    Args:
        model: as it starts.
        tokenizer: saved beside the model.
        blocks: packed text, with the splits `train` and `validation`. A stream is repeated
            without end, and shuffled within a buffer.
        args: of the training; everything is written into its `output_dir`.
        resume_from_checkpoint: folder of a checkpoint; True for the newest of this run.
        measure: called with the model at every log; returns cells for the progress table.
        callbacks: more callbacks for the `Trainer`.
        start_at_bigrams: whether the bigram table starts at the counts of the training blocks, or
            of the first ones of a stream.

    Returns:
        The numbers of `training_summary.json`.

    Raises:
        Interrupted: after Ctrl-C.
    """
    train, held_out = blocks["train"], spread_sample(blocks["validation"], 512)
    block_size = len(held_out[0]["input_ids"])
    streaming = isinstance(train, IterableDataset)
    if start_at_bigrams and resume_from_checkpoint is None:
        counted = spread_sample(train, BIGRAM_TOKENS // block_size) if streaming else train
        initialize_bigram_table_(model, counted)
        if streaming:
            say(f"  the bigram table starts at its first {counted.num_rows * block_size:,} tokens")
    if streaming:
        # Endless, since resuming skips batches of a single epoch.
        train = train.repeat(None).shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
    trainer = SparseTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # many a tokenizer cannot pad, and blocks need none
    )  # fmt: skip
    of_model = None if measure is None else lambda: measure(model)
    figures, log = fit(trainer, block_size, resume_from_checkpoint, of_model, callbacks)
    folder = Path(args.output_dir)
    if args.should_save:
        # Pictures are an extra, and a short run may have logged nothing to draw.
        with suppress(ImportError, ValueError):
            plot_training_curves(folder, folder / "training.png")
    counts = trainer.count_nonzeros()
    done = {
        "parameters": model.num_parameters(),
        "loss": log["eval_loss"],
        "perplexity": log.get("eval_perplexity"),  # there is none where labels are smoothed
        "density": counts["nonzero_fraction"],
        "nonzeros": counts["nonzeros"],
        **figures,
        "model": str(args.output_dir),
    }
    if args.should_save:
        write_json(folder / SUMMARY_NAME, done)
    return done


def fit(
    trainer: SparseTrainer,
    block_size: int,
    resume_from_checkpoint: str | bool | None = None,
    measure: Callable[[], dict[str, str]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[dict[str, Any], dict[str, float]]:
    """Train with a progress table, evaluate and save; Ctrl-C leaves a checkpoint instead.

    Args:
        trainer: of any model that reads tokens.
        block_size: tokens of a row.
        resume_from_checkpoint, callbacks: as for [`train_model`].
        measure: called at every log; returns cells for the progress table.

    Returns:
        The training's `steps` and `tokens`; `tokens_per_second` and `train_seconds` since it began
        or was resumed; and the log of the evaluation.

    Raises:
        Interrupted: after Ctrl-C.
        ChildProcessError: (an `OSError`) a process of a data loader, or of this training, was
            killed.
    """
    args = trainer.args
    tokens_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    )
    ProgressTableCallback.replace_in(trainer, tokens_per_step, measure)
    interrupt = InterruptCallback()
    for callback in (*callbacks, interrupt):
        trainer.add_callback(callback)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except RuntimeError as error:
        if not _ENDED.search(str(error)):
            raise
        raise ChildProcessError(
            f"A process that this training works with has ended ({str(error).splitlines()[0]}), as "
            "when memory runs out: go on from the last checkpoint, with fewer "
            "--dataloader-num-workers or smaller batches."
        ) from error
    finally:
        interrupt.restore()
    seconds, steps = time.perf_counter() - started, trainer.state.global_step
    taken = 0 if interrupt.first_step is None else steps - interrupt.first_step
    if interrupt.interrupted:
        raise Interrupted(f"at step {steps}; the checkpoint is saved", checkpoint=True)
    trainer.evaluate()
    log = trainer.state.log_history[-1]
    trainer.save_model()
    trainer.save_state()
    figures = {
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_second": taken * tokens_per_step / seconds,
        "train_seconds": seconds,
    }
    return figures, log


def training_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary table's rows about training."""
    return [
        ("validation loss", f"{done['loss']:.3f} nats per token"),
        ("perplexity", number(done["perplexity"], ".2f")),
        ("density", f"{done['density']:.4f} of the sparse weights"),
        ("nonzeros", f"{done['nonzeros']:,} of {done['parameters']:,} parameters"),
        ("tokens seen", f"{done['tokens']:,} in {done['steps']:,} steps"),
        *speed_rows(done),
    ]


def speed_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary table's row about speed; none where nothing was left to train."""
    speed = done["tokens_per_second"]
    return [("tokens/s", f"{speed:,.0f}")] if speed else []
