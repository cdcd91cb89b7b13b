import pytest
import torch
from torch import nn

from hf_circuit_sparsity import TopKAdamW, sparse_param_groups


def rule_of(groups):
    """Parameter name → (sparse, min_nonzeros, row_dim, weight_decay)."""
    return {
        name: (g["sparse"], g["min_nonzeros"], g["row_dim"], g["weight_decay"])
        for g in groups
        for name, _ in g["params"]
    }


# Settings of the groups, and the rules of some parameters under them.
RULES = {
    "gpt2": ({}, {
        "transformer.wte.weight": (True, 0, 0, 0.1),
        "transformer.wpe.weight": (True, 0, 0, 0.1),
        "transformer.h.1.attn.c_attn.weight": (True, 4, 1, 0.1),  # Conv1D
        "transformer.h.1.mlp.c_proj.bias": (True, 0, 0, 0.0),
        "transformer.h.0.ln_1.weight": (False, 0, 0, 0.0),
        "transformer.ln_f.bias": (False, 0, 0, 0.0),
    }),
    "gpt2, weights alone": ({"sparse_embeddings": False, "sparse_biases": False}, {
        "transformer.wte.weight": (False, 0, 0, 0.1),
        "transformer.h.0.mlp.c_fc.bias": (False, 0, 0, 0.0),
        "transformer.h.0.mlp.c_fc.weight": (True, 4, 1, 0.1),
    }),
    "gpt2, by name": (
        {"exclude_parameters": ["*.mlp.*"],
         "include_parameters": ["*.ln_?.weight", "*.mlp.c_fc.*"]}, {
        "transformer.h.0.ln_1.weight": (True, 0, 0, 0.0),
        "transformer.h.0.mlp.c_fc.weight": (False, 0, 0, 0.1),  # exclude wins
        "transformer.h.0.attn.c_proj.weight": (True, 4, 1, 0.1),
    }),
    "llama": ({"weight_decay": 0.3, "min_nonzeros": 2}, {
        "model.embed_tokens.weight": (True, 0, 0, 0.3),
        "lm_head.weight": (True, 0, 0, 0.3),  # the unembedding has no row minimum
        "model.layers.0.self_attn.q_proj.weight": (True, 2, 0, 0.3),
        "model.layers.0.input_layernorm.weight": (False, 0, 0, 0.0),
        "model.norm.weight": (False, 0, 0, 0.0),
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_of_models(case, make_gpt2, make_llama):
    model = make_gpt2() if case.startswith("gpt2") else make_llama()
    settings, expected = RULES[case]
    rules = rule_of(sparse_param_groups(model, **settings))
    assert rules.keys() == dict(model.named_parameters()).keys()  # each once, a tied one too
    assert {name: rules[name] for name in expected} == expected


@pytest.mark.parametrize("argument", ["exclude_parameters", "include_parameters"])
def test_a_pattern_that_matches_nothing_is_named(argument, make_gpt2):
    with pytest.raises(ValueError, match=rf"'\*\.mpl\.\*' in {argument}"):
        sparse_param_groups(make_gpt2(), **{argument: ["*.mpl.*"]})


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


@pytest.mark.parametrize("model", [nn.LayerNorm(4), nn.Linear(4, 4).requires_grad_(False)])
def test_nothing_to_make_sparse(model):
    with pytest.raises(ValueError, match=type(model).__name__):
        sparse_param_groups(model)


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
