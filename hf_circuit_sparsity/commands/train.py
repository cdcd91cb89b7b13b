"""`hf-circuit-sparsity train`: train a CircuitGPT on a folder of Python."""

from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..trainer.sparse_config import SparseTrainingArguments
from .console import quiet_libraries, say, table
from .loading import read_corpus, tokenizer_at
from .training import checkpoint_to_resume, prepare_data, train_model, training_rows


@dataclass
class ModelArguments:
    """The architecture, where it is not the paper's."""

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


@dataclass
class DataArguments:
    """What to train on."""

    corpus: str | None = None
    """Folder of Python files; the standard library if not given."""
    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer; one is trained if not given."""
    vocab_size: int = 2048
    """Entries of a trained tokenizer."""


def run_train(
    model_arguments: ModelArguments, data: DataArguments, args: SparseTrainingArguments
) -> dict[str, Any]:
    """Train, evaluate and save model and tokenizer into `args.output_dir`.

    Returns:
        The numbers of `training_summary.json`.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint to resume from in `args.output_dir`.
        ValueError, OSError: a bad corpus, or no such checkpoint or tokenizer.
    """
    quiet_libraries()
    resume = checkpoint_to_resume(args)
    name = data.tokenizer and tokenizer_at(data.tokenizer)
    corpus = read_corpus(data.corpus)
    tokenizer, blocks = prepare_data(corpus, model_arguments.block_size, name, data.vocab_size)
    set_seed(args.seed)
    config = CircuitGPTConfig(
        **vars(model_arguments), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    done = train_model(config, tokenizer, blocks, args, resume_from_checkpoint=resume)
    say("\n" + table([*training_rows(done), ("model", done["model"])]))
    say(f"\nNext: hf-circuit-sparsity prune --model {done['model']} --task single_double_quote")
    return done
