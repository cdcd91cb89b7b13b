"""Damaged circuits: each is refused by the file's and the field's name, or read as it says."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.circuits.planted import planted_circuit, planted_model
from tests.hostile.harness import fuzz, plain_json, plain_tensors


@pytest.fixture
def artifact(tmp_path):
    """A circuit that has every field."""
    model = planted_model()
    circuit = planted_circuit(
        model,
        scores={site: torch.ones(n.width) for site, n in model.node_sites().items()},
        calibration=Calibration(1.5, {1: 0.25, 2: -0.25}),
        model_name="me/planted",
        metrics={"circuit_loss": 0.01, "ablated_loss": 0.7, "model_loss": 0.005},
        model_revision="0123456789" * 4,
        config={"seed": 0, "nested": {"steps": [1, 2]}},
        kept_edges=[("h.0.attn.act_in", 0, "h.0.attn.v", 5)],
        edge_offsets={"h.0.attn.v": {5: 0.5}},
        tokens=[1, 2, 3],
        token_mean=torch.zeros(16),
        verification={"sufficiency": {"value": 0.1, "control": 0.5, "passed": 1.0}},
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
