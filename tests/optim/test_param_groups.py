import pytest
import torch
from torch import nn

from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW


def rule_of(groups):
    """Parameter name → (sparse, min_nonzeros, row_dim, weight_decay)."""
    return {
        name: (g["sparse"], g["min_nonzeros"], g["row_dim"], g["weight_decay"])
        for g in groups
        for name, _ in g["params"]
    }


def test_gpt2(make_gpt2):
    model = make_gpt2()
    rules = rule_of(sparse_param_groups(model))
    assert rules.keys() == dict(model.named_parameters()).keys()  # each once, the tied one too
    assert rules["transformer.wte.weight"] == (True, 0, 0, 0.1)
    assert rules["transformer.wpe.weight"] == (True, 0, 0, 0.1)
    assert rules["transformer.h.1.attn.c_attn.weight"] == (True, 4, 1, 0.1)  # Conv1D
    assert rules["transformer.h.1.mlp.c_proj.bias"] == (True, 0, 0, 0.0)
    assert rules["transformer.h.0.ln_1.weight"] == (False, 0, 0, 0.0)
    assert rules["transformer.ln_f.bias"] == (False, 0, 0, 0.0)
    rules = rule_of(sparse_param_groups(model, sparse_embeddings=False, sparse_biases=False))
    assert not rules["transformer.wte.weight"][0]
    assert not rules["transformer.h.0.mlp.c_fc.bias"][0]
    assert rules["transformer.h.0.mlp.c_fc.weight"][0]


def test_llama(make_llama):
    model = make_llama()
    rules = rule_of(sparse_param_groups(model, weight_decay=0.3, min_nonzeros=2))
    assert rules.keys() == dict(model.named_parameters()).keys()
    assert rules["model.embed_tokens.weight"] == (True, 0, 0, 0.3)
    assert rules["lm_head.weight"] == (True, 0, 0, 0.3)  # the unembedding has no row minimum
    assert rules["model.layers.0.self_attn.q_proj.weight"] == (True, 2, 0, 0.3)
    assert rules["model.layers.0.input_layernorm.weight"] == (False, 0, 0, 0.0)
    assert rules["model.norm.weight"] == (False, 0, 0, 0.0)


def test_patterns(make_gpt2):
    model = make_gpt2()
    rules = rule_of(
        sparse_param_groups(
            model,
            exclude_parameters=["*.mlp.*"],
            include_parameters=["*.ln_?.weight", "*.mlp.c_fc.*"],
        )
    )
    assert rules["transformer.h.0.ln_1.weight"] == (True, 0, 0, 0.0)
    assert not rules["transformer.h.0.mlp.c_fc.weight"][0]  # exclude wins
    assert rules["transformer.h.0.attn.c_proj.weight"][0]
    with pytest.raises(ValueError, match=r"'\*\.mpl\.\*' in exclude"):
        sparse_param_groups(model, exclude_parameters=["*.mpl.*"])
    with pytest.raises(ValueError, match="'nothing' in include"):
        sparse_param_groups(model, include_parameters=["nothing"])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.bigram_table = nn.Parameter(torch.zeros(5, 5))
        self.sink_logit = nn.Parameter(torch.zeros(2))
        self.experts = nn.Parameter(torch.zeros(3, 4, 5))
        self.norm = nn.RMSNorm(6)


def test_own_parameters_stay_dense_and_frozen_ones_are_left_out():
    rules = rule_of(sparse_param_groups(Odd()))
    assert rules == {
        "linear.weight": (True, 4, 0, 0.1),
        "linear.bias": (True, 0, 0, 0.0),
        "bigram_table": (False, 0, 0, 0.1),
        "sink_logit": (False, 0, 0, 0.0),
        "experts": (False, 0, 0, 0.1),
        "norm.weight": (False, 0, 0, 0.0),
    }
    rules = rule_of(sparse_param_groups(Odd(), include_parameters=["experts"]))
    assert rules["experts"] == (True, 4, 0, 0.1)


def test_nothing_to_make_sparse():
    with pytest.raises(ValueError, match="LayerNorm has no trainable parameter to make sparse"):
        sparse_param_groups(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="no trainable parameter"):
        sparse_param_groups(nn.Linear(4, 4).requires_grad_(False))


def test_groups_fit_the_optimizer_and_any_other(make_llama):
    model = make_llama()
    optimizer = TopKAdamW(
        sparse_param_groups(model), target_density=0.05, anneal_start=0, anneal_end=0
    )
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    q = model.model.layers[0].self_attn.q_proj.weight
    assert int(torch.count_nonzero(q)) == 24 * 4  # the row minimum: 5 % of 24 × 24 is less
    assert int(torch.count_nonzero(q, dim=1).min()) == 4
    assert int(torch.count_nonzero(model.lm_head.weight)) == round(0.05 * 61 * 24)
    assert int(torch.count_nonzero(model.model.norm.weight)) == 24
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert optimizer.param_groups[0]["param_names"] == names
    torch.optim.SGD(sparse_param_groups(model), lr=0.1).step()
