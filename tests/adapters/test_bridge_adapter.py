"""A saved bridge attached to its dense model by PEFT."""

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity.adapters import BridgePeftConfig
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from tests.bridge.test_bridge import IDS, hybrids, save_pair, sparse_model
from tests.decoders.dense_models import gpt2, llama


@pytest.fixture
def saved(tmp_path):
    return save_pair(tmp_path)


def test_peft_attaches_a_saved_bridge(saved, tmp_path, recwarn):
    dense, folder, bridged = saved
    assert isinstance(PeftConfig.from_pretrained(str(folder)), BridgePeftConfig)
    base = AutoModelForCausalLM.from_pretrained(dense)
    model = PeftModel.from_pretrained(base, str(folder))
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    for one, other in zip(hybrids(model.bridged), hybrids(bridged), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        # The dense model runs as ever, until it is steered.
        assert torch.equal(model(IDS).logits, bridged.dense(IDS).logits)
        with model.steer("h.0.attn.resid_delta", 3, 4.0), bridged.steer(1, 3, 4.0):
            steered = model(IDS).logits
            assert torch.equal(steered, bridged.dense(IDS).logits)
            text = model.generate(input_ids=IDS[:, :4], max_new_tokens=3, pad_token_id=0)
        assert not torch.allclose(steered, model(IDS).logits)
        assert text.shape == (2, 7)
    assert not any(p.requires_grad for p in model.parameters())
    # And saved by PEFT it is a bridge again, of the same weights.
    model.save_pretrained(str(tmp_path / "again"))
    assert not any((tmp_path / "again").glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(dense)
    again = PeftModel.from_pretrained(base, str(tmp_path / "again"))
    assert torch.equal(hybrids(again.bridged)[0], hybrids(bridged)[0])


def test_two_bridges_beside_one_model(saved, tmp_path):
    dense, folder, bridged = saved
    other = BridgedCausalLM.from_models(bridged.dense, sparse_model(tied_unembed=True)).eval()
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), str(folder))
    model.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(hybrids(model.bridged)[0], hybrids(bridged)[0])
    model.set_adapter("other")
    assert torch.equal(hybrids(model.bridged)[0], hybrids(other)[0])
    model.delete_adapter("other")
    assert torch.equal(hybrids(model.bridged)[0], hybrids(bridged)[0])


def test_another_base_model_is_refused(saved):
    _, folder, _ = saved
    with pytest.raises(ValueError, match="llama"):
        PeftModel.from_pretrained(llama(), str(folder))
    other = gpt2()
    other.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match="gpt2"):
        PeftModel.from_pretrained(other, str(folder))
