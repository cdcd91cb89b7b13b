"""A dense GPT-2, a sparse model and three kinds of bridges between them, trained where missing.

The dense model is an ordinary GPT-2 of 2 layers and width 128, trained on the Python standard
library. The sparse model starts as the quickstart's, which never saw the dense one, and is
then trained together with the bridges; these start from ridge regression.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_circuit_sparsity.bridge.bridge_config import BridgeTrainingArguments
from hf_circuit_sparsity.bridge.bridge_trainer import BridgeTrainer
from hf_circuit_sparsity.bridge.initialization import ridge_bridges_
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.training import fit, prepare_data
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.packing import spread_sample
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer

from ..experiment import stored
from .trained_models import BATCH_SIZE, BLOCK_SIZE, FOLDER, N_LAYER, load_trained, train_missing

SPARSE = "topk-128-seed0"
DENSE_STEPS = 2000
BRIDGE_STEPS = 600
BRIDGE_BATCH_SIZE = 8
# A tenth of the quickstart's peak: sparse model and bridges start from where they already are.
BRIDGE_LEARNING_RATE = 1e-3
NMSE_WEIGHT = 4.0
DENSITY = 0.05
RIDGE_TOKENS = 65_536
DENSE, BRIDGE = "bridges/dense", "bridges/bridge"
SUMMARY = "training_summary.json"


def text_blocks(folder: Path = FOLDER) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """The tokenizer and the blocks that every model here was trained on."""
    train_missing([SPARSE], folder)
    return prepare_data(build_corpus(), BLOCK_SIZE, str(folder / "tokenizer"))


def sample_text(split: Dataset, rows: int) -> torch.Tensor:
    """Blocks spread evenly over a split, int64 `(rows, T)`."""
    return torch.tensor(spread_sample(split, rows)["input_ids"][:])[:rows]


def train(
    kind: type[SparseTrainer],
    model: PreTrainedModel,
    arguments: SparseTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: DatasetDict,
    eval_rows: int,
) -> dict[str, float]:
    """Train a model into the arguments' folder, or go on there; returns its metrics."""
    folder = Path(arguments.output_dir)
    say(f"Training {folder}")
    trainer = kind(
        model,
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=spread_sample(blocks["validation"], eval_rows),
        processing_class=tokenizer,
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    figures, log = fit(trainer, BLOCK_SIZE, last)
    return {**log, "steps": arguments.max_steps, "seconds": figures["train_seconds"]}


def train_dense(
    folder: Path, tokenizer: PreTrainedTokenizerBase, blocks: DatasetDict
) -> dict[str, float]:
    """Train the dense GPT-2 into a folder; returns its metrics."""
    set_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=BLOCK_SIZE, n_embd=128, n_layer=N_LAYER, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    arguments = SparseTrainingArguments(
        str(folder), sparsifier="none", max_steps=DENSE_STEPS, learning_rate=1e-2,
        per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=32, logging_steps=100,
        save_steps=DENSE_STEPS // 4, save_total_limit=1, report_to="none",
    )  # fmt: skip
    return train(SparseTrainer, GPT2LMHeadModel(config), arguments, tokenizer, blocks, 512)


def ensure_dense(folder: Path = FOLDER) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """Train the dense model if it is not there yet; returns the tokenizer and the text."""
    tokenizer, blocks = text_blocks(folder)
    dense = folder / DENSE
    stored(dense / SUMMARY, lambda: train_dense(dense, tokenizer, blocks))
    return tokenizer, blocks


def fresh_bridge(folder: Path = FOLDER) -> BridgedCausalLM:
    """Untrained bridges between the dense model and the sparse one that never saw it."""
    set_seed(0)
    return BridgedCausalLM.from_models(str(folder / DENSE), load_trained(SPARSE, folder)[0])


def ridge_tokens(blocks: DatasetDict) -> torch.Tensor:
    """The training text that ridge regression is fitted on, `(n, T)`."""
    return sample_text(blocks["train"], RIDGE_TOKENS // BLOCK_SIZE)


def train_bridge(
    folder: Path, bridged: BridgedCausalLM, tokenizer: PreTrainedTokenizerBase, blocks: DatasetDict
) -> dict[str, float]:
    """Train sparse model and bridges together into a folder; returns their metrics."""
    set_seed(0)
    ridge_bridges_(bridged, ridge_tokens(blocks))
    arguments = BridgeTrainingArguments(
        str(folder), max_steps=BRIDGE_STEPS, learning_rate=BRIDGE_LEARNING_RATE,
        nmse_weight=NMSE_WEIGHT,
        # The sparse model is as sparse as it is to be from the first step on.
        target_density=DENSITY, anneal_start=0.0, anneal_end=0.0,
        per_device_train_batch_size=BRIDGE_BATCH_SIZE, per_device_eval_batch_size=32,
        logging_steps=BRIDGE_STEPS // 20, save_steps=BRIDGE_STEPS // 4, save_total_limit=1,
        report_to="none",
    )  # fmt: skip
    return train(BridgeTrainer, bridged, arguments, tokenizer, blocks, 32)


def load_models(
    folder: Path = FOLDER,
) -> tuple[BridgedCausalLM, PreTrainedTokenizerBase, DatasetDict]:
    """The trained bridge with its dense model, the tokenizer and the text; trains what is missing.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint from which the same call goes on.
    """
    tokenizer, blocks = ensure_dense(folder)
    bridge = folder / BRIDGE
    stored(bridge / SUMMARY, lambda: train_bridge(bridge, fresh_bridge(folder), tokenizer, blocks))
    tokenizer = AutoTokenizer.from_pretrained(folder / DENSE)
    return BridgedCausalLM.from_pretrained(bridge, dense=str(folder / DENSE)), tokenizer, blocks


def summary(folder: Path, model: str) -> dict[str, float]:
    """What training `DENSE`, or sparse model and bridges (`BRIDGE`), reported."""
    return json.loads((folder / model / SUMMARY).read_text(encoding="utf-8"))


def circuit_of(
    model: Any,
    task: BinaryTask,
    blocks: DatasetDict,
    folder: Path,
    config: PruningConfig,
) -> Circuit:
    """The model's circuit for a task, as it is stored in the folder or found now.

    Raises:
        TaskNotLearnedError: the model does not do the task well enough.
    """
    try:
        circuit = Circuit.from_pretrained(folder)
        circuit.check_model(model)
    except (FileNotFoundError, ValueError):
        circuit = find_circuit(model, task, config, reference=blocks["train"], progress=False)
        circuit.save_pretrained(folder)
    return circuit
