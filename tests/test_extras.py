"""What is optional is said in one sentence where it lacks, and nothing else misses it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_circuit_sparsity import PruningConfig, search_circuit
from hf_circuit_sparsity.commands.pretrained import load_pretrained
from hf_circuit_sparsity.files import save_figure

ROOT = Path(__file__).parents[1]
OPTIONAL = ("evaluate", "gguf", "matplotlib", "optuna", "peft", "triton")
# Run beside nothing but the installed wheel; the names are those of `OPTIONAL`.
WITHOUT = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.split(".")[0] in {OPTIONAL!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(without)
import torch, hf_circuit_sparsity as ours
from datasets import Dataset
assert not ours.__file__.startswith({str(ROOT)!r}), ours.__file__
for name in ours.__all__:
    getattr(ours, name)
config = ours.CircuitGPTConfig(
    n_layer=1, d_model=16, n_head=2, d_head=8, d_mlp=16, block_size=8, vocab_size=20
)
model = ours.CircuitGPTForCausalLM(config)
ids = torch.arange(64).reshape(8, 8) % 20
data = Dataset.from_dict({{"input_ids": ids.tolist(), "labels": ids.tolist()}})
args = ours.SparseTrainingArguments("run", max_steps=2, target_density=0.1, report_to="none")
trainer = ours.SparseTrainer(model, args, train_dataset=data)
trainer.train()
trainer.save_model()
loaded = ours.CircuitGPTForCausalLM.from_pretrained("run", sparse=True)
torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
bridged = ours.BridgedCausalLM.from_models(model.to_dense(), config)
bridged.save_pretrained("bridge")
ours.BridgedCausalLM.from_pretrained("bridge", dense=model)
try:
    import hf_circuit_sparsity.adapters
except ImportError as error:
    assert "hf-circuit-sparsity[peft]" in str(error), error
else:
    raise AssertionError("PEFT was not blocked")
"""


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn = []
    with pytest.raises(ImportError, match=r"hf-circuit-sparsity\[viz\]"):
        save_figure(tmp_path / "a.png", drawn.append)
    assert not drawn and not list(tmp_path.iterdir())


def test_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"hf-circuit-sparsity\[search\]"):
        # The model and the task would be an error if they were looked at.
        search_circuit(None, None, PruningConfig(), trials=1, folder=tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_without_gguf(tmp_path, monkeypatch):
    module = sys.modules[load_pretrained.__module__]
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"hf-circuit-sparsity\[gguf\]"):
        module._gguf(str(tmp_path / "model.gguf"))


def test_all_is_every_other_extra():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    users = ",".join(sorted(set(extras) - {"all", "docs", "test"}))
    assert extras["all"] == [f"hf-circuit-sparsity[{users}]"]


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree_without_any_extra(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
