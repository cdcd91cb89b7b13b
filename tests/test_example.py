"""The model and the circuit that come with the package are what they say they are."""

from pathlib import Path

import pytest
import torch

import hf_circuit_sparsity
from hf_circuit_sparsity import evaluate_circuit, load_example, load_task
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_accuracy

FOLDER = Path(hf_circuit_sparsity.__file__).parent / "example"


@pytest.fixture(scope="module")
def example():
    return load_example()


def test_it_is_small_and_holds_no_code():
    files = [
        path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert [path.name for path in files if path.suffix in (".py", ".bin", ".pt")] == ["__init__.py"]


def test_the_circuit_is_of_this_model_and_gives_its_numbers(example):
    model, tokenizer, circuit = example
    assert not model.training and model.dtype == torch.float32
    circuit.check_model(model)
    assert len(circuit) == circuit.metrics["nodes"] <= 15
    assert len(circuit.edges(model)) == circuit.metrics["edges"]
    task = load_task(circuit.task, tokenizer, n_train=512, n_test=512, seed=3)
    found = evaluate_circuit(circuit, model, task)
    for name in ("circuit_accuracy", "model_accuracy"):
        assert found[name] == pytest.approx(circuit.metrics[name], abs=0.05)
    assert found["circuit_loss"] == pytest.approx(circuit.metrics["circuit_loss"], abs=0.1)
    with circuit.apply(model, inverse=True):
        assert binary_accuracy(all_pair_logits(model, task.tensors("test"))) < 0.7


def test_its_checks_are_stored_with_it(example):
    decided = {n: c for n, c in example.circuit.verification.items() if "threshold" in c}
    assert (
        len(decided) >= 12 and decided["sufficiency"]["passed"] and decided["necessity"]["passed"]
    )


def test_it_writes_python(example):
    model, tokenizer, _ = example
    ids = tokenizer("def f(self):\n    return ", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert len(text) > 30
