"""A dense GPT-2, a sparse twin and three kinds of bridges between them, trained where missing.

The dense model is an ordinary GPT-2 of 2 layers and width 128, trained on the Python standard
library. The twin starts as the quickstart's sparse model, which never saw the dense one, and is
then trained together with the bridges; these start from ridge regression.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_circuit_sparsity.bridge.bridge_config import BridgeTrainingArguments
from hf_circuit_sparsity.bridge.bridge_trainer import BridgeTrainer
from hf_circuit_sparsity.bridge.initialization import ridge_bridges_
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.commands.console import quiet_libraries, say
from hf_circuit_sparsity.commands.train import fit, prepare_data, spread_sample, write_json
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer

from .trained_models import BATCH_SIZE, BLOCK_SIZE, N_LAYER, load_trained, train_missing

FOLDER = Path("runs/bridges")
FINDINGS = Path("runs/findings")
TWIN = "topk-128-seed0"
DENSE_STEPS = 2000
BRIDGE_STEPS = 600
BRIDGE_BATCH_SIZE = 8
# A tenth of the quickstart's peak: twin and bridges start from where they already are.
BRIDGE_LEARNING_RATE = 1e-3
NMSE_WEIGHT = 4.0
DENSITY = 0.05
RIDGE_TOKENS = 65_536
SUMMARY = "training_summary.json"


def text_blocks(
    findings: Path = FINDINGS,
) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """The tokenizer and the blocks that every model here was trained on."""
    from hf_circuit_sparsity.tasks.corpus import build_corpus

    train_missing([TWIN], findings)
    return prepare_data(build_corpus(), BLOCK_SIZE, str(findings / "tokenizer"))


def train_dense(folder: Path, tokenizer: PreTrainedTokenizerBase, blocks: DatasetDict) -> None:
    """Train the dense GPT-2 into a folder."""
    set_seed(0)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=BLOCK_SIZE, n_embd=128, n_layer=N_LAYER, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    arguments = SparseTrainingArguments(
        str(folder), sparsifier="none", max_steps=DENSE_STEPS, learning_rate=1e-2,
        per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=32, logging_steps=100,
        save_steps=DENSE_STEPS // 4, save_total_limit=1, report_to="none",
    )  # fmt: skip
    trainer = SparseTrainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=spread_sample(blocks["validation"], 512),
        processing_class=tokenizer,
    )
    fit(trainer, BLOCK_SIZE, get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    write_json(folder / SUMMARY, {"loss": metrics["eval_loss"], "steps": DENSE_STEPS})


def ensure_dense(
    folder: Path = FOLDER, findings: Path = FINDINGS
) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """Train the dense model if it is not there yet; returns the tokenizer and the text."""
    tokenizer, blocks = text_blocks(findings)
    if not (folder / "dense" / SUMMARY).is_file():
        say("Training the dense GPT-2")
        train_dense(folder / "dense", tokenizer, blocks)
    return tokenizer, blocks


def fresh_bridge(dense: Path, findings: Path = FINDINGS) -> BridgedCausalLM:
    """Untrained bridges between the dense model and the sparse one that never saw it."""
    set_seed(0)
    return BridgedCausalLM.from_models(str(dense), load_trained(TWIN, findings)[0])


def ridge_tokens(blocks: DatasetDict) -> torch.Tensor:
    """The training text that ridge regression is fitted on, `(n, T)`."""
    sample = spread_sample(blocks["train"], RIDGE_TOKENS // BLOCK_SIZE)
    return torch.tensor(sample["input_ids"][:])[: RIDGE_TOKENS // BLOCK_SIZE]


def train_bridge(
    folder: Path, bridged: BridgedCausalLM, tokenizer: PreTrainedTokenizerBase, blocks: DatasetDict
) -> None:
    """Train twin and bridges together into a folder."""
    set_seed(0)
    ridge_bridges_(bridged, ridge_tokens(blocks))
    arguments = BridgeTrainingArguments(
        str(folder),
        max_steps=BRIDGE_STEPS,
        learning_rate=BRIDGE_LEARNING_RATE,
        nmse_weight=NMSE_WEIGHT,
        # The twin is as sparse as it is to be from the first step on.
        target_density=DENSITY, anneal_start=0.0, anneal_end=0.0,
        per_device_train_batch_size=BRIDGE_BATCH_SIZE, per_device_eval_batch_size=32,
        logging_steps=max(1, BRIDGE_STEPS // 20), save_steps=max(1, BRIDGE_STEPS // 4),
        save_total_limit=1, report_to="none",
    )  # fmt: skip
    trainer = BridgeTrainer(
        bridged,
        arguments,
        train_dataset=blocks["train"],
        eval_dataset=spread_sample(blocks["validation"], 32),
        processing_class=tokenizer,
    )

    def newest() -> dict[str, str]:
        log = trainer.state.log_history[-1]
        names = ("lm", "kl", "nmse", "dense_to_sparse", "sparse_to_dense")
        return {name[:9]: f"{log[name]:.3f}" for name in names if name in log}

    _, seconds = fit(
        trainer,
        BLOCK_SIZE,
        get_last_checkpoint(str(folder)) if folder.is_dir() else None,
        newest,
    )
    metrics = trainer.evaluate()
    trainer.save_model()
    bridged.sparse.save_pretrained(folder / "sparse")
    tokenizer.save_pretrained(folder / "sparse")
    write_json(folder / SUMMARY, {**metrics, "steps": BRIDGE_STEPS, "seconds": seconds})


def load_models(
    folder: Path = FOLDER, findings: Path = FINDINGS
) -> tuple[BridgedCausalLM, PreTrainedTokenizerBase, DatasetDict]:
    """The trained bridge with its dense model, the tokenizer and the text; trains what is missing.

    Raises:
        Interrupted: after Ctrl-C, with a checkpoint from which the same call goes on.
    """
    quiet_libraries()
    dense, bridge = folder / "dense", folder / "bridge"
    tokenizer, blocks = ensure_dense(folder, findings)
    if not (bridge / SUMMARY).is_file():
        say("Training its sparse twin and the bridges")
        train_bridge(bridge, fresh_bridge(dense, findings), tokenizer, blocks)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    return BridgedCausalLM.from_pretrained(bridge, dense=str(dense)), tokenizer, blocks


def dense_loss(folder: Path = FOLDER) -> float:
    """Validation loss of the dense model, nats per token."""
    return json.loads((folder / "dense" / SUMMARY).read_text(encoding="utf-8"))["loss"]


def bridge_summary(folder: Path = FOLDER) -> dict[str, float]:
    """What training twin and bridges reported."""
    return json.loads((folder / "bridge" / SUMMARY).read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    parser.add_argument("--findings", type=Path, default=FINDINGS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    load_models(arguments.folder, arguments.findings)
