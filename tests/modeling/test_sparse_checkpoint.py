"""Checkpoints that hold only the nonzeros: round trips, and damage that is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers
from tests.conftest import random_model, sparsify
from tests.modeling.test_checkpoints import IDS, logits_of

SWITCHES = [
    {},
    {"tied_unembed": True},
    {"learnable_bigram_table": False},
    {"enable_bigram_table": False},
    {"d_pos_emb": 4, "sinusoidal_cat_pos_emb": True, "bias": False},
]


@pytest.fixture
def saved(tiny_model, tmp_path):
    sparsify(tiny_model).save_pretrained(tmp_path / "saved", sparse=True)
    return tmp_path / "saved"


@pytest.mark.parametrize("runs_sparse", [False, True])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_round_trip(tiny_config, tmp_path, switches, runs_sparse):
    model = sparsify(random_model(CircuitGPTConfig(**{**tiny_config.to_dict(), **switches})))
    expected, fingerprint = logits_of(model), model_fingerprint(model)
    if runs_sparse:
        model.to_sparse()
    for sparse in (True, False):
        folder = tmp_path / str(sparse)
        model.save_pretrained(folder, sparse=sparse)
        dense, info = CircuitGPTForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert not sparse_layers(dense)
        assert torch.equal(logits_of(dense), expected)
        assert model_fingerprint(dense) == fingerprint

        run, info = CircuitGPTForCausalLM.from_pretrained(
            folder, sparse=True, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert isinstance(run.transformer.h[0].mlp.c_fc, type(model.to_sparse().lm_head))
        assert not run.training
        torch.testing.assert_close(logits_of(run), expected, atol=1e-5, rtol=0)
        assert model_fingerprint(run) == fingerprint
        trainable = {n for n, p in run.named_parameters() if not p.requires_grad}
        assert trainable == {n for n, p in model.named_parameters() if not p.requires_grad}
    sizes = [(tmp_path / s / "model.safetensors").stat().st_size for s in ("True", "False")]
    assert sizes[0] < sizes[1]
    if model.config.tied_unembed:
        for folder in ("True", "False"):
            names = load_file(tmp_path / folder / "model.safetensors")
            assert not any(name.startswith("lm_head") for name in names)


@pytest.mark.parametrize("sparse", [False, True])
def test_what_from_pretrained_is_asked_for(saved, tiny_model, sparse):
    auto = AutoModelForCausalLM.from_pretrained(saved, sparse=sparse)
    assert type(auto) is CircuitGPTForCausalLM
    assert isinstance(AutoConfig.from_pretrained(saved), CircuitGPTConfig)
    torch.testing.assert_close(logits_of(auto), logits_of(tiny_model), atol=1e-5, rtol=0)
    assert auto.name_or_path == str(saved)

    for dtype in (torch.bfloat16, "bfloat16"):
        model = CircuitGPTForCausalLM.from_pretrained(
            saved, sparse=sparse, dtype=dtype, attn_implementation="eager", afrac=0.5
        )
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config._attn_implementation == "eager"
        assert model.config.afrac == 0.5
        model.generate(IDS[:, :4], max_new_tokens=2, pad_token_id=0)
    assert CircuitGPTForCausalLM.from_pretrained(saved, sparse=sparse, device_map="cpu")

    body = AutoModel.from_pretrained(saved, sparse=sparse)
    torch.testing.assert_close(
        body(IDS).last_hidden_state,
        tiny_model.transformer(IDS).last_hidden_state,
        atol=1e-5,
        rtol=0,
    )
    GenerationConfig(max_new_tokens=3, pad_token_id=7).save_pretrained(saved)
    model = CircuitGPTForCausalLM.from_pretrained(saved, sparse=sparse)
    assert model.generation_config.pad_token_id == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_running_hold_the_same_weights(saved, dtype):
    """What is not run on its nonzeros is read another way than the dense model's weights."""
    generator_state = torch.get_rng_state()
    dense, run = (
        CircuitGPTForCausalLM.from_pretrained(saved, dtype=dtype, sparse=sparse)
        for sparse in (False, True)
    )
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert sparse_layers(run) and not run.training
    weights = run.state_dict()
    for name, weight in dense.state_dict().items():
        assert weights[name].dtype == dtype and torch.equal(weights[name], weight), name
    trained = {n for n, p in dense.named_parameters() if p.requires_grad}
    names = {n.replace(".values", ".weight") for n, p in run.named_parameters() if p.requires_grad}
    assert names == trained


