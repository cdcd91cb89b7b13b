"""Cards: what is on them, that the Hub takes them, and that names in them stay text."""

import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from datasets import DatasetDict
from huggingface_hub import DatasetCard, metadata_load
from markdown_it import MarkdownIt

from hf_circuit_sparsity.bridge.card import bridge_card
from hf_circuit_sparsity.circuits.card import circuit_card
from hf_circuit_sparsity.circuits.task_scores import TaskScore
from hf_circuit_sparsity.hub_cards.markdown import NOT_MEASURED, block, python, text, visible
from hf_circuit_sparsity.tasks.card import task_dataset_card
from hf_circuit_sparsity.trainer.model_card import model_card
from tests.circuits.planted import on_off_task, planted_model
from tests.hub_cards.artifacts import BRIDGE_SUMMARY, SUMMARY, bridge, planted_circuit

HOSTILE = (
    "<script>alert(1)</script>",
    "`a` | b ``` c",
    "---\nlicense: mit\n---\n# head",
    "[x](javascript:alert(1)) ![y](https://evil.example/p.png)",
    "{{ 7 * 7 }} {% raw %} *a* _b_ ~~c~~ $d$",
    "www.evil.example https://evil.example @ada &lt; \\",
    "\u202edesrever \x00 \ud800",
)


def task_splits():
    task = on_off_task()
    return {"on_off": DatasetDict({"train": task.train, "test": task.test})}


def every_card(name="ada/thing", label=None):
    """A card of each kind; with `label` in the place of every name that others choose."""
    named = {} if label is None else {
        "task": label, "model_name": label, "config": {label: label},
        "example": {"prompt": label, "target": label, "counterfactual_target": label},
    }  # fmt: skip
    circuit = planted_circuit(**named).to_dict()
    model, word = planted_model(), label or "on_off"
    pair = bridge()
    if label is not None:
        vars(pair.config).update(base_model_type=label, base_model_fingerprint=label)
    scores = [TaskScore(word, 0.9, 0.2, 0.1, 120), TaskScore(word, problem=f"why {word}")]
    scores = list(map(asdict, scores))
    return {
        "model": model_card(
            model, repo_id=name, summary=SUMMARY, task_scores=scores, circuits={word: circuit},
            corpus=word, datasets=["ada/tasks"], picture="circuit.png",
        ),
        "circuit": circuit_card(
            {"": circuit}, repo_id=name, base_model="ada/planted", pictures=[""], others=[word]
        ),
        "circuits": circuit_card(
            {"a": circuit, word: circuit}, repo_id=name, pictures=["a", word]
        ),
        "tasks": task_dataset_card(
            {word: task_splits()["on_off"]}, repo_id=name, tokenizer=word, seed=0
        ),
        "bridge": bridge_card(pair, repo_id=name, summary=BRIDGE_SUMMARY),
    }  # fmt: skip


@pytest.fixture(scope="module")
def cards():
    return every_card()


def test_metadata(cards, tmp_path):
    for kind, card in cards.items():
        card.save(tmp_path / kind)
        metadata = metadata_load(tmp_path / kind)
        assert metadata["license"] == "apache-2.0", kind
        assert {"circuit-sparsity", "interpretability"} <= set(metadata["tags"]), kind
        if kind != "tasks":
            assert metadata["pipeline_tag"] == "text-generation"
            library = "transformers" if kind == "model" else "hf-circuit-sparsity"
            assert metadata["library_name"] == library
    data = {kind: card.data.to_dict() for kind, card in cards.items()}
    assert data["model"]["datasets"] == ["ada/tasks"]
    assert data["circuit"]["base_model"] == data["circuits"]["base_model"] == "ada/planted"
    assert data["bridge"]["base_model"] == "ada/planted"
    assert data["bridge"]["base_model_relation"] == "adapter"
    assert data["tasks"]["task_categories"] == ["text-generation"]
    assert data["tasks"]["size_categories"] == "n<1K"


def test_the_hub_takes_them(cards, hub_server):
    for card in cards.values():
        card.validate()


def test_model_index_has_the_numbers_that_were_measured(cards):
    def numbers(card):
        again = type(card)(str(card)).data.eval_results  # as read back from the file
        return {(r.dataset_config, r.metric_type, r.metric_name): r.metric_value for r in again}

    found = numbers(cards["model"])
    assert found[None, "loss", "Validation loss (nats per token)"] == 3.25
    assert found["on_off", "accuracy", "Accuracy"] == 0.9
    circuit = planted_circuit()
    alone = ("on_off", "task_loss", "Task loss of the circuit alone (nats)")
    assert found[alone] == numbers(cards["circuit"])[alone] == circuit.metrics["circuit_loss"]
    assert numbers(cards["bridge"])[None, "kl", "KL(dense ‖ sparse)"] == 0.25


