"""`hf-circuit-sparsity prune`, its search and its switches, and `verify`."""

import json
import sys

import pytest

from hf_circuit_sparsity import Circuit
from hf_circuit_sparsity.cli import main

# An untrained model guesses; a circuit of guessing is a circuit all the same.
GUESSING = ["--task", "while_return_true", "--target-loss", "0.9", "--max-steps", "2"]
GUESSING += ["--batch-size", "2", "--num-seeds", "2", "--selection-prompts", "32"]


def test_search_with_every_switch_and_again(saved, corpus, tmp_path, capsys):
    output = tmp_path / "circuit"
    arguments = [
        "prune", "--model", str(saved), *GUESSING, "--trials", "2", "--prune-edges",
        "--token-nodes", "--output-dir", str(output), "--corpus", str(corpus),
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for expected in ("its tokens", "nodes that two seeds share", "picture"):
        assert expected in printed
    circuit = Circuit.from_pretrained(output)
    assert circuit.kept_edges is not None and circuit.tokens is not None
    assert circuit.config["num_seeds"] == circuit.config["max_steps"] == 2
    journal = (output / "search" / "trials.jsonl").read_text()
    assert main(arguments) == 0  # nothing is tried anew
    again = (output / "search" / "trials.jsonl").read_text()
    assert again.count("param_name") == journal.count("param_name") == 2 * 7
    assert main([*arguments, "--seed", "5"]) == 2
    assert "seed=0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["quickstart"], ["prune", *GUESSING, "--model"]])
def test_without_matplotlib_it_says_so_before_the_work(
    saved, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    model = [str(saved)] if command[0] == "prune" else []
    assert main([*command, *model, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "hf-circuit-sparsity[viz]" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_verify_refuses_what_the_model_has_not_learned(saved, corpus, tmp_path, capsys):
    output = tmp_path / "circuit"
    reading = ["--model", str(saved), "--corpus", str(corpus)]
    assert main(["prune", *GUESSING, *reading, "--output-dir", str(output)]) == 0
    assert main(["verify", str(output), *reading]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((output / "circuit.json").read_text())["verification"] == {}
