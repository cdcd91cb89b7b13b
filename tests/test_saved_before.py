"""What an earlier version saved still loads and computes the same.

`saved_at_b9f8998` holds artifacts as the commit b9f8998 wrote them, and what they computed there.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_circuit_sparsity.adapters  # noqa: F401  makes the methods known to PEFT
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.faithfulness import evaluate_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer
from tests.bridge.test_bridge import hybrids
from tests.circuits.planted import on_off_task, reference_ids

SAVED = Path(__file__).parent / "fixtures" / "saved_at_b9f8998"
IDS = torch.arange(20).reshape(2, 10)
SMALL = CircuitGPTConfig(
    n_layer=2, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=16, vocab_size=32
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "expected.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("folder", ["model_dense", "model_nonzeros"])
def test_models(folder, sparse, expected):
    model = CircuitGPTForCausalLM.from_pretrained(SAVED / folder, sparse=sparse).eval()
    torch.testing.assert_close(model(IDS).logits, expected["model.logits"])


@torch.no_grad()
def test_adapter_of_a_circuit(expected):
    base = CircuitGPTForCausalLM.from_pretrained(SAVED / "planted")
    model = PeftModel.from_pretrained(base, str(SAVED / "circuit_adapter"))
    logits = model(reference_ids()[:4]).logits
    torch.testing.assert_close(logits, expected["circuit_adapter.logits"])


@torch.no_grad()
def test_circuit(expected):
    model = CircuitGPTForCausalLM.from_pretrained(SAVED / "planted").eval()
    circuit = Circuit.from_pretrained(SAVED / "circuit")
    with circuit.apply(model):
        logits = model(reference_ids()[:4]).logits
    torch.testing.assert_close(logits, expected["circuit.logits"])
    stored = json.loads((SAVED / "circuit_expected.json").read_text())
    assert circuit.nodes == stored["nodes"] and len(circuit.edges(model)) == stored["edges"]
    assert circuit.metrics == stored["metrics"]
    assert PruningConfig.from_stored(circuit.config).max_steps == circuit.config["steps"] == 60
    measured = evaluate_circuit(circuit, model, on_off_task())  # by now more than then
    measured = {name: measured[name] for name in stored["metrics"]}
    assert measured == pytest.approx(stored["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("by_name", [True, False])
def test_bridge(by_name, expected, monkeypatch):
    monkeypatch.chdir(SAVED)  # its config names the dense model by a relative path
    dense = {} if by_name else {"dense": str(SAVED / "dense_gpt2")}
    bridged = BridgedCausalLM.from_pretrained(SAVED / "bridge", **dense)
    for i, logits in enumerate(hybrids(bridged)):
        torch.testing.assert_close(logits, expected[f"bridge.hybrid.{i}"])


@pytest.mark.parametrize("trust", [None, True])
def test_a_bridge_that_names_code_of_its_own(trust, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(SAVED)
    assert "auto_map" in json.loads((SAVED / "bridge" / "config.json").read_text())
    bridged = AutoModelForCausalLM.from_pretrained("bridge", trust_remote_code=trust)
    assert type(bridged) is BridgedCausalLM
    torch.testing.assert_close(hybrids(bridged)[0], expected["bridge.hybrid.0"])
    bridged.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("run", ["train_topk", "train_rcd", "train_rcd_nonzeros"])
def test_training_goes_on(run, expected, tmp_path):
    shutil.copytree(SAVED / run, tmp_path / run)
    rows = ((torch.arange(32)[:, None] + 7 * torch.arange(10)) % 32).tolist()
    rcd = {"sparsifier": "rcd", "rcd_config": {"block_fraction": 0.25}}
    args = SparseTrainingArguments(
        str(tmp_path / run),
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=4,
        target_density=1 / 4,
        min_nonzeros=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **({"sparsifier": "topk"} if run == "train_topk" else rcd),
    )
    torch.manual_seed(0)
    if run == "train_rcd_nonzeros":
        model = sparse_from_config(SMALL, 1 / 4, min_nonzeros=1, seed=0)
    else:
        model = CircuitGPTForCausalLM(SMALL)
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = SparseTrainer(model, args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=str(tmp_path / run / "checkpoint-4"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = torch.tensor(losses)
    torch.testing.assert_close(losses[-4:], expected[f"{run}.losses"][-4:], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    torch.testing.assert_close(logits, expected[f"{run}.logits"], rtol=1e-4, atol=1e-5)
