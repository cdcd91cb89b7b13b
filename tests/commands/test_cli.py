"""The commands as a person calls them, at the size of a test."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from importlib.metadata import version

import pytest
import torch

from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM, PruningConfig
from hf_circuit_sparsity.bridge.bridge_config import BridgeTrainingArguments
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import quickstart
from hf_circuit_sparsity.commands.bridge import BridgeModelArguments
from hf_circuit_sparsity.commands.loading import circuit_at, model_at
from hf_circuit_sparsity.commands.options import GROUPS, names_of, options_of
from hf_circuit_sparsity.commands.prune import PruneArguments
from hf_circuit_sparsity.commands.train import DataArguments, ModelArguments
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from tests.circuits.planted import on_off_task, planted_circuit, planted_model

TINY = ["--d-model", "32", "--n-layer", "1", "--d-mlp", "32", "--block-size", "128"]
TRAINING = [
    "--per-device-train-batch-size", "4", "--per-device-eval-batch-size", "8",
    "--report-to", "none", "--target-density", "0.2", "--use-cpu", "--logging-steps", "5",
]  # fmt: skip


def train_arguments(corpus, output, *more):
    return [
        "train", "--output-dir", str(output), "--corpus", str(corpus), "--vocab-size", "400",
        *TINY, *TRAINING, *more,
    ]  # fmt: skip


def train(corpus, output, *more):
    return main(train_arguments(corpus, output, *more))


def test_train_writes_a_model_that_loads(corpus, tmp_path, capsys):
    # Fewer steps than it takes to log anything.
    assert train(corpus, tmp_path / "run", "--max_steps", "20", "--logging-steps", "500") == 0
    printed = capsys.readouterr().out
    for expected in ("validation loss", "perplexity", "0.2", "nonzeros", "tokens/s", "Next:"):
        assert expected in printed
    model = CircuitGPTForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.d_model == 32
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"):
        weight = model.get_parameter(name)
        assert (weight != 0).sum() == round(0.2 * weight.numel())
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 20 and summary["tokens"] == 20 * 4 * 128
    assert summary["density"] == pytest.approx(0.2, abs=0.01)
    assert summary["nonzeros"] < 0.5 * summary["parameters"]


def test_prune_says_when_the_task_is_not_learned(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(corpus, folder, "--max-steps", "2") == 0
    prune = ["prune", "--model", str(folder), "--corpus", str(corpus)]
    prune += ["--task", "single_double_quote"]
    assert main(prune) == 2
    assert "target_loss=0.15" in capsys.readouterr().err

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert main(prune) == 2
    assert str(folder) in capsys.readouterr().err
    assert not (folder / "circuits").exists()


def tiny_quickstart(monkeypatch):
    """The real quickstart, with a smaller model and fewer mask updates."""
    for name, value in {
        "D_MODEL": 32, "N_LAYER": 1, "BATCH_SIZE": 8, "DENSITY": 0.5,
        "STEPS": 30, "TARGETS": (0.001, 0.9), "SEARCH": {},
    }.items():  # fmt: skip
        monkeypatch.setattr(quickstart, name, value)
    monkeypatch.setattr(quickstart, "PruningConfig", quick_pruning)


def quick_pruning(seed, target_loss=0.9, **settings):
    # 30 steps do not teach a task; a circuit of guessing is a circuit all the same.
    return PruningConfig(
        seed=seed, target_loss=target_loss, selection_margin=1.0, max_steps=10, batch_size=8,
        selection_prompts=32, cleanup=False, **settings,
    )  # fmt: skip


def test_quickstart_from_corpus_to_picture_and_again(corpus, tmp_path, monkeypatch, capsys):
    tiny_quickstart(monkeypatch)
    arguments = ["quickstart", "--output-dir", str(tmp_path / "q"), "--corpus", str(corpus)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    # 30 steps teach no task, so the first of the targets is out of reach.
    for expected in ("1/5", "loss of 0.001", "nothing to verify", "5/5", "perplexity", "picture"):
        assert expected in printed
    model = CircuitGPTForCausalLM.from_pretrained(tmp_path / "q" / "model")
    circuit = Circuit.from_pretrained(tmp_path / "q" / "circuit")
    circuit.check_model(model)
    assert (tmp_path / "q" / "circuit" / "circuit.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert summary["nodes"] == len(circuit)
    for kind in ("seconds", "cpu_seconds"):
        parts = [summary[f"{p}_{kind}"] for p in ("reading", "training", "circuit", "checks")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(summary[f"total_{kind}"])
    assert ": reading " in printed.split("minutes in all")[1]

    assert main(arguments) == 0  # the same command again trains nothing anew
    assert "done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "q" / "quickstart.json").read_text())["steps"] == 30
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed=0" in capsys.readouterr().err


def test_quickstart_says_which_checks_its_circuit_passes(tmp_path):
    model, task = planted_model(), on_off_task()
    verdict = quickstart._check(planted_circuit(model), model, task, tmp_path)
    assert verdict.startswith("12 of 12 checks passed") and "Not tested: adversarial" in verdict
    assert Circuit.from_pretrained(tmp_path).verification["interchange"]["value"] == 1.0
    silent = planted_circuit(model, nodes={"h.1.mlp.post_act": [3]})
    assert "sufficiency" in quickstart._check(silent, model, task, tmp_path)


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["quickstart", "--output-dir", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("quickstart --minutes 0", "minutes=0"),
        ("quickstart --corpus nowhere", "nowhere"),
        ("quickstart --task no_task", "no_task"),
        ("train --target-density 1.5 --max-steps 1", "target_density=1.5"),
        ("evaluate --model nowhere --task no_task", "no_task"),
        ("evaluate --model {saved} --prompts 7", "n_train is 7"),
        ("view {circuit} --model nowhere", "nowhere"),
        ("view {circuit} --model {saved} --corpus nowhere", "nowhere"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    arguments, named, saved, saved_circuit, tmp_path, capsys
):
    output = tmp_path / "out"
    arguments = arguments.format(saved=saved, circuit=saved_circuit).split()
    assert main([*arguments, "--output-dir", str(output)]) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize(
    ("command", "requests"),
    [
        ("prune --model ada/nowhere --task single_double_quote", 1),
        ("evaluate --model nowhere", 1),
        ("view ada/nowhere", 1),
        ("bridge --dense-model ada/nowhere --output-dir out", 1),
        ("train --tokenizer ada/nowhere --output-dir out", 1),
        ("verify {run}/circiut", 0),
        ("prune --model runs/modle --task single_double_quote", 0),
        ("publish runs/modle --repo ada/x", 0),
    ],
)
def test_a_mistyped_name_is_looked_up_once_at_most(
    command, requests, hub_server, saved_circuit, monkeypatch, capsys
):
    run = saved_circuit.parent
    (run / "runs").mkdir()
    (run / "runs" / "model").symlink_to(run / "model")
    monkeypatch.chdir(run)
    arguments = command.format(run=run).split()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(hub_server.log) == requests
    if "modle" in command and "publish" not in command:
        assert "'runs/model'" in error
    if "circiut" in command:
        assert str(saved_circuit) in error
    assert not (run / "out").exists()


def test_a_runs_folder_stands_for_its_model_and_its_circuit(saved_circuit, saved, tmp_path):
    run = saved_circuit.parent
    assert circuit_at(str(run)) == str(saved_circuit)
    assert (model_at(str(run)), model_at(str(saved))) == (str(run / "model"), str(saved))
    shutil.move(saved_circuit, run / "circuits" / "one")
    assert circuit_at(str(run)) == str(run / "circuits" / "one")
    shutil.copytree(run / "circuits" / "one", run / "circuits" / "two")
    with pytest.raises(ValueError, match="one, two"):
        circuit_at(str(run))
    assert main(["evaluate", "--model", str(run), "--task", "with_as", "--prompts", "8"]) == 0
    assert (saved / "task_evaluation.json").is_file()


@pytest.mark.parametrize("command", ["evaluate", "prune --task with_as --output-dir {out}"])
def test_an_unknown_architecture_is_refused_by_name(command, saved, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(saved, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    assert main([*command.format(out=out).split(), "--model", str(other)]) == 2
    error = capsys.readouterr().err
    assert "'opt'" in error and "register_decoder" in error
    assert not out.exists()


def test_a_file_that_is_not_utf8_is_left_out_and_named(corpus, tmp_path, capsys):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "latin.py").write_bytes(b"s = '\xe9'\n")
    assert train(folder, tmp_path / "run", "--max-steps", "1") == 0
    assert "'latin.py'" in capsys.readouterr().out


def weights_of(folder):
    return CircuitGPTForCausalLM.from_pretrained(folder).state_dict()


def test_ctrl_c_leaves_a_run_that_resumes_bit_for_bit(corpus, tmp_path):
    steps = ["--max-steps", "250", "--save-strategy", "no"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(corpus, whole, *steps) == 0

    running = subprocess.Popen(
        [sys.executable, "-m", "hf_circuit_sparsity.cli", *train_arguments(corpus, cut, *steps)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen = ""
    while "10/250" not in seen and running.poll() is None:
        seen += running.stdout.readline()
    time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=120)
    assert running.returncode == 130, seen + rest
    assert "--resume-from-checkpoint last" in rest
    assert not (cut / "model.safetensors").exists()

    assert train(corpus, cut, *steps, "--resume-from-checkpoint", "last") == 0
    expected, got = weights_of(whole), weights_of(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_run_killed_after_its_last_checkpoint_saves_the_same_model(corpus, tmp_path):
    """Nothing is left to train then, but all that surrounds training."""
    folder = tmp_path / "run"
    arguments = ["--max-steps", "2", "--save-steps", "1", "--resume-from-checkpoint", "auto"]
    assert train(corpus, folder, *arguments) == 0
    names = ("model.safetensors", "config.json", "generation_config.json")
    before = [(folder / name).read_bytes() for name in names]
    for name in names:
        (folder / name).unlink()
    assert train(corpus, folder, *arguments) == 0
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("command", [[], ["train"], ["bridge"], ["prune"]])
def test_help_fits_a_screen_and_imports_nothing_heavy(command):
    code = f"import sys; from hf_circuit_sparsity.cli import main; main({[*command, '--help']})"
    code += "; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    *lines, loaded = shown.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    expected = ("--target-density", "--seed", "--rcd-config") if "prune" not in command else ()
    if not command:
        expected = ("quickstart", "train", "bridge", "prune", "verify", "view", "publish")
    assert set(expected) <= set(named) and len(lines) < 65
    assert all(len(line) <= 100 for line in lines)
    assert not {"torch", "transformers", "datasets", "numpy"} & set(loaded.split())


@pytest.mark.parametrize(
    ("command", "classes"),
    [
        ("train", (ModelArguments, DataArguments, SparseTrainingArguments)),
        ("bridge", (BridgeModelArguments, BridgeTrainingArguments)),
        ("prune", (PruneArguments, PruningConfig)),
    ],
)
def test_what_help_reads_from_the_source_is_what_the_fields_are(command, classes, capsys):
    named = {f"--{f.name.replace('_', '-')}" for cls in classes for f in fields(cls)}
    shown = [name for name in names_of(command) if not name.startswith("--help")]
    assert set(shown) <= named and len(set(shown)) == len(shown)
    own = {o.name: o for group in GROUPS[command] for o in options_of(group)}
    assert all(option.text for option in own.values())
    required = {name for name, option in own.items() if option.default is None}
    assert required == {
        f"--{f.name.replace('_', '-')}" for cls in classes for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING
    }  # fmt: skip
    assert main([command, "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert all(name in everything for name in named)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--learning_rte", "1"], "--learning-rate"),
        (["train", "--target", "0.1"], "--target-density"),  # no abbreviations, but a hint
        (["prune", "--model", "x", "--tsk", "y"], "--task"),
        (["prune", "--model", "x"], "--task"),
        (["train", "out"], "out"),
        (["trian"], "train"),
        (["view", "--modle", "x", "y"], "--model"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_right_one(argv, expected, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) < 6


def test_version_and_completion(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("hf-circuit-sparsity")
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_HF_CIRCUIT_SPARSITY_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", "hf-circuit-sparsity train --d-m")
        monkeypatch.setenv("COMP_CWORD", "2")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "hf-circuit-sparsity train --d-m")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        main([])
        completed = capsys.readouterr().out
        assert "--d-model" in completed and "--d-mlp" in completed and "--block" not in completed
