"""What holds for all activations, matrices, configs and sparse checkpoints."""

import tempfile

import pytest
import torch
from hypothesis import strategies as st

from hf_circuit_sparsity.modeling.configuration_circuitgpt import ACTIVATION_SITES, CircuitGPTConfig
from hf_circuit_sparsity.modeling.csr import CSR, linear_reference, sampled_reference
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers
from tests.conftest import random_model
from tests.properties import holds_for, matrices

FULL = (torch.float32, torch.float64)


@pytest.mark.usefixtures("either_path")
@holds_for(80, x=matrices(), share=st.floats(0, 1))
def test_abs_topk(x, share):
    k = round(share * x.shape[1])
    found = abs_topk(x, k)
    assert torch.equal(found, abs_topk_reference(x, k))
    assert ((found == x) | (found == 0)).all()
    assert torch.equal((found != 0).sum(1), (x != 0).sum(1).clamp(max=k))
    assert torch.equal(abs_topk(found, k), found)


@pytest.mark.usefixtures("either_path")
@holds_for(80, weight=matrices(), tokens=st.integers(0, 4))
def test_csr(weight, tokens):
    csr = CSR.from_dense(weight)
    rows, width = weight.shape
    assert len(csr) == int((weight != 0).sum()) and torch.equal(csr.to_dense(), weight)
    assert torch.equal(csr.transposed().to_dense(), weight.T)
    assert torch.equal(csr.transposed().transposed().to_dense(), weight)
    again = CSR.from_positions(csr.positions, csr.shape, csr.values)
    assert torch.equal(again.to_dense(), weight) and torch.equal(again.row_of, csr.row_of)
    if weight.dtype in FULL:
        x = torch.linspace(-1, 1, tokens * width, dtype=weight.dtype).view(tokens, width)
        up = torch.linspace(1, 2, tokens * rows, dtype=weight.dtype).view(tokens, rows)
        bias = torch.ones(rows, dtype=weight.dtype)
        torch.testing.assert_close(csr.linear(x, bias), linear_reference(csr, x, bias))
        torch.testing.assert_close(csr.linear(x, bias), x @ weight.T + 1)
        torch.testing.assert_close(csr.sampled(up, x), sampled_reference(csr, up, x))


WIDTHS = st.sampled_from([1, 2, 3, 8, 16, 0, -1, 2**30]) | st.none()
FIELDS = {
    "n_layer": st.sampled_from([1, 2, 0, "2", 1.0]),
    "d_model": st.sampled_from([1, 3, 16, 0]),
    "vocab_size": st.sampled_from([1, 2, 33, 0]),
    "block_size": st.sampled_from([1, 2, 16, 0]),
    **dict.fromkeys(("n_head", "d_head", "d_mlp", "d_pos_emb"), WIDTHS),
    "afrac": st.sampled_from([None, 0.25, 0.5, 1, 1.0, 0, 0.01, -0.5, 2.0, float("nan"), "1"]),
    "afrac_loctypes": st.lists(st.sampled_from([*ACTIVATION_SITES, "resid"]), max_size=4)
    | st.sampled_from(["", " attn_in , mlp_in", ","]),
    "dropout": st.sampled_from([0.0, 0.5, 1.0, 1, -0.1, float("nan")]),
    "initializer_range": st.sampled_from([0, 0.02, 1e6, -1.0, float("inf")]),
    "activation_type": st.sampled_from(["gelu", "relu", "tanh"]),
    "residual_activation_type": st.sampled_from(["identity", "relu", None]),
    **dict.fromkeys(
        ("rms_norm", "bias", "ln_bias", "tied_unembed", "sink", "enable_bigram_table",
         "learnable_bigram_table", "use_positional_embeddings", "dropout_cat_pos_emb",
         "sinusoidal_cat_pos_emb"),
        st.booleans(),
    ),
}  # fmt: skip


@holds_for(40, fields=st.fixed_dictionaries({}, optional=FIELDS), length=st.integers(0, 3))
def test_a_config_is_refused_or_its_model_works(fields, length):
    small = {"n_layer": 1, "d_model": 16, "block_size": 4, "vocab_size": 8}
    try:
        config = CircuitGPTConfig(**{**small, **fields})
    except ValueError as error:
        assert str(error)
        return
    except Exception as error:  # huggingface_hub's, whose cause says what is wrong
        assert type(error).__name__.startswith("StrictDataclass")
        return
    model = CircuitGPTForCausalLM(config)
    ids = torch.zeros(2, min(length, config.block_size), dtype=torch.long)
    logits = model(ids).logits
    assert logits.shape == (*ids.shape, config.vocab_size)
    if config.initializer_range < 1:
        assert logits.isfinite().all()
        logits.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert CircuitGPTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


SMALL = CircuitGPTConfig(
    n_layer=1, n_head=2, d_head=4, d_model=8, d_mlp=8, block_size=4, vocab_size=16,
    enable_bigram_table=False,
)  # fmt: skip


@holds_for(
    12, share=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), sparse=st.booleans(),
)  # fmt: skip
def test_a_sparse_checkpoint(share, seed, dtype, sparse):
    model = random_model(SMALL, seed).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.masked_fill_(torch.rand(p.shape) >= share, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, sparse=True)
        again = CircuitGPTForCausalLM.from_pretrained(folder, dtype=dtype, sparse=sparse)
    assert model_fingerprint(again) == model_fingerprint(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert bool(sparse_layers(again)) == (sparse and share <= 0.1)
