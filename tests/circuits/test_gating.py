"""Gates on the nodes of a model, against the same by hand."""

import pytest
import torch

from hf_circuit_sparsity import CircuitGPTConfig
from hf_circuit_sparsity.circuits.ablation import (
    ablation_hook,
    hooked,
    hooked_sites,
    mean_ablated,
    mean_activations,
    measuring,
    node_sites,
    recorded_sites,
    task_means,
)
from hf_circuit_sparsity.circuits.gating import GatedModel, norm_size, norms_of
from hf_circuit_sparsity.circuits.task_scores import pair_logits, task_rows, trimmed
from hf_circuit_sparsity.decoders.circuitgpt import CircuitGPTDecoder
from hf_circuit_sparsity.decoders.decoder import Decoder
from tests.circuits.planted import on_off_task, planted_model, reference_ids
from tests.conftest import random_model, sparsify


@pytest.fixture(params=["circuitgpt", "llama", "gpt2"])
def model(request, make_llama, make_gpt2):
    if request.param == "circuitgpt":
        return planted_model(noise=0.3)
    return (make_llama if request.param == "llama" else make_gpt2)().eval()


@pytest.fixture
def rows():
    """Prompts of one length, with their counterfactuals."""
    tensors = on_off_task().tensors("train")
    length = int(tensors["attention_mask"].sum(1).mode().values)
    return trimmed(task_rows(tensors, tensors["attention_mask"].sum(1) == length))


def masks_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sites = node_sites(model)
    return {s: torch.rand(site.width, generator=generator) < 0.5 for s, site in sites.items()}


@torch.no_grad()
def test_gates_of_two_circuits_in_one_batch(model, rows):
    means = mean_activations(model, reference_ids())
    keep = [masks_of(model, 0), masks_of(model, 1)]
    expected = []
    for masks in keep:
        with mean_ablated(model, masks, means):
            expected.append(pair_logits(model, rows))
    gates = {site: torch.stack([masks[site] for masks in keep]) for site in means}
    for together in (gates, {site: gate.float() for site, gate in gates.items()}):
        answers = GatedModel(model, means).run(rows, together, copies=2)
        torch.testing.assert_close(answers, torch.cat(expected))


@torch.no_grad()
def test_shut_nodes_are_those_of_the_counterfactual(model, rows):
    means, keep = mean_activations(model, reference_ids()), masks_of(model)
    others = {name: rows[f"counterfactual_{name}"] for name in ("input_ids", "attention_mask")}
    with recorded_sites(model, means) as recorded:
        model(**others, use_cache=False)
    theirs = {site: ablation_hook(keep[site], recorded[site]) for site in means}
    with hooked_sites(model, theirs):
        expected = pair_logits(model, rows)
    gates = {site: mask[None] for site, mask in keep.items()}
    answers = GatedModel(model, means, resample=True).run(rows, gates)
    torch.testing.assert_close(answers, expected)


@torch.no_grad()
def test_frozen_norms_divide_by_what_they_do_in_the_whole_model(model, rows):
    means, keep = mean_activations(model, reference_ids()), masks_of(model)
    gated = GatedModel(model, means, freeze_norms=True)
    everything = {site: torch.ones(1, len(mean), dtype=torch.bool) for site, mean in means.items()}
    torch.testing.assert_close(gated.run(rows, everything), pair_logits(model, rows))
    norms, sizes = norms_of(model), {}
    assert len(norms) == 2 * model.config.num_hidden_layers + 1
    with hooked(
        [(n, lambda m, args, out: sizes.update({m: norm_size(m, args[0])})) for n in norms]
    ):
        pair_logits(model, rows)

    def divided(norm, args, output):
        x, bias = args[0], getattr(norm, "bias", None)
        x = x if bias is None else x - x.mean(-1, keepdim=True)
        return x / sizes[norm] * norm.weight + (0.0 if bias is None else bias)

    gates = {site: mask[None] for site, mask in keep.items()}
    with hooked([(norm, divided) for norm in norms]), mean_ablated(model, keep, means):
        expected = pair_logits(model, rows)
    torch.testing.assert_close(gated.run(rows, gates), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(GatedModel(model, means).run(rows, gates), expected, atol=1e-3)


def test_means_of_prompts_of_several_lengths():
    model, tensors = planted_model(noise=0.3), on_off_task().tensors("train")
    sums, count = {}, 0
    for ids, mask in zip(tensors["input_ids"], tensors["attention_mask"], strict=True):
        prompt = ids[mask.bool()][None]
        for site, mean in mean_activations(model, prompt).items():
            sums[site] = sums.get(site, 0) + mean * prompt.numel()
        count += prompt.numel()
    means = task_means(model, tensors)
    for site, total in sums.items():
        torch.testing.assert_close(means.nodes[site], total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"sink": False, "rms_norm": False, "residual_activation_type": "relu"}, {"d_pos_emb": 4}],
    ids=["default", "other", "positions beside the stream"],
)
def test_the_last_layer_at_the_answer_alone_is_as_everywhere(fields, attention, monkeypatch):
    """Answers and gradients; a model whose positions are beside the stream computes everything."""
    task = on_off_task()
    config = CircuitGPTConfig(
        n_layer=2, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=32, vocab_size=16, **fields
    )
    model = sparsify(random_model(config)).eval()
    model.set_attn_implementation(attention)
    rows = task_rows(task.tensors("train"), slice(24))
    assert len(set(rows["attention_mask"].sum(1).tolist())) > 1  # some are padded
    means = mean_activations(model, reference_ids())
    gates = {s: mask[None].float().requires_grad_() for s, mask in masks_of(model).items()}
    seen = []
    model.transformer.h[-1].mlp.register_forward_hook(lambda m, args, y: seen.append(y.shape[1]))

    def measured():
        answers = GatedModel(model, means).run(rows, gates)
        loss = (answers[:, 0] - answers[:, 1]).square().sum()
        return answers, torch.autograd.grad(loss, list(gates.values()))

    answers, gradients = measured()
    monkeypatch.setattr(CircuitGPTDecoder, "at_last_position", Decoder.at_last_position)
    everywhere, expected = measured()
    torch.testing.assert_close(answers, everywhere)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    length = rows["input_ids"].shape[1]
    assert seen == [length if "d_pos_emb" in fields else 1, length]


def test_while_it_is_measured_a_model_multiplies_nonzeros_and_then_is_as_it_was():
    model = sparsify(random_model(CircuitGPTConfig(n_layer=1, d_model=16, vocab_size=16))).train()
    linear, ids = model.transformer.h[0].mlp.c_fc, reference_ids()[:2]
    expected = model.eval()(ids).logits
    with pytest.raises(KeyError), measuring(model.train()):
        assert not model.training and "forward" in vars(linear)
        torch.testing.assert_close(model(ids).logits, expected)
        raise KeyError
    assert model.training and "forward" not in vars(linear)
