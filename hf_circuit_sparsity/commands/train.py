"""`hf-circuit-sparsity train`: train a CircuitGPT, or make a pretrained model sparse."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from datasets import DatasetDict, IterableDatasetDict
from transformers import set_seed

from ..files import check_can_write
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..tasks.documents import load_documents
from ..trainer.sparse_config import SparseTrainingArguments, with_help
from .console import quiet_libraries, say, table
from .loading import read_corpus, tokenizer_at
from .pretrained import load_pretrained
from .training import checkpoint_to_resume, prepare_data, train_model, training_rows


@dataclass
class ModelArguments:
    """The architecture, where it is not the paper's, or a model that is there already."""

    model: str | None = None
    """Folder, Hub id or GGUF file of a pretrained model to make sparse, of any architecture."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layer: int = 4
    """Transformer blocks."""
    d_head: int = 16
    """Width of an attention head."""
    d_mlp: int | None = None
    """Neurons; 4 * d_model if not given."""
    block_size: int = 128
    """Context, in tokens."""
    afrac: float | None = 0.25
    """Share of activations AbsTopK keeps."""

    def check_pretrained(self) -> None:
        """Raise ValueError if the architecture of a model that is there was given."""
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if field.name not in ("model", "block_size")
            and getattr(self, field.name) != field.default
        ]
        if given:
            raise ValueError(
                f"{', '.join(given)} belongs to a new model, but --model {self.model} has its own "
                "architecture: leave it out."
            )


@with_help
@dataclass
class PretrainedTrainingArguments(SparseTrainingArguments):
    """[`SparseTrainingArguments`] with other defaults, for a model that has learned already.

    Args:
        learning_rate (`float`, defaults to 3e-4): peak learning rate, before the sharkfin factor.
    """

    learning_rate: float = 3e-4


@dataclass
class DataArguments:
    """What to train on."""

    corpus: str | None = None
    """Folder of Python files; the standard library if neither it nor dataset is given."""
    dataset: str | None = None
    """Dataset with a column of text: user/name on the Hub, a folder, or a file."""
    dataset_config: str | None = None
    """Configuration of a dataset that has several."""
    dataset_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to evaluate on; the first documents are held out if not given."""
    validation_documents: int = 1000
    """Documents to hold out, though at most one in twenty without streaming."""
    text_column: str = "text"
    """Column of the documents."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What a document of a text file is."""
    streaming: bool = False
    """Read the dataset while training, and keep it neither in memory nor on disk."""
    bigram_start: bool = False
    """Whether the bigram table starts at counts of the text; of a stream, of its beginning."""
    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer; one is trained if not given."""
    vocab_size: int = 2048
    """Entries of a trained tokenizer."""

    def read(self, max_steps: int) -> DatasetDict | IterableDatasetDict:
        """The documents of `train` and `validation`.

        Raises:
            ValueError, OSError: they cannot be read, options contradict each other, or a stream is
                to be trained on without `max_steps`.
        """
        if self.corpus is not None and self.dataset is not None:
            raise ValueError("--corpus and --dataset were both passed: pass the one to train on.")
        if self.streaming and self.dataset is None:
            raise ValueError("--streaming was passed without --dataset: say what to stream.")
        if self.streaming and max_steps <= 0:
            raise ValueError(
                "--streaming was passed without --max-steps: a stream has no end that is known, so "
                "say how many steps to take."
            )
        if self.dataset is None:
            return read_corpus(self.corpus)
        return load_documents(
            self.dataset, config=self.dataset_config, split=self.dataset_split,
            validation_split=self.validation_split, streaming=self.streaming,
            validation_documents=self.validation_documents, sample_by=self.sample_by,
        )  # fmt: skip


def run_train(
    model_arguments: ModelArguments, data: DataArguments, args: SparseTrainingArguments
) -> dict[str, Any]:
    """Train, evaluate and save model and tokenizer into `args.output_dir`.

    Returns:
        The numbers of `training_summary.json`.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint to resume from in `args.output_dir`.
        ValueError, OSError: bad data, or no such checkpoint or tokenizer.
    """
    quiet_libraries()
    if model_arguments.model is not None:
        model_arguments.check_pretrained()
    check_can_write(args.output_dir)
    resume = checkpoint_to_resume(args)
    corpus = data.read(args.max_steps)
    column = data.text_column if data.dataset else "text"
    name, block_size = model_arguments.model, model_arguments.block_size
    if name is None:
        chosen = data.tokenizer and tokenizer_at(data.tokenizer)
        tokenizer, blocks = prepare_data(corpus, block_size, chosen, data.vocab_size, column)
        set_seed(args.seed)
        shape = {k: v for k, v in vars(model_arguments).items() if k != "model"}
        config = CircuitGPTConfig(
            **shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
        )
        model = CircuitGPTForCausalLM(config)
    else:
        model, tokenizer = load_pretrained(name, data.tokenizer)
        longest = getattr(model.config, "max_position_embeddings", block_size)
        if block_size > longest:
            raise ValueError(
                f"--block-size {block_size} is beyond the model's {longest} positions."
            )
        tokenizer, blocks = prepare_data(corpus, block_size, tokenizer, text_column=column)
        set_seed(args.seed)
    done = train_model(
        model, tokenizer, blocks, args, resume_from_checkpoint=resume,
        start_at_bigrams=data.bigram_start,
    )  # fmt: skip
    say("\n" + table([*training_rows(done), ("model", done["model"])]))
    say(f"\nNext: hf-circuit-sparsity prune --model {done['model']} --task single_double_quote")
    return done
