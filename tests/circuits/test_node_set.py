"""Circuits as sets, tables and graphs; interventions on their nodes; names of nodes."""

import json
from dataclasses import replace

import networkx
import pytest
import torch

from hf_circuit_sparsity import ArtifactError, Circuit
from hf_circuit_sparsity.circuits.ablation import hooked_sites, recorded_sites
from hf_circuit_sparsity.circuits.card import circuit_card
from hf_circuit_sparsity.circuits.evaluation.verification import random_circuit
from hf_circuit_sparsity.circuits.node_set import as_node, site_order
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_loss, task_rows
from tests.circuits.planted import (
    PLANTED_EDGES,
    PLANTED_NODES,
    full_circuit,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
    word_tokenizer,
)

NEURON = ("h.1.mlp.post_act", 7)
NAME = "h.1.mlp.post_act.7"


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def circuit(model):
    return planted_circuit(model, names={NAME: "on or off"}, notes={NAME: "the only neuron"})


def test_nodes_are_a_set(circuit):
    nodes = {(site, i) for site, ids in PLANTED_NODES.items() for i in ids}
    assert set(circuit) == nodes and len(list(circuit)) == len(circuit)
    assert NEURON in circuit and NAME in circuit
    assert ("h.1.mlp.post_act", 6) not in circuit and "no node" not in circuit and 7 not in circuit
    smaller = circuit.without(NAME)
    assert set(smaller) == nodes - {NEURON} and smaller.with_nodes(NEURON) == circuit
    other = smaller.with_nodes("h.0.attn.q.1")
    assert set(circuit | other) == nodes | {("h.0.attn.q", 1)}
    assert set(circuit & other) == nodes - {NEURON} and set(circuit - other) == {NEURON}
    assert circuit.jaccard(other) == (len(nodes) - 1) / (len(nodes) + 1)
    assert circuit.without(*circuit).jaccard(circuit.without(*circuit)) == 1


def test_nodes_come_in_the_order_of_computation(model, circuit):
    shuffled = replace(circuit, nodes=dict(reversed(circuit.nodes.items())))
    sites = list(model.node_sites())
    assert [s for s, _ in shuffled] == sorted((s for s, _ in circuit), key=sites.index)
    assert sorted(sites, key=site_order) == sites
    assert site_order("h.10.attn.q") > site_order("h.9.mlp.resid_delta")


@pytest.mark.parametrize("node", ["q", "h.0.attn.q", ("h.0.attn.q",), ("h.0.attn.q", "1")])
def test_what_is_no_node_is_refused(circuit, node):
    with pytest.raises(ValueError, match=r"expected a node"):
        as_node(node)
    with pytest.raises(ValueError, match=r"expected a node"):
        circuit.without(node)


def test_nodes_that_are_not_there_are_refused(model, circuit):
    for change in (circuit.without, circuit.with_nodes):
        with pytest.raises(ValueError, match=r"99"):
            change("h.0.attn.q.99")
    with pytest.raises(ValueError, match=r"99"), circuit.ablate(model, ["h.0.attn.q.99"]):
        pass


def test_what_no_longer_holds_is_dropped(model):
    full = full_circuit(model, names={NAME: "on or off"}, verification={"x": {"value": 1.0}})
    smaller = full.without(("h.0.attn.v", 5))
    assert not smaller.metrics and not smaller.verification and smaller.kept_edges is None
    assert not smaller.edge_offsets and smaller.config == {"seed": 0}
    assert smaller.tokens == full.tokens and smaller.names == full.names
    assert smaller.calibration == full.calibration
    assert not full.without(NAME).names
    assert full.metrics and full.kept_edges  # the circuit itself is as it was


def test_tokens_are_combined_too(model, circuit):
    full = full_circuit(model)
    assert (full | circuit).tokens is None and (circuit | full).tokens is None
    assert (full & replace(full, tokens=[full.tokens[0]])).tokens == [full.tokens[0]]
    assert (full - circuit).tokens == full.tokens
    for both in (full & circuit, circuit & full):  # all tokens, and those that one names
        assert both.tokens == full.tokens and torch.equal(both.token_mean, full.token_mean)
    assert (circuit - full).tokens is None and (circuit - full).token_mean is None
    none = full & replace(full, tokens=[t for t in range(16) if t not in full.tokens])
    assert none.tokens == [] and none.token_mean is not None


