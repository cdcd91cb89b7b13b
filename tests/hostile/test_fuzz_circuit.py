"""Damaged circuits: each is refused by the file's and the field's name, or read as it says."""

import json

import numpy as np
import pytest
from huggingface_hub import HfApi

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.circuits.planted import full_circuit, planted_model
from tests.hostile.harness import fuzz, plain_json, plain_tensors


@pytest.fixture
def artifact(tmp_path):
    """A circuit that has every field."""
    full_circuit(planted_model()).save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"


def check(circuit, folder):
    content = plain_json(folder / "circuit.json")
    for name in ("task", "model_name", "model_fingerprint", "metrics", "config", "example"):
        assert getattr(circuit, name) == content[name], name
    assert circuit.nodes == {s: sorted(ids) for s, ids in content["nodes"].items() if ids}
    shift = {int(t): v for t, v in content["calibration"]["shift"].items()}
    assert circuit.calibration == Calibration(float(content["calibration"]["scale"]), shift)
    kept = content.get("kept_edges")
    assert circuit.kept_edges == (None if kept is None else [tuple(edge) for edge in kept])
    offsets = content.get("edge_offsets", {})
    assert {
        site: {str(index): value for index, value in at.items()}
        for site, at in circuit.edge_offsets.items()
    } == offsets
    assert circuit.tokens == content.get("tokens")
    assert circuit.verification == content.get("verification", {})
    tensors = plain_tensors(folder / "circuit.safetensors")
    read = {f"means.{s}": t for s, t in circuit.means.items()}
    read |= {f"scores.{s}": t for s, t in circuit.scores.items()}
    if circuit.token_mean is not None:
        read["token.mean"] = circuit.token_mean
    assert set(read) == set(tensors)
    assert all(np.array_equal(read[name].numpy(), tensors[name]) for name in tensors)


@pytest.mark.parametrize("file", ["circuit.json", "circuit.safetensors"])
def test_fuzz(artifact, tmp_path, file):
    load = Circuit.from_pretrained
    if file == "circuit.safetensors":  # without its hash, which all would fail
        path = artifact / "circuit.json"
        content = json.loads(path.read_text())
        del content["files"]
        path.write_text(json.dumps(content))
    outcome = fuzz(artifact, file, load, check, tmp_path / "work", mutations=300)
    assert outcome["refused"] > 200 and outcome["loaded"] > 5, outcome


@pytest.mark.parametrize("name", ["../../secrets", "/etc", "~/models", "C:\\models", "a/../../b"])
def test_a_circuit_from_the_hub_names_no_folder_here(hub_server, artifact, name):
    path = artifact / "circuit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_name": name}))
    Circuit.from_pretrained(artifact)  # one's own may be anywhere
    api = HfApi()
    api.create_repo("ada/hostile")
    api.upload_folder(repo_id="ada/hostile", folder_path=artifact)
    with pytest.raises(ArtifactError, match=r"circuit\.json: model_name must be a name, and"):
        Circuit.from_pretrained("ada/hostile")
