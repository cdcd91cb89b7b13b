"""Circuits of every architecture that is described: cutting, edges, search, checks, pages."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_circuit_sparsity import (
    Circuit,
    PruningConfig,
    find_circuit,
    plot_circuit,
    verify_circuit,
    write_report,
)
from hf_circuit_sparsity.circuits.ablation import hooked, mean_ablated, reference_means
from hf_circuit_sparsity.circuits.edges import (
    circuit_edges,
    count_edges,
    cut_offsets,
    edge_hooks,
)
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.decoders.decoder import decoder_of
from tests.circuits.planted import NO, OFF, ON, YES, on_off_task, reference_ids
from tests.decoders.dense_models import DENSE, PARALLEL, circuitgpt

MODELS = {name: make for name, make in {**DENSE, **PARALLEL}.items() if name != "circuitgpt"}


@torch.no_grad()
def planted(make) -> nn.Module:
    """ "on" in the prompt is answered by "yes", "off" by "no"; all other weights are small noise.

    Value channel 5 averages the on/off channel 0 over the prompt into channel 3; neuron 7 of the
    second layer writes it to channel 4, which the unembedding reads. Channel 2 is always on: it
    opens the neuron's gate and is the unembedding's bias.
    """
    model = make()
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 32  # the whole prompt
    generator = torch.Generator().manual_seed(0)
    embeddings, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    unembedding.weight = nn.Parameter(torch.zeros(unembedding.weight.shape))  # untied
    gemma = "gemma" in model.config.model_type
    for name, parameter in model.named_parameters():
        noise = 0.01 * torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "ln_" in name:
            noise = torch.full_like(noise, float(name.endswith("weight") and not gemma))
        elif gemma and ("o_proj" in name or "down_proj" in name):
            noise *= 0.0  # the norm that follows would make it large
        parameter.copy_(noise)
    embeddings.weight[:, 2] = 1.0
    embeddings.weight[ON, 0], embeddings.weight[OFF, 0] = 1.5, -1.5
    weights = {(p.source, t.site, t.gate): (p, t) for p in decoder_of(model).projections()
               for t in p.targets}  # fmt: skip

    def write(source: str, column: int, target: str, row: int, value: float, gate=False) -> None:
        projection, part = weights[source, target, gate]
        row = row if part.rows is None else int(part.rows[row])
        projection.weight()[row, column] = value

    write("h.0.attn.act_in", 0, "h.0.attn.v", 5, 2.0)
    write("h.0.attn.v", 5, "h.0.attn.resid_delta", 3, 3.0)
    write("h.1.mlp.act_in", 3, "h.1.mlp.post_act", 7, 1.5)
    if ("h.1.mlp.act_in", "h.1.mlp.post_act", True) in weights:
        write("h.1.mlp.act_in", 2, "h.1.mlp.post_act", 7, 2.0, gate=True)
    else:
        for token, sign in ((YES, -1), (NO, 1)):
            unembedding.weight[token, 2] = sign * 0.8
    write("h.1.mlp.post_act", 7, "h.1.mlp.resid_delta", 4, 2.0)
    unembedding.weight[YES, 4], unembedding.weight[NO, 4] = 1.5, -1.5
    return model.eval()


PATH = {
    "h.0.attn.act_in": 0,
    "h.0.attn.v": 5,
    "h.0.attn.resid_delta": 3,
    "h.1.mlp.act_in": 3,
    "h.1.mlp.post_act": 7,
    "h.1.mlp.resid_delta": 4,
}


@torch.no_grad()
def logits(model):
    return model(reference_ids(), use_cache=False).logits


@pytest.mark.parametrize("make", [circuitgpt, *MODELS.values()], ids=["circuitgpt", *MODELS])
@pytest.mark.parametrize(
    "site", ["h.0.attn.act_in", "h.1.attn.v", "h.1.mlp.act_in", "h.1.mlp.post_act"]
)
def test_edges_are_the_nonzero_weights(make, site):
    """Cutting all that leaves a node changes what its readers get, and nothing else."""
    model = make()
    decoder = decoder_of(model)
    everything = {name: list(range(s.width)) for name, s in decoder.node_sites().items()}
    with torch.no_grad():
        for projection in decoder.projections():
            weight = projection.weight()
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    edges = circuit_edges(model, everything)
    assert count_edges(model, everything) == len(edges)
    weights = [projection.weight() for projection in decoder.projections()]
    assert len(edges) == sum(int((w != 0).sum()) for w in weights)
    means = reference_means(model, reference_ids())
    cut = [e for e in edges if (e.source_site, e.source) == (site, 3)]
    with hooked(edge_hooks(model, cut, cut_offsets(cut, means))):
        edges_cut = logits(model)
    if not site.endswith(".v"):  # whose mean is that of what attention makes of it
        keep = {name: torch.ones(s.width, dtype=bool) for name, s in decoder.node_sites().items()}
        keep[site][3] = False
        with mean_ablated(model, keep, means.nodes):
            torch.testing.assert_close(edges_cut, logits(model), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(edges_cut, logits(model))
    by_hand = decoder.projections()
    with torch.no_grad():
        for edge in cut:
            (matrix,) = (
                (p, t)
                for p in by_hand
                for t in p.targets
                if (p.source, t.site, t.gate) == (edge.source_site, edge.target_site, edge.gate)
            )
            projection, target = matrix
            row = edge.target if target.rows is None else int(target.rows[edge.target])
            assert projection.weight()[row, edge.column] == edge.weight
            projection.weight()[row, edge.column] = 0.0
    with hooked(edge_hooks(model, [], cut_offsets(cut, means))):
        torch.testing.assert_close(edges_cut, logits(model), rtol=1e-3, atol=1e-4)


# A search takes seconds: the others are built like these.
SEARCHED = ("gpt2", "llama with four heads on two keys", "gemma2", "gpt_neox with parallel layers")


@pytest.mark.parametrize(
    "make",
    [pytest.param(m, id=n, marks=[] if n in SEARCHED else [pytest.mark.slow]) for n, m in
     MODELS.items()],
)  # fmt: skip
def test_the_planted_circuit_is_found_kept_and_shown(make, tmp_path):
    model, task = planted(make), on_off_task()
    config = PruningConfig(
        max_steps=150, batch_size=32, selection_prompts=120, prune_edges=True, learning_rate=1e-2
    )
    circuit = find_circuit(model, task, config, reference=reference_ids(), progress=False)
    assert circuit.metrics["circuit_accuracy"] >= 0.95
    for site, node in PATH.items():
        assert node in circuit.nodes.get(site, []), site
    assert len(circuit) <= 12
    circuit.save_pretrained(tmp_path)
    loaded = Circuit.from_pretrained(tmp_path)
    with loaded.apply(model), torch.no_grad():
        through = model(reference_ids()).logits
    with circuit.apply(model), torch.no_grad():
        assert torch.equal(through, model(reference_ids()).logits)
        labelled = model(reference_ids(), labels=reference_ids())
    expected = cross_entropy(through[:, :-1].flatten(0, 1), reference_ids()[:, 1:].flatten())
    torch.testing.assert_close(labelled.loss, expected)
    with circuit.apply(model, calibrated=False), torch.no_grad():
        scaled = circuit.calibration.logits(model(reference_ids()).logits)
    torch.testing.assert_close(through, scaled)
    plot_circuit(circuit, tmp_path / "circuit.png", model, task.tokenizer)
    page = write_report(
        circuit, tmp_path / "page.html", model, task.tokenizer, task=task,
        reference=reference_ids(), config=ReportConfig(), progress=False,
    )  # fmt: skip
    assert page.stat().st_size > 10_000


def test_a_circuit_of_a_llama_passes_its_checks():
    model, task = planted(MODELS["llama"]), on_off_task()
    # Verifying searches nine times more, likewise.
    config = PruningConfig(max_steps=50, batch_size=8, selection_prompts=60, learning_rate=3e-2)
    circuit = find_circuit(model, task, config, reference=reference_ids(), progress=False)
    checks = verify_circuit(
        circuit, model, task, prompts=60, random_circuits=4, reference=reference_ids()
    )
    assert checks["sufficiency"].passed and checks["necessity"].passed
