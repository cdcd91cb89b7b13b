import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hf_circuit_sparsity import sparse_from_config, sparse_param_groups, sparsify_initialization_
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers
from hf_circuit_sparsity.optim.projection import nonzero_budget
from hf_circuit_sparsity.optim.sparse_init import _Drawn
from tests.decoders.dense_models import DENSE


def matrices(model):
    return {
        name: (p, group)
        for group in sparse_param_groups(model)
        for name, p in group["params"]
        if group["sparse"] and p.ndim > 1
    }


@pytest.mark.parametrize("support", ["random", "magnitude"])
def test_every_matrix_gets_its_budget_and_keeps_its_size(support, make_gpt2):
    model = make_gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    thinned = sparsify_initialization_(model, 1 / 8, support=support, seed=5)
    assert set(thinned) == set(matrices(model))
    for name, (p, group) in matrices(model).items():
        rows = p.shape[group["row_dim"]]
        kept = p != 0
        budget = max(nonzero_budget(p.numel(), 1 / 8), rows * group["min_nonzeros"])
        assert int(kept.sum()) == thinned[name] == budget
        scale = (p.detach() / before[name])[kept]
        torch.testing.assert_close(scale, torch.full_like(scale, scale[0].item()))
        torch.testing.assert_close(p.norm(), before[name].norm())
        counts = kept.sum(dim=1 - group["row_dim"])
        if support == "random":
            assert int(counts.max() - counts.min()) <= 1
        elif not group["min_nonzeros"]:
            assert before[name][kept].abs().min() >= before[name][~kept].abs().max()
        assert int(counts.min()) >= group["min_nonzeros"]
    for name, p in model.named_parameters():
        if name not in thinned:
            assert torch.equal(p, before[name])


def test_what_is_sparse_already_is_left_alone(make_gpt2):
    model = make_gpt2()
    sparsify_initialization_(model, 1 / 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sparsify_initialization_(model, 1 / 8, seed=9) == {}
    assert sparsify_initialization_(model, 1 / 4, seed=9) == {}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_seeds(make_gpt2):
    models = [make_gpt2() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        sparsify_initialization_(model, 0.1, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.transformer.wte.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bad_input(make_gpt2):
    with pytest.raises(ValueError, match="density"):
        sparsify_initialization_(make_gpt2(), 0)
    with pytest.raises(ValueError, match="support='wheel'"):
        sparsify_initialization_(make_gpt2(), 0.1, support="wheel")
    with pytest.raises(ValueError, match="no trainable parameter"):
        sparsify_initialization_(nn.LayerNorm(3), 0.1)


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_a_model_of_any_architecture_is_born_as_a_thinned_out_one(make):
    config = make().config
    state = torch.get_rng_state()
    born = sparse_from_config(config, 1 / 4, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(born) is type(make()) and sparse_layers(born)
    torch.manual_seed(0)
    thinned = type(born)(config)
    sparsify_initialization_(thinned, 1 / 4)
    found, again = born.state_dict(), sparse_from_config(config, 1 / 4, seed=2).state_dict()
    assert found.keys() == thinned.state_dict().keys()
    for name, p in thinned.state_dict().items():
        if p.ndim < 2:
            assert torch.equal(found[name], p), name
        else:
            assert torch.count_nonzero(found[name]) == torch.count_nonzero(p), name
            # Of a few hundred draws. GPT-2 draws some with less, the deeper it is.
            assert found[name].norm() == pytest.approx(float(p.norm()), rel=0.2), name
        assert torch.equal(found[name], again[name]), name
    for name, buffer in born.named_buffers():
        if name in dict(thinned.named_buffers()):  # those of positions and masks
            assert torch.equal(buffer, thinned.get_buffer(name)), name


def test_rows_of_a_born_matrix_are_filled_alike_whatever_way_it_is_stored(make_gpt2):
    born = sparse_from_config(make_gpt2().config, 1 / 6)
    weight = born.transformer.h[0].mlp.c_fc.weight  # inputs × outputs
    per_neuron = (weight != 0).sum(0)
    assert weight.shape == (24, 96) and per_neuron.min() == per_neuron.max() == 4


def test_deviations_are_read_off_whatever_is_passed():
    w = torch.empty(3, 4, device="meta")
    draws = {
        1.0: [lambda: w.normal_(), lambda: w.normal_(2.0)],
        0.3: [lambda: w.normal_(2.0, 0.3), lambda: nn.init.normal_(w, std=0.3)],
        12**-0.5: [lambda: w.uniform_(), lambda: w.uniform_(2.0, 3.0)],
        0.5 * 12**-0.5: [lambda: w.uniform_(0.5), lambda: nn.init.uniform_(w, 0.5, 1.0)],
    }
    for expected, calls in draws.items():
        for call in calls:
            with _Drawn() as drawn:
                call()
            assert drawn.deviations == {id(w): pytest.approx(expected)}


def test_a_padding_row_stays_empty(make_llama):
    born = sparse_from_config(make_llama(pad_token_id=3).config, 1 / 2)
    assert not born.get_input_embeddings().weight[3].any()


def test_experts_are_refused():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="experts"):
        sparse_from_config(config, 1 / 4)
