"""Heads of which nothing is open are not attended with, and give what attention would."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_circuit_sparsity.circuits import collapsed_attention
from hf_circuit_sparsity.circuits.ablation import mean_ablated, mean_activations, node_sites
from hf_circuit_sparsity.circuits.collapse import Collapse
from hf_circuit_sparsity.decoders.decoder import decoder_of
from tests.decoders.dense_models import DENSE, circuitgpt

MODELS = {
    "circuitgpt": circuitgpt,
    "circuitgpt with sinks": lambda: circuitgpt(afrac=0.25, sink=True, bias=True),
    "llama": DENSE["llama"],  # with grouped keys and values
    "gpt2": DENSE["gpt2"],
    "qwen3": DENSE["qwen3"],  # with norms of queries and keys
}


def kept_heads(model, layer: int, heads: dict[str, list[int]], share: float = 0.7):
    """Some of every site, but in one layer of queries, keys and values those of some heads only."""
    generator = torch.Generator().manual_seed(0)
    keep = {
        s: torch.rand(site.width, generator=generator) < share
        for s, site in node_sites(model).items()
    }
    for name, some in heads.items():
        site = keep[f"h.{layer}.attn.{name}"]
        shared = decoder_of(model).n_key_value_heads
        whole = site.view(shared, -1)
        whole[[h for h in range(shared) if h not in some]] = False
    return keep


@pytest.mark.parametrize("padded", [None, "left", "one"])
@pytest.mark.parametrize(
    "heads",
    [
        {"q": [0], "k": [0], "v": [0]},
        {"q": [0], "k": [1], "v": []},
        {"q": [], "k": [], "v": []},
        {"q": [], "k": [], "v": [1]},
        {"v": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_all_heads(name, heads, padded):
    torch.manual_seed(0)
    model = MODELS[name]()
    for layer in decoder_of(model).layers:
        sink = getattr(layer.attention, "attn_imp", None)
        if sink is not None:
            sink.sink_logit.normal_()
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[1, : 0 if padded == "one" else 2] = 0
    means, keep = mean_activations(model, ids.flip(0)), kept_heads(model, 0, heads)
    seen = mask.bool()
    with mean_ablated(model, keep, means):
        expected = model(ids, attention_mask=mask).logits[seen]
        with Collapse(model, keep, means).running():
            logits = model(ids, attention_mask=mask).logits[seen]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("sink, counted", [(False, [1]), (True, [0, 1])])
@torch.no_grad()
def test_only_heads_that_count_are_attended_with(monkeypatch, sink, counted):
    model = circuitgpt(sink=sink)
    seen = []

    def watched(attend):
        def inner(module, query, key, value, *args, **kwargs):
            seen.append(key.shape[1])
            return attend(module, query, key, value, *args, **kwargs)

        return inner

    heads = {"q": [0], "k": [], "v": [1]}  # a query alone moves what a sink leaves of a value
    keep = kept_heads(model, 0, heads)
    keep["h.1.attn.v"][:] = True
    means = mean_activations(model, torch.arange(12)[None])
    monkeypatch.setattr(
        collapsed_attention, "sdpa_attention_with_sink",
        watched(collapsed_attention.sdpa_attention_with_sink),
    )  # fmt: skip
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched(ALL_ATTENTION_FUNCTIONS["sdpa"])
    )
    with mean_ablated(model, keep, means), Collapse(model, keep, means).running():
        model(torch.arange(12)[None])
    everything = model.config.n_head
    assert seen == [len(counted), everything]


def test_other_implementations_keep_all_their_heads():
    model = circuitgpt()
    model.set_attn_implementation("eager")
    keep = kept_heads(model, 0, {"q": [0], "k": [0], "v": [0]})
    means = mean_activations(model, torch.arange(12)[None])
    with mean_ablated(model, keep, means), Collapse(model, keep, means).running():
        output = model(torch.arange(12)[None], output_attentions=True)
    assert output.attentions[0].shape[1] == model.config.n_head
    assert model.config._attn_implementation == "eager"
