"""Damaged bridges: each is refused by the file's and the field's name, or read as it says."""

import json

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_circuit_sparsity.bridge.checkpoint import adapter_state_dict
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.circuits.planted import planted_model
from tests.hostile.harness import fuzz, plain_json
from tests.hub_cards.artifacts import bridge


@pytest.fixture
def artifact(tmp_path):
    bridge().save_pretrained(tmp_path / "bridge")
    return tmp_path / "bridge"


def check(bridged, folder):
    config = plain_json(folder / "config.json")
    for name in ("base_width", "base_model_type", "encoder_afrac", "bridge_bias"):
        assert name not in config or getattr(bridged.config, name) == config[name], name
    stored = load_file(folder / "adapter_model.safetensors")
    loaded = adapter_state_dict(bridged)
    assert set(stored) == set(loaded)
    for name, tensor in stored.items():
        assert (loaded[name] == tensor.float()).logical_or(tensor.isnan()).all(), name


@pytest.mark.parametrize("file", ["config.json", "adapter_model.safetensors"])
def test_fuzz(artifact, tmp_path, file):
    dense = planted_model()

    def load(folder):
        return BridgedCausalLM.from_pretrained(folder, dense=dense)

    outcome = fuzz(artifact, file, load, check, tmp_path / "work")
    assert outcome["refused"] > 40 and outcome["loaded"] > 5, outcome


def test_a_bridge_from_the_hub_names_no_folder_here(hub_server, artifact):
    path = artifact / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "../../secrets"}))
    api = HfApi()
    api.create_repo("ada/hostile")
    api.upload_folder(repo_id="ada/hostile", folder_path=artifact)
    with pytest.raises(ArtifactError, match=r"config\.json: base_model_name_or_path must be"):
        BridgedCausalLM.from_pretrained("ada/hostile")