def test_bfloat16_is_saved_in_bfloat16(tiny_model, tmp_path):
    sparsify(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path, sparse=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["transformer.h.0.mlp.c_fc.weight.values"].dtype == torch.bfloat16
    assert stored["transformer.h.0.mlp.c_fc.weight.columns"].dtype == torch.uint8
    again = CircuitGPTForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert model_fingerprint(again) == model_fingerprint(tiny_model)


def test_matrices_that_would_not_shrink_are_stored_as_they_are(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, sparse=True)
    tiny_model.save_pretrained(tmp_path / "dense")
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model.state_dict())
    # Between what shrinks and what pays to run: stored by its nonzeros, run dense.
    sparsify(tiny_model, density=0.4).save_pretrained(tmp_path, sparse=True)
    assert "lm_head.weight.columns" in load_file(tmp_path / "model.safetensors")
    for _ in range(5):  # the layers on the way are freed, and so are their ids
        run = CircuitGPTForCausalLM.from_pretrained(tmp_path, sparse=True)
        assert not sparse_layers(run)
        assert torch.equal(logits_of(run), logits_of(tiny_model))


def test_a_trained_checkpoint_saves_sparse_after_saving_dense(tiny_model, tmp_path):
    sparsify(tiny_model)
    for sparse in (True, False, True):
        tiny_model.save_pretrained(tmp_path, sparse=sparse)
        again = CircuitGPTForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(again), logits_of(tiny_model))


NAME = "transformer.h.1.mlp.c_fc.weight"


VALUES, COLUMNS, COUNTS = (f"{NAME}.{part}" for part in ("values", "columns", "row_counts"))


def put(tensors, name, at, value):
    changed = tensors[name].int()
    changed[at] = torch.as_tensor(value, dtype=torch.int32)
    tensors[name] = changed.to(tensors[name].dtype)


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def negative_count(tensors):
    tensors[COUNTS] = tensors[COUNTS].int()
    put(tensors, COUNTS, [0, 1], tensors[COUNTS][:2] + torch.tensor([-100, 100]))


# What the error names, and the damage to tensors `t`, where entries `i` and `i + 1` share a row.
DAMAGE = [
    ("columns", lambda t, i: put(t, COLUMNS, [i, i + 1], t[COLUMNS][[i + 1, i]])),
    ("columns", lambda t, i: put(t, COLUMNS, i + 1, t[COLUMNS][i])),
    ("columns", lambda t, i: put(t, COLUMNS, -1, 32)),
    ("columns", lambda t, i: shorten(t, COLUMNS)),
    ("values", lambda t, i: shorten(t, VALUES)),
    ("row_counts", lambda t, i: shorten(t, COUNTS)),
    ("row_counts", lambda t, i: t.update({COUNTS: torch.cat([t[COUNTS], 0 * t[COUNTS][:1]])})),
    ("row_counts", lambda t, i: put(t, COUNTS, 0, t[COUNTS][0] + 1)),
    ("row_counts", lambda t, i: negative_count(t)),
    ("columns", lambda t, i: t.update({COLUMNS: t[COLUMNS].float()})),
    ("lacks .*values", lambda t, i: t.pop(VALUES)),
    ("lacks .*columns", lambda t, i: t.pop(COLUMNS)),
    ("lacks .*row_counts", lambda t, i: t.pop(COUNTS)),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("message", "damage"), DAMAGE)
def test_damage_is_refused_by_the_tensors_name(saved, message, damage, sparse):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    row = int((tensors[COUNTS] >= 2).nonzero()[0])
    damage(tensors, int(tensors[COUNTS][:row].sum()))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as refused:
        CircuitGPTForCausalLM.from_pretrained(saved, sparse=sparse)
    assert NAME in str(refused.value)


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_that_do_not_fit_the_config_are_refused(saved, sparse):
    tensors = load_file(saved / "model.safetensors")
    norm = "transformer.ln_f.weight"
    for edit, message in [
        (lambda t: t.pop(norm), norm),
        (lambda t: t.update(odd=torch.zeros(2)), "'odd'"),
        (lambda t: t.update({norm: torch.zeros(2)}), norm),
    ]:
        edited = dict(tensors)
        edit(edited)
        save_file(edited, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            CircuitGPTForCausalLM.from_pretrained(saved, sparse=sparse)


def test_what_a_sparse_run_cannot_do_is_said(saved):
    two = {"transformer": "cpu", "lm_head": "disk", "": "cpu"}
    with pytest.raises(ValueError, match="device_map"):
        CircuitGPTForCausalLM.from_pretrained(
            saved, sparse=True, device_map=two, offload_folder="."
        )
    with pytest.raises(ValueError, match="quantization_config"):
        CircuitGPTForCausalLM.from_pretrained(saved, sparse=True, quantization_config={"x": 1})
    assert CircuitGPTForCausalLM.from_pretrained(saved, device_map="auto")
