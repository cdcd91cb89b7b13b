"""The models that the findings are about, trained where they are not there yet.

Each is trained once into a folder, from which every findings script loads it; a training that was
stopped goes on from its last checkpoint. All read the same blocks of the Python standard library
through the same tokenizer.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_circuit_sparsity.commands.console import quiet_libraries, say
from hf_circuit_sparsity.commands.training import prepare_data, train_model
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.definitions.base import DEFINITIONS
from hf_circuit_sparsity.tasks.packing import pack_dataset
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments

from ..experiment import Experiment, table

FOLDER = Path("runs/findings")
N_LAYER = 2
BLOCK_SIZE = 128
BATCH_SIZE = 16
# Nonzeros among the weights that are made sparse: those of d_model 128 at density 0.05.
NONZEROS = 46_700


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: as the first quickstart did where nothing else is said."""

    d_model: int = 128
    sparsifier: str = "topk"
    steps: int = 2500
    seed: int = 0
    afrac: float | None = 0.25
    """Share of activations that AbsTopK keeps; None for an ordinary dense transformer."""
    learning_rate: float = 2e-2
    stop_at_loss_of: str | None = None
    """Name of the model at whose validation loss training stops."""
    look_every: int = 50
    """Steps after which it looks whether it has reached that."""
    taught: tuple[str, ...] = ()
    """Tasks of whose training prompts, with their continuations, a quarter of the text is made."""

    @property
    def density(self) -> float:
        """The share of nonzeros that gives every width the same number of them."""
        config = self.config(2048)
        entries = config.d_model * (
            2 * config.vocab_size + config.block_size + 12 * N_LAYER * config.d_model
        )
        return min(1.0, NONZEROS / entries)

    def config(self, vocab_size: int) -> CircuitGPTConfig:
        return CircuitGPTConfig(
            d_model=self.d_model,
            n_layer=N_LAYER,
            block_size=BLOCK_SIZE,
            vocab_size=vocab_size,
            afrac=self.afrac,
        )


_DENSE = Recipe(
    sparsifier="none", afrac=None, learning_rate=1e-2, steps=1200, stop_at_loss_of="topk-128-seed0"
)
# Random coordinate descent starts at its final density, so its learning rate has the factor
# 1/sqrt(density) from the first step; half the base of the annealed runs was best at d_model 64.
# It stops at the loss of its twin.
_RCD = Recipe(d_model=64, sparsifier="rcd", learning_rate=1e-2, steps=4000, look_every=100)

RECIPES: dict[str, Recipe] = {
    **{f"topk-128-seed{s}": Recipe(seed=s) for s in range(3)},
    **{f"dense-128-seed{s}": replace(_DENSE, seed=s) for s in range(2)},
    **{
        f"dense-abstopk-128-seed{s}": replace(
            _DENSE, afrac=0.25, seed=s, stop_at_loss_of=f"topk-128-seed{s}"
        )
        for s in range(2)
    },
    **{f"topk-64-seed{s}": Recipe(d_model=64, seed=s) for s in range(3)},
    **{
        f"rcd-64-seed{s}": replace(_RCD, seed=s, stop_at_loss_of=f"topk-64-seed{s}")
        for s in range(3)
    },
    **{f"topk-{width}-seed0": Recipe(d_model=width) for width in (32, 256)},
    "taught-64-seed0": Recipe(d_model=64, taught=("bracket_counting", "set_or_string")),
}


class StopAtLoss(TrainerCallback):
    """Ends training at the first evaluation whose loss is not above `loss`."""

    def __init__(self, loss: float):
        self.loss = loss

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        if metrics["eval_loss"] <= self.loss:
            control.should_training_stop = True


def training_summary(name: str, folder: Path = FOLDER) -> dict:
    """What training a model reported: loss, nonzeros, steps, seconds; empty if not trained."""
    path = folder / name / "training_summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_trained(
    name: str, folder: Path = FOLDER
) -> tuple[CircuitGPTForCausalLM, PreTrainedTokenizerBase]:
    """The model and its tokenizer, trained first where they are not there yet."""
    train_missing([name], folder)
    path = folder / name
    return CircuitGPTForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def train_missing(names: Sequence[str], folder: Path = FOLDER) -> None:
    """Train those of the named models that are not in the folder yet.

    Raises:
        KeyError: a name that is not in `RECIPES`.
        Interrupted: after Ctrl-C, with a checkpoint from which the same call goes on.
    """
    missing = [name for name in names if not training_summary(name, folder)]
    if not missing:
        return
    quiet_libraries()
    corpus = build_corpus()
    stored = folder / "tokenizer"
    tokenizer, blocks = prepare_data(corpus, BLOCK_SIZE, str(stored) if stored.is_dir() else None)
    tokenizer.save_pretrained(stored)
    for name in missing:
        recipe = RECIPES[name]
        callbacks = []
        if recipe.stop_at_loss_of is not None:
            train_missing([recipe.stop_at_loss_of], folder)
            callbacks = [StopAtLoss(training_summary(recipe.stop_at_loss_of, folder)["loss"])]
        say(f"Training {name}")
        output = folder / name
        set_seed(recipe.seed)
        train_model(
            CircuitGPTForCausalLM(recipe.config(len(tokenizer))),
            tokenizer,
            with_lessons(blocks, recipe.taught, tokenizer),
            _arguments(recipe, output),
            resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None,
            callbacks=callbacks,
        )


def _arguments(recipe: Recipe, output: Path) -> SparseTrainingArguments:
    stops = recipe.stop_at_loss_of is not None
    return SparseTrainingArguments(
        output_dir=str(output),
        sparsifier=recipe.sparsifier,
        max_steps=recipe.steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=32,
        target_density=recipe.density,
        learning_rate=recipe.learning_rate,
        rcd_config={"selection": "gradient", "block_fraction": 1 / 4, "greedy_fraction": 1 / 64},
        logging_steps=max(1, recipe.steps // 20),
        save_steps=max(1, recipe.steps // 4),
        save_total_limit=1,
        eval_strategy="steps" if stops else "no",
        eval_steps=recipe.look_every,
        report_to="none",
        seed=recipe.seed,
    )


def with_lessons(
    blocks: DatasetDict,
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    share: float = 1 / 4,
) -> DatasetDict:
    """The blocks, and others made of the tasks' training prompts, answered: a share of all."""
    if not tasks:
        return blocks
    rng = random.Random("lessons")
    wanted = int(len(blocks["train"]) * share / (1 - share))
    length = len(blocks["train"][0]["input_ids"])
    documents: list[str] = []
    while True:
        for _ in range(2000):
            pair = DEFINITIONS[rng.choice(tasks)].generate(rng, "train")
            documents += [example.prompt + example.continuation for example in pair]
        rng.shuffle(documents)
        lessons = pack_dataset(Dataset.from_dict({"text": documents}), tokenizer, length)
        if len(lessons) >= wanted:
            break
    lessons = lessons.select(range(wanted)).cast(blocks["train"].features)
    mixed = concatenate_datasets([blocks["train"], lessons])
    return DatasetDict({**blocks, "train": mixed})


def run(experiment: Experiment) -> str:
    """Train the models that are named and not there yet."""
    train_missing(experiment.options.models, experiment.folder)
    rows = [
        {"model": n, **training_summary(n, experiment.folder)} for n in experiment.options.models
    ]
    return f"# Trained models\n\n{table(rows)}"


if __name__ == "__main__":
    Experiment.main(run, __doc__, "trained_models", str(FOLDER), FOLDER, models=tuple(RECIPES))
