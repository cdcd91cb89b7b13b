"""Cards of what is on the Hub: the examples on them run as printed, and pushing brings the card."""

import re

import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard

from hf_circuit_sparsity import (
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    SparseTrainer,
    SparseTrainingArguments,
    plot_circuit,
)
from hf_circuit_sparsity.bridge.card import bridge_card
from hf_circuit_sparsity.circuits.card import circuit_card
from hf_circuit_sparsity.tasks.card import task_dataset_card
from hf_circuit_sparsity.trainer.model_card import model_card
from tests.circuits.planted import planted_model, word_tokenizer
from tests.hub_cards.artifacts import bridge, planted_circuit
from tests.hub_cards.test_cards import task_splits


def run(card, capsys) -> str:
    """Run the example of a card as printed; what it prints."""
    (example,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.fixture
def api(hub_server):
    return HfApi()


@pytest.fixture
def on_hub(api):
    """The planted model and its tokenizer at ada/planted."""
    planted_model().push_to_hub("ada/planted")
    word_tokenizer().push_to_hub("ada/planted")


def test_model_example(api, capsys):
    config = CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=4, d_model=8, d_mlp=16, block_size=48, vocab_size=16
    )
    model = CircuitGPTForCausalLM(config)
    model.push_to_hub("ada/writer")
    word_tokenizer().push_to_hub("ada/writer")
    model_card(model, repo_id="ada/writer").push_to_hub("ada/writer")
    assert run(ModelCard.load("ada/writer"), capsys).strip()


def test_circuit_example(on_hub, capsys):
    model = CircuitGPTForCausalLM.from_pretrained("ada/planted")
    circuit = planted_circuit(model)
    circuit.push_to_hub("ada/c")
    out = run(ModelCard.load("ada/c"), capsys)
    assert "on_off" in out and "h.0.attn.v" in out and "Edge(" in out and "indices" in out
    # Two in one repository: the example loads one by its folder.
    card = circuit_card(
        {"deep/one": circuit.to_dict(), "two": circuit.to_dict()}, repo_id="ada/several"
    )
    circuit.push_to_hub("ada/several", subfolder="deep/one")
    assert "on_off" in run(card, capsys)


def test_a_circuit_of_an_unknown_model_has_a_shorter_example(api, capsys):
    circuit = planted_circuit(model_name="")
    with pytest.warns(UserWarning, match="fingerprint"):
        circuit.push_to_hub("ada/c")
    card = ModelCard.load("ada/c")
    assert card.data.base_model is None
    assert "on_off" in run(card, capsys)


def test_task_dataset_example(api, capsys):
    for name, splits in task_splits().items():
        splits.push_to_hub("ada/tasks", name)
    left = DatasetCard.load("ada/tasks")
    card = task_dataset_card(task_splits(), repo_id="ada/tasks", existing=left)
    card.push_to_hub("ada/tasks")
    assert "→" in run(DatasetCard.load("ada/tasks"), capsys)
    again = load_dataset("ada/tasks", "on_off", split="test")
    assert again.features == task_splits()["on_off"]["test"].features


def test_bridge_example(on_hub, tmp_path, api, capsys):
    bridged = bridge()
    with torch.no_grad():
        for parameter in bridged.bridges.parameters():
            parameter.normal_()
    bridged.save_pretrained(tmp_path / "bridge")
    api.create_repo("ada/bridge")
    api.upload_folder(repo_id="ada/bridge", folder_path=tmp_path / "bridge")
    card = bridge_card(bridged, repo_id="ada/bridge")
    card.push_to_hub("ada/bridge")
    assert "tensor(" in run(ModelCard.load("ada/bridge"), capsys)


def test_pushing_a_model_tags_its_card(api):
    planted_model().push_to_hub("ada/planted")
    assert {"circuitgpt", "weight-sparse"} <= set(ModelCard.load("ada/planted").data.tags)
    ModelCard("---\nlicense: mit\n---\n\n# My own\n").push_to_hub("ada/planted")
    planted_model().push_to_hub("ada/planted")
    assert "# My own" in ModelCard.load("ada/planted").text


def test_a_pushed_circuits_card_names_the_others(on_hub, tmp_path):
    model = CircuitGPTForCausalLM.from_pretrained("ada/planted")
    picture = plot_circuit(planted_circuit(model), tmp_path / "c.png", model)
    planted_circuit(model).push_to_hub("ada/c", subfolder="one", picture=picture)
    planted_circuit(model, task="other").push_to_hub("ada/c", subfolder="two")
    card = ModelCard.load("ada/c")
    assert card.data.base_model == "ada/planted" and "circuit" in card.data.tags
    assert "<code>other</code>" in card.text and "`subfolder`: <code>one</code>." in card.text
    assert "circuit.png" not in card.text
    planted_circuit(model).push_to_hub("ada/c", subfolder="one", picture=picture)
    assert "](one/circuit.png)" in ModelCard.load("ada/c").text
    # In the model's own repository the model's card stays.
    before = ModelCard.load("ada/planted").content
    planted_circuit(model).push_to_hub("ada/planted", subfolder="circuits/on_off")
    assert ModelCard.load("ada/planted").content == before


def test_a_trainers_card_has_the_numbers_of_the_run(api, tmp_path, tiny_model):
    ids = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = SparseTrainingArguments(
        tmp_path / "run", target_density=0.25, max_steps=3, logging_steps=1, report_to="none",
        push_to_hub=True, hub_model_id="ada/trained",
    )  # fmt: skip
    trainer = SparseTrainer(tiny_model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.push_to_hub()
    card = ModelCard.load("ada/trained")
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["loss"] == pytest.approx(loss)
    assert "| steps | 3 |" in card.text and "| tokens seen | not measured |" in card.text
