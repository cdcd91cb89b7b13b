"""`hf-circuit-sparsity bridge`: train a sparse model beside a dense one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from ..bridge.bridge_config import BridgeTrainingArguments
from ..bridge.bridge_trainer import BridgeTrainer
from ..bridge.checkpoint import load_dense
from ..bridge.initialization import ridge_bridges_
from ..bridge.intervention import location_name
from ..bridge.losses import BY_LOCATION
from ..bridge.modeling_bridge import BridgedCausalLM, default_sparse_config
from ..files import check_can_write, write_json
from ..tasks.packing import pack_dataset, spread_sample
from .console import columns, quiet_libraries, say, table
from .loading import load_model, model_at, read_corpus, read_tokenizer
from .training import checkpoint_to_resume, fit, speed_rows

SUMMARY_NAME = "bridge_summary.json"
RIDGE_BLOCKS = 512  # blocks of text on which the regression is fitted
# Column of the progress lines → name in the log.
SHOWN_TERMS = {
    "lm": "lm",
    "kl": "kl",
    "nmse": "nmse",
    "to sparse": "dense_to_sparse",
    "to dense": "sparse_to_dense",
}


@dataclass
class BridgeModelArguments:
    """The two models, and how the bridges between them start."""

    dense_model: str
    """Folder or Hub id of the dense model."""
    sparse_model: str | None = None
    """Folder or Hub id of a CircuitGPT to start from; a fresh one if not."""
    d_model: int | None = None
    """Width of a fresh sparse model; the dense one's if not given."""
    afrac: float | None = 0.25
    """Share of activations AbsTopK keeps in a fresh sparse model."""
    encoder_afrac: float | None = 0.25
    """Share of sparse channels an encoder keeps."""
    ridge_start: bool = False
    """Whether the bridges start from ridge regression, which suits a sparse_model that is trained
    already."""
    corpus: str | None = None
    """Folder of Python files; the standard library if not given."""
    block_size: int | None = None
    """Context, in tokens; at most 128 if not given."""


def run_bridge(model_arguments: BridgeModelArguments, args: BridgeTrainingArguments) -> dict:
    """Train, evaluate and save a bridge into `args.output_dir`, and the sparse model beside it.

    Returns:
        The numbers of `bridge_summary.json`.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint to resume from in `args.output_dir`.
        ValueError, OSError: models that do not exist or do not fit, or a bad corpus.
    """
    quiet_libraries()
    check_can_write(args.output_dir)
    resume = checkpoint_to_resume(args)
    set_seed(args.seed)
    bridged, tokenizer = build_bridge(model_arguments)
    longest = min(bridged.dense.config.max_position_embeddings, bridged.sparse.config.block_size)
    block_size = model_arguments.block_size or min(128, longest)
    if block_size > longest:
        raise ValueError(
            f"block_size={block_size} was passed, but the two models read at most {longest} tokens."
        )
    blocks = pack_dataset(read_corpus(model_arguments.corpus), tokenizer, block_size)
    if model_arguments.ridge_start and resume is None:
        sample = spread_sample(blocks["train"], RIDGE_BLOCKS)
        ridge_bridges_(bridged, torch.tensor(sample["input_ids"][:]))
    trainer = BridgeTrainer(
        bridged, args, train_dataset=blocks["train"],
        eval_dataset=spread_sample(blocks["validation"], 256), processing_class=tokenizer,
    )  # fmt: skip

    def newest_terms() -> dict[str, str]:
        log = trainer.state.log_history[-1]
        return {name: f"{log[key]:.3f}" for name, key in SHOWN_TERMS.items() if key in log}

    figures, log = fit(trainer, block_size, resume, newest_terms)
    folder = Path(args.output_dir)
    bridged.sparse.save_pretrained(folder / "sparse")
    tokenizer.save_pretrained(folder / "sparse")
    done = {
        "bridge": str(folder),
        "dense_model": model_arguments.dense_model,
        **figures,
        **{n.removeprefix("eval_"): v for n, v in log.items() if n.startswith("eval_")},
    }
    write_json(folder / SUMMARY_NAME, done)
    _print_summary(done)
    return done


def build_bridge(
    arguments: BridgeModelArguments,
) -> tuple[BridgedCausalLM, PreTrainedTokenizerBase]:
    """Fresh bridges between the models asked for, and the dense one's tokenizer."""
    name = model_at(arguments.dense_model)
    dense = load_dense(name)
    try:
        tokenizer = read_tokenizer(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{arguments.dense_model} has no tokenizer, which the sparse model needs too; "
            "save it beside the model."
        ) from error
    if arguments.sparse_model is None:
        fields: dict[str, Any] = {"afrac": arguments.afrac}
        if arguments.d_model is not None:
            fields["d_model"] = arguments.d_model
        sparse = default_sparse_config(dense, **fields)
    else:
        sparse, other = load_model(arguments.sparse_model)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{arguments.dense_model} and {arguments.sparse_model} have different tokenizers, "
                "but bridged models must read the same tokens; train the sparse one with "
                f"--tokenizer {arguments.dense_model}."
            )
    bridged = BridgedCausalLM.from_models(dense, sparse, encoder_afrac=arguments.encoder_afrac)
    return bridged, tokenizer


def location_table(figures: dict[str, float]) -> str:
    """Errors and divergences of every location, from the numbers of a summary."""
    rows = []
    while f"encode_nmse_{len(rows)}" in figures:
        i = len(rows)
        rows.append([location_name(i), *(f"{figures[f'{name}_{i}']:.3f}" for name in BY_LOCATION)])
    header = ("after", "NMSE encoding", "decoding", "KL dense→sparse", "sparse→dense")
    return columns(header, rows)


def _print_summary(done: dict[str, Any]) -> None:
    say("\n" + location_table(done))
    rows = [
        ("sparse model", f"{done['lm']:.3f} nats per token on validation text"),
        ("KL(dense ‖ sparse)", f"{done['kl']:.3f} nats per token"),
        *speed_rows(done),
        ("bridge", done["bridge"]),
        ("sparse model", str(Path(done["bridge"]) / "sparse")),
    ]
    say("\n" + table(rows))
    say("\nNMSE is the share of variance missed; KL is of the hybrid run, in nats per token.")
    model = f"{done['bridge']}/sparse"
    say(f"Next: hf-circuit-sparsity prune --model {model} --task single_double_quote")