def test_circuits_of_two_models_are_not_combined(circuit):
    with pytest.raises(ValueError, match="two models"):
        circuit | replace(circuit, model_fingerprint="0" * 16)
    with pytest.raises(TypeError):
        circuit | {"h.0.attn.q"}


def test_equal_is_what_computes_the_same(model, circuit):
    again = planted_circuit(model)
    assert again == circuit and again is not circuit  # names do not count
    assert circuit != again.without(NAME) and circuit != "a circuit"
    assert circuit != replace(again, means={s: m + 1 for s, m in again.means.items()})
    full = full_circuit(model)
    assert full == replace(full, kept_edges=full.kept_edges[::-1], metrics={})
    assert full != replace(full, kept_edges=None)
    assert full != replace(full, token_mean=full.token_mean + 1)
    with pytest.raises(TypeError):
        hash(circuit)


def test_one_line_says_what_it_is(model):
    text = repr(full_circuit(model))
    assert "\n" not in text and len(text) < 200
    assert "'on_off'" in text and "4 edges" in text and "0.010" in text and "me/planted" in text


def test_a_notebook_shows_a_graph_and_no_html_of_others(model):
    hostile = "<script>alert(1)</script>"
    html = full_circuit(model, names={NAME: hostile}, notes={NAME: hostile})._repr_html_()
    assert "<svg" in html and html.count("<rect") == len(PLANTED_NODES)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert html.count("<line") >= len(PLANTED_EDGES)
    large = {"h.0.mlp.post_act": list(range(16)), "h.1.mlp.post_act": list(range(16))}
    assert len(planted_circuit(model, nodes=large)._repr_html_()) < 100_000


def test_a_large_circuit_is_not_drawn_in_a_notebook():
    site = "h.0.mlp.post_act"
    circuit = Circuit({site: list(range(300))}, {site: torch.zeros(400)}, "wide", "0" * 16)
    html = circuit._repr_html_()
    assert "300 nodes" in html and "<rect" not in html and len(html) < 3000


def test_graph_table_and_json_say_the_same(model, circuit):
    graph, nodes, edges = circuit.to_networkx(model), circuit.to_pandas(), circuit.to_pandas(model)
    assert set(graph) == set(nodes["node"]) and len(edges) == graph.number_of_edges()
    assert graph.nodes[NAME]["name"] == "on or off" and nodes["name"].tolist().count("") == 5
    weights = {(s, t): data["weight"] for s, t, data in graph.edges(data=True)}
    assert weights["h.1.mlp.act_in.3", NAME] == pytest.approx(1.5)
    assert dict(zip(zip(edges["source"], edges["target"], strict=True), edges["weight"],
                    strict=True)) == weights  # fmt: skip
    assert networkx.is_directed_acyclic_graph(graph)
    content = json.loads(circuit.to_json(model))
    assert len(content["edges"]) == len(weights) and content["nodes"] == circuit.nodes
    assert "edges" not in json.loads(circuit.to_json())


