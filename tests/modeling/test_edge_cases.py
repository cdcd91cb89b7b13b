"""The smallest and the largest inputs: nothing at all, padding alone, one token, 70,000 tokens."""

import pytest
import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from tests.conftest import random_model, sparsify

pytestmark = pytest.mark.usefixtures("either_path")

SWITCHES = [{}, {"sink": False}, {"d_pos_emb": 4}, {"afrac": None, "rms_norm": False}]


@pytest.fixture(params=SWITCHES, ids=str)
def config(request) -> CircuitGPTConfig:
    return CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=4, d_model=8, block_size=8, vocab_size=16, **request.param
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_no_tokens_have_no_logits(config, attention, shape):
    model = random_model(config)
    model.set_attn_implementation(attention)
    ids = torch.zeros(shape, dtype=torch.long)
    for run in (model, sparsify(model).to_sparse(threshold=1.0)):
        output = run(ids, labels=ids)
        assert output.logits.shape == (*shape, 16) and output.loss.isnan()  # the mean of nothing
        output.logits.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in run.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_alone_and_single_tokens_are_computed(config, attention):
    model = random_model(config)
    model.set_attn_implementation(attention)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits)
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    one = model(ids[:, :1], labels=ids[:, :1])
    torch.testing.assert_close(one.logits, model(ids).logits[:, :1])
    assert one.loss.isnan()  # there is no next token to predict


def test_vocabularies_of_more_than_16_bits(tmp_path):
    config = CircuitGPTConfig(
        n_layer=1, n_head=1, d_head=4, d_model=4, block_size=8, vocab_size=70_000,
        enable_bigram_table=False,
    )  # fmt: skip
    model = sparsify(random_model(config))
    model.save_pretrained(tmp_path, sparse=True)
    ids = torch.tensor([[0, 65_535, 65_536, 69_999]])
    expected = model(ids, labels=ids)
    for sparse in (False, True):
        again = CircuitGPTForCausalLM.from_pretrained(tmp_path, sparse=sparse)
        found = again(ids, labels=ids)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.loss, expected.loss)
