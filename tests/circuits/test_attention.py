"""Attention of circuits: which heads are theirs, and how alike two patterns are."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_circuit_sparsity import verify_circuit
from hf_circuit_sparsity.circuits.attention import attention_patterns, overlap, value_heads
from tests.circuits.planted import PLANTED_NODES, on_off_task, planted_circuit, planted_model


def test_the_sink_counts_as_a_key():
    half, rest = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.5, 0.0]]])
    assert overlap(half, half) == 1.0
    assert overlap(half, rest) == 0.5
    assert overlap(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])) == 0.0
    assert overlap(half, torch.zeros(1, 1, 2)) == 0.0


def test_heads_of_values_that_are_shared():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, vocab_size=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert value_heads(model, {"h.1.attn.v": [4, 7], "h.0.attn.q": [1]}) == {1: [2, 3]}
    assert value_heads(model, {"h.0.attn.v": [0, 5]}) == {0: [0, 1, 2, 3]}
    assert value_heads(planted_model(), PLANTED_NODES) == {0: [1]}


def test_agreement_falls_where_alone_the_head_looks_elsewhere():
    """Queries and keys of the circuit's head follow a channel that the circuit leaves out."""
    model, task = planted_model(noise=0.0), on_off_task()
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight
        weight[4, 2], weight[8 + 4, 0] = 8.0, 8.0  # head 1: looks at "on", away from "off"

    def agreement(**nodes):
        circuit = planted_circuit(model, nodes={**PLANTED_NODES, **nodes})
        return verify_circuit(
            circuit, model, task, prompts=40, others=[], adversarial={}, random_circuits=2,
            progress=False,
        )["attention agreement"].value  # fmt: skip

    attended = {"h.0.attn.act_in": [0, 2], "h.0.attn.q": [4], "h.0.attn.k": [4]}
    assert agreement(**attended) == pytest.approx(1.0, abs=1e-5)
    assert agreement() < 0.9
    pattern = attention_patterns(model, task.test[0]["input_ids"], [0])[0][1]
    assert pattern.max() > 0.9