def test_neuronpedias_schema(model, circuit):
    graph = circuit.to_neuronpedia(model, word_tokenizer())
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    tokens = circuit.example["token_ids"]
    assert len(nodes) == len(circuit) + len(tokens) + 2
    assert len(graph["metadata"]["prompt_tokens"]) == len(tokens)
    for link in graph["links"]:
        assert link["source"] in nodes and link["target"] in nodes and link["weight"] != 0
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(graph["metadata"])
    for node in nodes.values():
        assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId"} <= set(node)
        assert 0 <= node["ctx_idx"] < len(tokens)
    neuron = next(node for node in nodes.values() if node["clerp"] == "on or off")
    assert neuron["layer"] == "3" and neuron["activation"] is not None
    target = [node for node in nodes.values() if node["is_target_logit"]]
    assert len(target) == 1 and target[0]["token_prob"] > 0.5
    # From a token to an answer there is a way through the circuit.
    paths = networkx.DiGraph((link["source"], link["target"]) for link in graph["links"])
    ends = [n for n in nodes if n.startswith("E_") and n in paths]
    assert any(networkx.has_path(paths, token, target[0]["node_id"]) for token in ends)
    json.dumps(graph, allow_nan=False)
    with pytest.raises(ValueError, match="example"):
        replace(circuit, example={}).to_neuronpedia(model, word_tokenizer())


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_ablating_is_what_a_plain_hook_does(model, circuit, alone):
    ids = reference_ids()[:4]
    mean = circuit.means["h.1.mlp.post_act"]

    def hook(module, args, output):
        output = output.clone()
        output[..., 7] = mean[7]
        return output

    with circuit.ablate(model, [NAME], alone=alone):
        found = model(ids).logits
    if alone:
        with circuit.apply(model), hooked_sites(model, {"h.1.mlp.post_act": hook}):
            expected = model(ids).logits
    else:
        with hooked_sites(model, {"h.1.mlp.post_act": hook}):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_patching_takes_what_nodes_are_on_the_other_prompt(model, circuit, alone):
    row = circuit.example
    ids = torch.tensor([row["token_ids"]])
    other = torch.tensor([row["counterfactual_token_ids"]])
    right, wrong = row["target_id"], row["counterfactual_target_id"]
    with (
        circuit.patch(model, [NEURON], other, alone=alone),
        recorded_sites(model, ["h.1.mlp.resid_delta"]) as patched,
    ):
        logits = model(ids).logits[0, -1]
    assert logits[wrong] > logits[right]  # the one neuron carries the answer
    plain = model(ids).logits[0, -1]
    assert plain[right] > plain[wrong]
    assert patched["h.1.mlp.resid_delta"].shape[1] == ids.shape[1]


def test_effects_of_nodes_are_those_of_the_page(model, circuit):
    table = circuit.node_effects(model, on_off_task(), prompts=20)
    assert list(table.columns) == ["node", "site", "index", "name", "effect"]
    assert set(table["node"]) == {f"{site}.{i}" for site, i in circuit}
    assert table["effect"].is_monotonic_decreasing and table["effect"].iloc[0] > 0.3
    by_node = dict(zip(table["node"], table["effect"], strict=True))
    rows = task_rows(on_off_task().tensors("test"), slice(20))
    with circuit.ablate(model, [NAME]):
        without = binary_loss(all_pair_logits(model, rows)).item()
    with circuit.apply(model):
        whole = binary_loss(all_pair_logits(model, rows)).item()
    assert by_node[NAME] == pytest.approx(without - whole, abs=1e-5)


def test_names_and_notes_are_stored_and_on_the_card(circuit, tmp_path):
    circuit.save_pretrained(tmp_path)
    again = Circuit.from_pretrained(tmp_path)
    assert again.names == circuit.names and again.notes == circuit.notes
    card = str(circuit_card({"": circuit.to_dict()}, repo_id="me/circuit"))
    assert "on or off" in card and "the only neuron" in card


def test_nodes_are_labelled(model):
    circuit = planted_circuit(model)
    circuit.label(NEURON, "on or off", note="a note")
    assert circuit.names == {NAME: "on or off"} and circuit.notes == {NAME: "a note"}
    circuit.label(NAME, "switch")
    assert circuit.names == {NAME: "switch"} and not circuit.notes
    with pytest.raises(ValueError, match="not in the circuit"):
        circuit.label("h.1.mlp.post_act.6", "other")


def test_a_random_circuit_of_a_labelled_one_has_other_nodes_and_no_labels(circuit):
    drawn = random_circuit(circuit, torch.Generator().manual_seed(1))
    assert circuit.names and not drawn.names and not drawn.notes
    assert len(drawn) == len(circuit) and set(drawn) != set(circuit)


@pytest.mark.parametrize("field", ["names", "notes"])
@pytest.mark.parametrize("value", [{"h.0.mlp.post_act.1": "elsewhere"}, {"nothing": "x"}])
def test_names_of_what_is_not_in_the_circuit_are_refused(circuit, field, value):
    with pytest.raises(ValueError, match=field):
        replace(circuit, **{field: value})


def test_a_name_is_one_short_line(circuit, tmp_path):
    for name in ("two\nlines", "x" * 81):
        with pytest.raises(ArtifactError, match="names"):
            replace(circuit, names={NAME: name}).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
