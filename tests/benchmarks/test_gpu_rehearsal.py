"""The one command for a GPU, on the CPU at a tenth of its size: corpus, then every stage."""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.gpu import corpus
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

ROOT = Path(__file__).parents[2]
STDLIB = Path(sysconfig.get_path("stdlib"))


def wheel(folder: Path, name: str, license: str, files: dict[str, str]) -> None:
    (folder / name).mkdir(parents=True)
    with zipfile.ZipFile(folder / name / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n"
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"{metadata}License-Expression: {license}\n\n"
        )
        for path, text in files.items():
            archive.writestr(f"{name}/{path}", text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A token file of the standard library, cut into packages that pip need not download."""
    folder = tmp_path_factory.mktemp("gpu")
    texts = {p.name: p.read_text(encoding="utf-8") for p in sorted(STDLIB.glob("*.py"))}
    names = list(texts)
    wheel(folder / "wheels", "jinja2", "BSD-3-Clause", {n: texts[n] for n in names[:30]})
    # Ten of these files are in the validation package already.
    wheel(folder / "wheels", "django", "MIT", {n: texts[n] for n in names[20:]})
    wheel(folder / "wheels", "flask", "GPL-3.0-only", {"copyleft.py": texts[names[0]] + "#"})
    corpus.build(
        argparse.Namespace(
            folder=folder / "data", wheels=folder / "wheels", names=["jinja2", "django", "flask"],
            vocab_size=1024, characters_per_package=10**7, tokens=400_000, validation_tokens=20_000,
        )
    )  # fmt: skip
    return folder / "data"


def test_the_corpus_keeps_its_splits_apart(data):
    manifest = json.loads((data / "manifest.json").read_text())
    packages = {package["name"]: package for package in manifest["packages"]}
    assert packages.keys() == {"jinja2", "django"}
    assert packages["jinja2"]["split"] == "validation" and packages["django"]["license"] == "MIT"
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    for split, most in (("train", 400_000), ("validation", 20_000)):
        tokens = np.fromfile(data / f"{split}.bin", np.uint16)
        assert len(tokens) == manifest["tokens"][split] == most
        assert tokens.max() == tokenizer.eos_token_id


@pytest.mark.slow
def test_one_command_does_everything(data, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "GPU_DATA": str(data)}
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearsal"]
    command += ["--rates", "1e-3", "2e-3", "--trial-seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    report = (tmp_path / "out/report.md").read_text()
    titles = ("Training", "Learning rates tried", "Tasks", "Circuit 1", "Speed against plain code")
    assert all(f"## {title}\n" in report for title in titles)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    packed = b"".join(p.read_bytes() for p in sorted((tmp_path / "out").glob("gpu.tar.gz.*")))
    (tmp_path / "all.tar.gz").write_bytes(packed)
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        archive.extractall(tmp_path / "all", filter="data")
    problems = {row["problem"] for row in json.loads((tmp_path / "all/speed.json").read_text())}
    # On a busy machine not all of it is done in time; nothing else may go wrong.
    late = ("no time left", "not done in", "did not complete within")
    assert not [p for p in problems if p and not any(reason in p for reason in late)]
    model = CircuitGPTForCausalLM.from_pretrained(tmp_path / "all/model", dtype=torch.float32)
    weight = model.transformer.h[0].mlp.c_fc.weight
    # The row minimum holds more than one in 64 of so narrow a matrix.
    assert torch.count_nonzero(weight) == max(4 * len(weight), round(weight.numel() / 64))
    assert (tmp_path / "all/loss.csv").read_text().count("\n") > 3
