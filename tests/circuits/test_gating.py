"""Gates on the nodes of a model, against the same by hand."""

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import (
    ablation_hook,
    hooked,
    hooked_sites,
    mean_ablated,
    mean_activations,
    node_sites,
    recorded_sites,
    task_means,
)
from hf_circuit_sparsity.circuits.gating import GatedModel, norm_size, norms_of
from hf_circuit_sparsity.circuits.task_scores import pair_logits, task_rows, trimmed
from tests.circuits.planted import on_off_task, planted_model, reference_ids


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
