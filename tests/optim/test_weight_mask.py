import pytest
import torch
from torch import nn

from hf_circuit_sparsity.modeling.sparse_layers import to_sparse
from hf_circuit_sparsity.optim.weight_mask import extract_mask
from tests.conftest import random_model, sparsify


def test_masks_are_the_nonzeros_of_the_weights(make_gpt2):
    model = sparsify(make_gpt2())
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:3] = 1.0
        model.transformer.h[0].mlp.c_fc.weight[3:] = 0.0
    graph = extract_mask(model)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    assert set(graph) == set(weights)  # the tied unembedding once
    for name, weight in weights.items():
        assert torch.equal(graph[name], weight != 0)
        assert torch.equal(graph.indices(name), (weight != 0).nonzero().T)
        assert graph.nonzeros(name) == int(torch.count_nonzero(weight))
    assert graph.density("transformer.h.0.mlp.c_fc.weight") == 3 / 24
    total = sum(int(torch.count_nonzero(w)) for w in weights.values())
    assert graph.nonzeros() == total
    assert graph.density() == total / sum(w.numel() for w in weights.values())
    row = {row["name"]: row for row in graph.summary()}["transformer.h.0.mlp.c_fc.weight"]
    assert (row["nonzeros"], row["entries"]) == (3 * 96, 24 * 96)
    assert "12.5000%" in str(graph)


def test_layers_on_their_nonzeros_have_the_same_graph(tiny_config):
    model = sparsify(random_model(tiny_config))
    with torch.no_grad():
        model.lm_head.weight[5] = 0.0
    before = extract_mask(model)
    after = extract_mask(to_sparse(model))
    assert "lm_head.weight" in after
    assert before.shapes == after.shapes
    for name in before:
        assert torch.equal(before[name], after[name])
    assert before.overlap(after) == 1.0
    with torch.no_grad():
        model.lm_head.values[::2] = 0.0
    fewer = extract_mask(model)
    assert before.overlap(fewer) == fewer.nonzeros() / before.nonzeros()
    assert fewer.overlap(before) == 1.0
    with pytest.raises(ValueError, match="one architecture"):
        before.overlap(extract_mask(nn.Linear(2, 2)))


def test_picture(tiny_model, tmp_path):
    tiny_model.transformer.h[0].mlp.c_fc.weight.data.zero_()  # a density that has no logarithm
    path = extract_mask(tiny_model).plot(tmp_path / "mask.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input():
    with pytest.raises(ValueError, match=r"LayerNorm has no nn\.Linear"):
        extract_mask(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="offloaded"):
        extract_mask(nn.Linear(2, 2, device="meta"))
