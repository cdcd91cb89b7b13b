"""A task of one's own through every command: from its CSV file to a published circuit."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi

from hf_circuit_sparsity import BinaryTask, Circuit, list_circuits
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import publication
from tests.circuits.planted import planted_model, word_tokenizer
from tests.tasks.own_tasks import rows, write_csv

PRUNING = ["--max-steps", "40", "--batch-size", "8", "--target-loss", "0.3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with a model that solves the task of the file beside it, and its circuit."""
    folder = tmp_path_factory.mktemp("run") / "planted"
    planted_model().save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder)
    write_csv(folder / "switch.csv")
    (folder / "text").mkdir()
    for number in range(3):
        (folder / "text" / f"{number}.py").write_text("on w1 off w2 no w3 yes " * 60)
    arguments = ["--model", str(folder), "--corpus", str(folder / "text"), *PRUNING]
    assert main(["prune", "--task", str(folder / "switch.csv"), *arguments]) == 0
    return folder


@pytest.fixture
def far_away(run, tmp_path) -> Path:
    """A copy in another place, without the file that the task came from."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(run, folder)
    (folder / "switch.csv").unlink()
    return folder


def test_the_task_lies_beside_its_circuit(run):
    folder = run / "circuits" / "switch"
    assert {p.name for p in folder.iterdir()} == {
        "circuit.json", "circuit.safetensors", "circuit.png", "task.json",
    }  # fmt: skip
    circuit = Circuit.from_pretrained(folder)
    expected = BinaryTask.from_csv(run / "switch.csv", word_tokenizer())
    assert circuit.task == "switch" and circuit.own_task == expected.text
    task = circuit.load_task(word_tokenizer())
    assert task.test.to_list() == expected.test.to_list()


def test_verify_view_and_evaluate_find_it_there(far_away, capsys):
    circuit = far_away / "circuits" / "switch"
    corpus = ["--corpus", str(far_away / "text")]
    assert main(["verify", str(circuit), *corpus, "--stability-seeds", "0"]) == 0
    verdict = capsys.readouterr().out.split("\n\n")[1].strip()
    assert "checks passed. " in verdict and "Not tested: " in verdict
    assert Circuit.from_pretrained(circuit).verification
    assert main(["view", str(circuit), *corpus]) == 0
    page = (circuit / "index.html").read_text(encoding="utf-8")
    shown = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    assert shown["task"] == "switch" and shown["verdict"] == verdict
    assert main(["evaluate", "--model", str(far_away), "--task", str(circuit)]) == 0
    printed = capsys.readouterr().out
    assert "switch" in printed and "100.0%" in printed
    scores = json.loads((far_away / "task_evaluation.json").read_text())["tasks"]
    assert [score["task"] for score in scores] == ["switch"]


def test_it_is_published_with_its_circuit(hub_server, far_away, tmp_path, monkeypatch):
    monkeypatch.setattr(publication, "REPORT", ReportConfig(8, 256, 1))
    corpus = ["--corpus", str(far_away / "text")]
    assert main(["publish", str(far_away), "--repo", "ada/planted", *corpus]) == 0
    files = HfApi().list_repo_files("ada/planted-circuits")
    assert "switch/task.json" in files
    assert len(load_dataset("ada/planted-tasks", "switch")["test"]) > 1
    (found,) = list_circuits("ada/planted")
    circuit = found.load()
    assert circuit.own_task == Circuit.from_pretrained(far_away / "circuits" / "switch").own_task
    # Whoever has never seen the task looks at it all the same, and finds a circuit of their own.
    (tmp_path / "out").mkdir()
    arguments = [
        "--model",
        "ada/planted",
        *corpus,
        *PRUNING,
        "--output-dir",
        str(tmp_path / "mine"),
    ]
    assert main(["prune", "--task", "ada/planted-tasks:switch", *arguments]) == 0
    mine = Circuit.from_pretrained(tmp_path / "mine")
    assert mine.own_task == circuit.own_task
    mine.push_to_hub("ada/mine", base_model="ada/planted")
    view = ["view", "ada/mine", *corpus, "--output-dir", str(tmp_path / "out")]
    assert main(view) == 0 and (tmp_path / "out" / "index.html").is_file()


def test_two_tasks_of_one_name_are_not_published_together(hub_server, far_away, capsys):
    circuits = far_away / "circuits"
    shutil.copytree(circuits / "switch", circuits / "zwitch")
    path = circuits / "zwitch" / "task.json"
    path.write_text(path.read_text().replace("w3", "w4"))
    assert main(["publish", str(far_away), "--repo", "ada/planted"]) == 2
    assert "zwitch" in capsys.readouterr().err and not hub_server.log


@pytest.mark.parametrize("damage", ["missing", "renamed", "built-in", "cut"])
def test_a_damaged_task_is_refused_by_its_file(far_away, damage, capsys):
    path = far_away / "circuits" / "switch" / "task.json"
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        name = {"renamed": "other", "built-in": "with_as"}.get(damage, "switch")
        text = text.replace('"name": "switch"', f'"name": "{name}"')
        path.write_text(text[: len(text) // 2] if damage == "cut" else text)
    assert main(["view", str(path.parent)]) == 2
    assert path.name in capsys.readouterr().err or damage == "renamed"


def test_a_table_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    table = rows()
    table[4]["target"] = ""
    path = write_csv(tmp_path / "mine.csv", table)
    for command in ("prune", "evaluate", "publish"):
        arguments = ["--task", str(path)]
        arguments += ["--repo", "ada/x", "nowhere"] if command == "publish" else ["--model", "no"]
        assert main([command, *arguments]) == 2
        error = capsys.readouterr().err
        assert "row 5" in error and "Traceback" not in error