def test_what_was_not_measured_is_not_claimed():
    bare = planted_circuit(metrics={}, verification={}, config={})
    cards = [
        model_card(planted_model(), repo_id="ada/thing"),
        circuit_card({"": bare.to_dict()}, repo_id="ada/thing"),
        bridge_card(bridge(), repo_id="ada/thing"),
    ]
    for card in cards:
        assert NOT_MEASURED in card.text
        assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
        assert "![" not in card.text
        # A number with decimals would be a measurement.
        lines = [line for line in card.text.split("\n") if NOT_MEASURED in line]
        assert not any(re.search(r"\d\.\d", line) for line in lines)


def test_a_verification_is_shown():
    stored = {
        "sufficiency": {"value": 0.1, "control": 0.8, "threshold": 0.15, "at_least": 0.0,
                        "passed": 1.0},
        "transfer": {"value": 0.2, "control": 0.9, "control_low": 0.8, "control_high": 1.0,
                     "at_least": 1.0, "passed": 1.0},
        "stability: other seeds": {"value": 0.6, "low": 0.5, "high": 0.7, "control": 0.1},
        "fabricated loss: nonsense task": {"value": 0.5},
    }  # fmt: skip
    card = circuit_card({"": planted_circuit(verification=stored).to_dict()}, repo_id="ada/c")
    assert "| <code>sufficiency</code> | 0.100 | 0.800 | ≤ 0.15 | pass |" in card.text
    assert "| <code>transfer</code> | 0.200 | 0.900 (0.800 to 1.000) | – | – |" in card.text
    assert "other seeds</code> | 0.600 (0.500 to 0.700) | 0.100 | – | – |" in card.text
    assert "nonsense task</code> | 0.500 | – | – | – |" in card.text


def test_a_dataset_card_keeps_what_the_viewer_needs():
    left = DatasetCard(
        "---\nconfigs:\n- config_name: on_off\n  data_files:\n  - split: test\n    path: a-*\n"
        "dataset_info:\n- config_name: on_off\nlicense: mit\n---\n"
    )
    card = task_dataset_card(task_splits(), repo_id="ada/tasks", existing=left)
    metadata = card.data.to_dict()
    assert metadata["configs"][0]["data_files"] == [{"split": "test", "path": "a-*"}]
    assert metadata["dataset_info"] == [{"config_name": "on_off"}]
    assert metadata["license"] == "apache-2.0"


class Page(HTMLParser):
    """Collects the elements and the text of a rendered card."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.words, self.links = set(), [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.links |= {value for name, value in attrs if name in ("href", "src")}
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.words.append(data)


def rendered(card):
    # HTML is let through and addresses become links, as on the Hub.
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Page(parser.render(card.text))


@pytest.mark.parametrize("label", HOSTILE)
def test_names_stay_text(cards, label):
    for kind, card in every_card(label=label).items():
        again = type(card)(str(card))
        expected, found = cards[kind].data.to_dict(), again.data.to_dict()
        assert set(found) - {"base_model"} == set(expected) - {"base_model"}, kind
        assert found["license"] == "apache-2.0"
        page, plain = rendered(again), rendered(cards[kind])
        assert page.elements - {"code"} == plain.elements - {"code"}, kind
        images = {link for link in page.links if "circuit.png" in link}
        assert page.links - images == {link for link in plain.links if "circuit.png" not in link}
        assert "alert" not in "".join(images) or "javascript:" not in "".join(images)
        if kind != "circuits":  # there the name is in a heading and in a path
            assert visible(label) in "".join(page.words), kind


def test_escapes_are_undone_by_a_renderer():
    def shown(markdown):
        html = MarkdownIt("commonmark").enable(["table"]).render(markdown)
        return "".join(Page(html).words).strip()

    for label in (*HOSTILE, "a_b*c", "x", "1. y", "+ z", "#1"):
        assert shown(f"Name: {text(label)}") == f"Name: {visible(label)}".strip()
        assert shown(block(label)) == "\n".join(map(visible, label.split("\n"))).strip()
        assert eval(python(label)) == label and "`" not in python(label)
