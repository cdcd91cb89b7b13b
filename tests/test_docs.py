"""What the documents say is there is there, and their Python runs as printed, though on less."""

import ast
import importlib
import importlib.util
import json
import linecache
import re
import shutil
import sysconfig
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_circuit_sparsity import (
    Circuit,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    PruningConfig,
    SparseTrainer,
    SparseTrainingArguments,
    build_corpus,
    load_task,
    pack_dataset,
    train_tokenizer,
)
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import on_off_task, planted_circuit, planted_model, reference_ids
from tests.conftest import FIXTURES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
# The changelog names what was removed.
DOCUMENTS = sorted(path for path in DOCUMENTS if path.name != "CHANGELOG.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path):
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_circuit_sparsity"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert alias.name == "*" or getattr(module, alias.name), alias.name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"\bbenchmarks\.[a-z_.]*[a-z_]", text):
        assert importlib.util.find_spec(name), name
    for name in re.findall(r"`((?:hf_circuit_sparsity|tests|benchmarks|docs)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name


# What is printed → what the test runs. The first is anyone's name, the others are sizes.
SMALLER = {
    '"(user|me)/': '"ada/',
    "max_steps=2000": "max_steps=2",
    "n_layer=4, d_model=512": "n_layer=1, d_model=64",
    "reference=blocks\\)\n$": "reference=blocks, config=small_report)",
    r"target_loss=0.3": "target_loss=9.0, max_steps=2, cleanup=False",
    r"task, reference=blocks\)\nprint": (
        "task, reference=blocks, random_circuits=2, stability_seeds=1)\nprint"
    ),
    r"rounds=4\)": "rounds=1, config=quick)",
    r"build_task_datasets\(tokenizer\)": "build_task_datasets(tokenizer, [task.name], n_test=2)",
}


@pytest.fixture
def names(tmp_path, monkeypatch, hub_server, make_gpt2):
    """What the README's example leaves, untrained, and the folders that the documents name."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("dataclasses", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", library)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    monkeypatch.chdir(tmp_path)
    corpus = build_corpus()["train"]
    tokenizer = train_tokenizer(corpus, vocab_size=600)
    blocks = pack_dataset(corpus, tokenizer, block_size=128)
    shape = {"n_layer": 1, "d_model": 128, "block_size": 128, "vocab_size": len(tokenizer)}
    model = CircuitGPTForCausalLM(CircuitGPTConfig(**shape))
    circuit = Circuit(
        nodes={"h.0.attn.v": [1, 2], "h.0.attn.resid_delta": [3], "h.0.mlp.post_act": [0]},
        means=mean_activations(model, torch.tensor(blocks[:8]["input_ids"])),
        task="single_double_quote",
        model_fingerprint=model_fingerprint(model),
    )
    dense = make_gpt2(vocab_size=len(tokenizer), n_positions=128, n_embd=128)
    dense.save_pretrained("runs/my_gpt2")
    logs = [{"step": 1, "loss": 5.0, "nonzero_fraction": 1.0}, {"step": 2, "loss": 4.0}]
    Path("runs/quickstart/model").mkdir(parents=True)
    state = Path("runs/quickstart/model/trainer_state.json")
    state.write_text(json.dumps({"log_history": logs}))
    args = SparseTrainingArguments("runs/pushed", push_to_hub=True, hub_model_id="ada/trained")
    return {
        "model": model, "tokenizer": tokenizer, "blocks": blocks, "circuit": circuit,
        "task": load_task("single_double_quote", tokenizer, n_train=64, n_test=64),
        "trainer": SparseTrainer(model, args, processing_class=tokenizer),
        "CircuitGPTForCausalLM": CircuitGPTForCausalLM,
        "small_report": ReportConfig(8, 8, 256, 1),
        "quick": PruningConfig(max_steps=40, batch_size=8, selection_prompts=64),
    }  # fmt: skip


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=str)
def test_the_python_of_a_document_runs(path, names, hub_server, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if path.name == "README.md":  # tests/test_readme.py runs the first two
        blocks = blocks[2:]
        names["model"].push_to_hub("ada/model")
    if path.name == "circuits.md":  # only what a model has learned can be verified
        model, task = planted_model(), on_off_task()
        # Verifying searches anew, by the circuit's own settings.
        circuit = planted_circuit(model, own_task=task.text, config=asdict(names["quick"]))
        names |= {"model": model, "circuit": circuit, "task": task, "blocks": reference_ids()}
        names["tokenizer"] = task.tokenizer
        shutil.copytree(FIXTURES / "reference" / "paper", "csp_yolo1")
        torch.save({"circuit_data": {"0.attn.v": torch.tensor([1])}}, "viz_data.pt")
    if path.name == "data.md":
        stories = [f"Once there were {number} stones." for number in range(1100)]
        Dataset.from_dict({"story": stories}).push_to_hub("ada/stories")
    for block in blocks:
        if "import NNsight" in block and not importlib.util.find_spec("nnsight"):
            continue  # shown, but no dependency even of the tests
        for printed, small in SMALLER.items():
            block = re.sub(printed, small, block)
        # As in a notebook, the source can be read back; nnsight compiles it anew.
        lines = block.splitlines(keepends=True)
        monkeypatch.setitem(linecache.cache, path.name, (len(block), None, lines, path.name))
        exec(compile(block, path.name, "exec"), names)
