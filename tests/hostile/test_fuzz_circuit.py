"""Damaged circuits: each is refused by the file's and the field's name, or read as it says."""

import json
import struct

import numpy as np
import pytest
import torch

from hf_circuit_sparsity.circuits import Circuit, mean_activations, model_fingerprint
from hf_circuit_sparsity.circuits.task_loss import Calibration
from hf_circuit_sparsity.modeling.checked_files import ArtifactError
from tests.circuits.planted import PLANTED_NODES, planted_model, reference_ids

from .harness import fuzz


@pytest.fixture
def artifact(tmp_path):
    model = planted_model()
    circuit = Circuit(
        nodes={site: list(ids) for site, ids in PLANTED_NODES.items()},
        means=mean_activations(model, reference_ids()),
        scores={site: torch.ones(n.width) for site, n in model.node_sites().items()},
        calibration=Calibration(1.5, {1: 0.25, 2: -0.25}),
        task="on_off",
        model_fingerprint=model_fingerprint(model),
        model_name="me/planted",
        metrics={"circuit_loss": 0.01, "ablated_loss": 0.7, "model_loss": 0.005},
        config={"seed": 0, "nested": {"steps": [1, 2]}},
        example={
            "prompt": "w0 on",
            "target": "yes",
            "counterfactual_target": "no",
            "token_ids": [5, 3],
            "counterfactual_token_ids": [5, 4],
            "target_id": 1,
            "counterfactual_target_id": 2,
        },
    )
    circuit.save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"


def plain_tensors(path):
    """A safetensors file of float32 vectors, read with nothing but struct and NumPy."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(body[start:end], "<f4").reshape(entry["shape"])
    return tensors


def check(circuit, folder):
    content = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    for name in ("task", "model_name", "model_fingerprint", "metrics", "config", "example"):
        assert getattr(circuit, name) == content[name], name
    assert circuit.nodes == {s: sorted(ids) for s, ids in content["nodes"].items() if ids}
    shift = {int(t): v for t, v in content["calibration"]["shift"].items()}
    assert circuit.calibration == Calibration(content["calibration"]["scale"], shift)
    tensors = plain_tensors(folder / "circuit.safetensors")
    read = {f"means.{s}": t for s, t in circuit.means.items()}
    read |= {f"scores.{s}": t for s, t in circuit.scores.items()}
    assert set(read) == set(tensors)
    assert all(np.array_equal(read[name].numpy(), tensors[name]) for name in tensors)


@pytest.mark.parametrize("file", ["circuit.json", "circuit.safetensors"])
def test_fuzz(artifact, tmp_path, file):
    (tmp_path / "work").mkdir()
    outcome = fuzz(
        artifact, [file], Circuit.from_pretrained, check, ArtifactError, tmp_path / "work",
        mutations=300,
    )  # fmt: skip
    assert outcome["refused"] > 200 and outcome["loaded"] > 5, outcome
