import pytest
import torch
from torch import nn

from hf_circuit_sparsity import sparse_param_groups, sparsify_initialization_
from hf_circuit_sparsity.optim.projection import nonzero_budget


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
