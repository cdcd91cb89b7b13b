"""What is gathered for a page, held against plain ways to compute it."""

import dataclasses
import json
import re

import pytest
import torch

from hf_circuit_sparsity import Circuit, write_report
from hf_circuit_sparsity.circuits import ablation
from hf_circuit_sparsity.circuits.ablation import (
    hooked,
    hooked_sites,
    mean_ablated,
    node_sites,
    recorded_sites,
    reference_input_ids,
    reference_means,
)
from hf_circuit_sparsity.circuits.attention import attention_patterns
from hf_circuit_sparsity.circuits.node_effects import node_effects
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_loss
from hf_circuit_sparsity.circuits.viewer.activations import (
    QUANTILES,
    extreme_examples,
    histogram,
    quantile_examples,
    record_activations,
)
from hf_circuit_sparsity.circuits.viewer.measurements import (
    channel_embeddings,
    curve_sizes,
    edge_effects,
    nested_losses,
    other_nodes,
)
from hf_circuit_sparsity.circuits.viewer.pairs import channel_scale
from hf_circuit_sparsity.circuits.viewer.report import render_page
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig, report_data
from hf_circuit_sparsity.example import load_example
from hf_circuit_sparsity.tasks.packing import pack_dataset
from tests.circuits.planted import (
    NO,
    ON,
    YES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)
from tests.circuits.viewer.conftest import SMALL
from tests.conftest import random_model


def node_of(data, site, index):
    return next(n for n in data["nodes"] if (n["site"], n["index"]) == (site, index))


def test_effects_are_the_rise_of_the_loss(planted):
    model, _, task, circuit = planted
    tensors = task.tensors("test")

    def loss(masks):
        with mean_ablated(model, masks, circuit.means):
            pairs = all_pair_logits(model, tensors)
        return binary_loss(circuit.calibration.pairs(pairs, tensors)).item()

    nodes = [(site, i) for site, ids in circuit.nodes.items() for i in ids]
    effects = node_effects(circuit, model, tensors, nodes)
    whole = loss(circuit.masks())
    for site, index in nodes:
        masks = circuit.masks()
        masks[site][index] = False
        assert effects[site, index] == pytest.approx(loss(masks) - whole, abs=1e-5)
    assert effects["h.1.mlp.post_act", 7] > 0.5 > abs(effects["h.0.attn.k", 4])


def test_effects_of_weights_are_those_of_plain_hooks(planted):
    model, _, task, circuit = planted
    tensors = task.tensors("test")
    text = reference_ids()
    attended = reference_means(model, text).attended
    effects = edge_effects(circuit, model, tensors, circuit.edges(model), attended)
    layers = model.transformer.h
    values = []
    with hooked([(layers[0].attn.c_proj, lambda m, args, out: values.append(args[0][..., 5]))]):
        model(text)
    modules = {
        ("h.0.attn.v", 5, "h.0.attn.resid_delta", 3): (layers[0].attn.c_proj, 3, values[0].mean()),
        ("h.1.mlp.act_in", 3, "h.1.mlp.post_act", 7): (
            layers[1].mlp.c_fc,
            7,
            circuit.means["h.1.mlp.act_in"][3],
        ),
    }

    def loss():
        return binary_loss(all_pair_logits(model, tensors)).item()

    with circuit.apply(model):
        whole = loss()
        for (site, source, target_site, target), (module, row, mean) in modules.items():
            weight = module.weight[row, source].item()

            def without(m, args, out, row=row, source=source, weight=weight, mean=mean):
                out = out.clone()
                out[..., row] += weight * (mean - args[0][..., source])
                return out

            with hooked([(module, without)]):
                expected = loss() - whole
            assert effects[site, source, target_site, target] == pytest.approx(expected, abs=1e-4)
            assert expected > 0.1


def test_only_the_strongest_weights_are_measured(planted, data):
    model, tokenizer, task, circuit = planted
    few = ReportConfig(prompts=4, text_tokens=64, examples=1, pairs=1, edges=2)
    data = report_data(
        circuit, model, tokenizer, task=task, reference=reference_ids(), config=few, progress=False
    )
    weights = [(abs(link[2]), link[5]) for link in data["links"] if link[3] == "weight"]
    measured = [effect is not None for _, effect in sorted(weights, key=lambda weight: -weight[0])]
    assert measured == [True] * 2 + [False] * (len(weights) - 2)


def test_predictions_and_pairs_are_those_of_a_plain_run(planted, data):
    model, _, _, circuit = planted
    assert len(data["pairs"]) == ReportConfig().pairs
    for number, pair in enumerate(data["pairs"][:3]):
        for place, side in enumerate(pair):
            ids = torch.tensor([side["ids"]])
            runs = {}
            with torch.no_grad():
                runs["model"] = model(ids).logits[0, -1].softmax(-1)
                with circuit.apply(model), recorded_sites(model, circuit.nodes) as recorded:
                    runs["circuit"] = model(ids).logits[0, -1].softmax(-1)
            for run, probabilities in runs.items():
                token, probability = side["predicted"][run][0]
                assert token == probabilities.argmax()
                assert probability == pytest.approx(probabilities.max().item(), rel=1e-2)
                answers = probabilities[[side["target"], side["other"]]].tolist()
                assert side["answers"][run] == pytest.approx(answers, rel=1e-2)
            for site in ("h.0.attn.v", "h.0.attn.k"):
                index = circuit.nodes[site][0]
                shown = node_of(data, site, index)["pairs"][2 * number + place]
                assert shown == pytest.approx(recorded[site][0, :, index].tolist(), rel=1e-2)


def test_channels_add_up_to_the_attention(tiny_config):
    for sink in (True, False):
        tiny_config.sink = sink
        model = random_model(tiny_config)
        ids = torch.randint(0, 64, (13,), generator=torch.Generator().manual_seed(0)).tolist()
        scale = channel_scale(model, ids, 1)
        sites = ["h.1.attn.q", "h.1.attn.k"]
        with torch.no_grad(), recorded_sites(model, sites) as recorded:
            model(torch.tensor([ids]))
        width = model.config.d_head
        q, k = (recorded[site][0, :, :width] for site in sites)
        parts = scale * q[:, None] * k[None]  # (query, key, channel)
        pattern = attention_patterns(model, ids, [1])[1][0]
        row = parts.sum(-1)[-1]
        assert torch.allclose(row - row[0], (pattern[-1] / pattern[-1, 0]).log(), atol=1e-3)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_rotary_positions_leave_no_sum_over_channels(make_llama, key_value_heads):
    model = make_llama(num_key_value_heads=key_value_heads)
    assert channel_scale(model, list(range(3, 12)), 0) is None


def test_examples_at_quantiles_are_there_in_the_order_of_all_tokens(planted):
    model, _, _, circuit = planted
    recorded = record_activations(model, circuit.nodes, reference_ids().tolist())
    column = recorded.values["h.0.attn.v"][:, 0].sort().values
    examples = quantile_examples(recorded, "h.0.attn.v", 0)
    for share, example in zip(QUANTILES, examples, strict=True):
        value = example.values[example.at - example.start]
        assert value == column[round(share * (len(column) - 1))]


def test_curve_starts_at_guessing_and_passes_the_circuit(planted, data):
    curve, losses = data["curve"], data["losses"]
    size = data["size"]
    assert curve["sizes"][0] == 0 and curve["sizes"][-1] == size["modelNodes"]
    assert curve["losses"][0] > 0.69
    assert curve["losses"][curve["sizes"].index(size["nodes"])] == losses["circuit"]["loss"]
    assert curve["losses"][-1] == losses["model"]["loss"]
    effects = {(n["site"], n["index"]): n["effect"] for n in data["nodes"] if "effect" in n}
    ordered = [effects[tuple(key)] for key in curve["order"]]
    assert ordered == sorted(effects.values(), reverse=True)
    assert losses["without"]["loss"] > 0.6 > losses["circuit"]["loss"]
    assert curve_sizes(3, 100) == sorted({*range(4), *curve_sizes(3, 100)})
    assert len(curve_sizes(1000, 10**6)) == 30


@pytest.mark.parametrize("fields", [{}, {"afrac": 0.25, "sink": True}])
def test_losses_of_nested_circuits_are_those_of_plain_hooks(fields):
    model = planted_model(noise=0.3)
    if fields:
        config = type(model.config)(**{**model.config.to_dict(), **fields})
        model = random_model(config)
    mean = model.get_input_embeddings().weight.mean(0).detach()
    kept = [("h.0.attn.act_in", 0, "h.0.attn.v", 5)]
    circuit = planted_circuit(model, kept_edges=kept, tokens=[ON], token_mean=mean)
    tensors = on_off_task().tensors("test")
    order = [*circuit, *other_nodes(circuit)]
    sizes = curve_sizes(len(circuit), len(order))
    losses = nested_losses(circuit, model, order, sizes, tensors)
    plain = nested_losses(circuit, model, order, sizes, tensors, collapsed=False)
    assert losses == pytest.approx(plain, abs=1e-5)
    assert len({round(loss, 4) for loss in plain}) > 5
    with circuit.apply(model):
        whole = binary_loss(all_pair_logits(model, tensors)).item()
    assert plain[sizes.index(len(circuit))] == pytest.approx(whole, abs=1e-5)
    # Other nodes of the circuit's size are not cut down to what the circuit has of them.
    others = [*other_nodes(circuit), *circuit]
    masks = {site: torch.zeros_like(mask) for site, mask in circuit.masks().items()}
    for site, index in others[: len(circuit)]:
        masks[site][index] = True
    (loss,) = nested_losses(
        dataclasses.replace(circuit, kept_edges=None, tokens=None, token_mean=None), model, others,
        [len(circuit)], tensors,
    )  # fmt: skip
    with mean_ablated(model, masks, circuit.means):
        assert loss == pytest.approx(binary_loss(all_pair_logits(model, tensors)).item(), abs=1e-5)


def test_some_files_of_the_library_are_the_same_ones_each_time(monkeypatch):
    model, tokenizer, _ = load_example()
    read = []

    def packed(library, *args):
        read.append(library["path"][:])
        return pack_dataset(library, *args)

    monkeypatch.setattr(ablation, "pack_dataset", packed)
    few = [reference_input_ids(model, tokenizer, None, 640, files=2) for _ in range(2)]
    assert torch.equal(*few) and few[0].shape == (5, 128)
    assert read[0] == read[1] and len(read[0]) == 2


def test_activations_are_those_of_every_sequence_alone(planted):
    model, _, task, circuit = planted
    prompts = [list(ids) for ids in task.test["input_ids"][:9]]
    recorded = record_activations(
        model, circuit.nodes, prompts, within=lambda: circuit.apply(model), batch_size=4
    )
    assert len({len(p) for p in prompts}) > 1  # so that some were padded
    for site, ids in circuit.nodes.items():
        seen = {}
        with (
            circuit.apply(model),
            hooked_sites(model, {site: lambda m, a, out, seen=seen: seen.update(x=out)}),
            torch.no_grad(),
        ):
            for i, prompt in enumerate(prompts):
                model(torch.tensor([prompt]))
                start, end = recorded.starts[i : i + 2]
                expected = seen["x"][0, :, ids]
                assert torch.allclose(recorded.values[site][start:end], expected, atol=1e-5)


def test_histogram_and_examples_count_every_token(planted):
    model, _, _, circuit = planted
    sequences = reference_ids().tolist()
    recorded = record_activations(model, circuit.nodes, sequences)
    column = recorded.values["h.0.attn.v"][:, 0]
    low, high, mean = column.min().item(), column.max().item(), column.mean().item()
    assert sum(histogram(column, low, high)["counts"]) == (column != 0).sum()
    assert histogram(torch.tensor([0.0, 0.0, 1.0, 2.0]), 0, 2)["zero"] == 0.5
    for sign, extreme in ((1, high), (-1, low)):
        examples = extreme_examples(recorded, "h.0.attn.v", 0, mean, 4, sign)
        shown = [e.values[e.at - e.start] for e in examples]
        assert shown[0] == extreme and shown == sorted(shown, reverse=sign > 0)
        assert len({e.sequence for e in examples}) == len(examples) == 4
        # The word that the planted value channel reads.
        assert sequences[examples[0].sequence][examples[0].at] == (ON if sign > 0 else ON + 1)
    recorded.values["h.0.attn.v"][:] = 2.0
    assert extreme_examples(recorded, "h.0.attn.v", 0, 2.0, 4, 1) == []


@pytest.mark.parametrize("sink", [True, False])
def test_attention_patterns_are_the_models_own(tiny_config, sink):
    tiny_config.sink = sink
    model = random_model(tiny_config)
    ids = torch.randint(0, 64, (13,), generator=torch.Generator().manual_seed(0))
    patterns = attention_patterns(model, ids.tolist(), [0, 1])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids[None], output_attentions=True).attentions
    for layer in (0, 1):
        assert torch.allclose(patterns[layer], expected[layer][0], atol=1e-5)


def without_eager(self, name):
    if name == "eager":
        raise ValueError(name)


@pytest.mark.parametrize("broken", [without_eager, lambda self, name: None])
def test_a_model_without_eager_attention_is_refused_first(broken, planted, monkeypatch):
    model, tokenizer, task, circuit = planted
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "set_attn_implementation", broken)
    with pytest.raises(ValueError, match="eager"):
        report_data(circuit, model, tokenizer, task=task, reference="not read")


def test_channels_name_the_planted_tokens(planted):
    model, _, _, circuit = planted
    channels = {entry["channel"]: entry for entry in channel_embeddings(model, circuit.nodes)}
    assert sorted(channels) == [0, 3, 4]
    assert channels[0]["embed"]["positive"][0] == (ON, 1.5)
    assert channels[4]["unembed"]["positive"][0] == (YES, 3.0)
    assert channels[4]["unembed"]["negative"][0] == (NO, -3.0)
    assert channels[3]["reads"] == ["h.1.mlp.act_in"]
    assert channels[3]["writes"] == ["h.0.attn.resid_delta"]
    wpe = model.transformer.wpe.weight
    assert channels[0]["position"] == pytest.approx(wpe[:, 0].tolist())


def test_channels_of_a_model_without_positions(tiny_config):
    tiny_config.use_positional_embeddings = False
    entries = channel_embeddings(random_model(tiny_config), {"h.0.attn.act_in": [3]})
    assert entries[0]["channel"] == 3 and entries[0].get("position") is None


def test_concatenated_positions_are_channels_past_the_residual_ones(tiny_config):
    config = type(tiny_config)(**{**tiny_config.to_dict(), "d_pos_emb": 8})
    model = random_model(config)
    (entry,) = channel_embeddings(model, {"h.0.attn.act_in": [config.d_model + 3]})
    assert "embed" not in entry and "unembed" not in entry
    assert entry["position"] == pytest.approx(model.transformer.wpe.weight[:, 3].tolist())


def test_every_token_shown_has_a_name_and_everything_is_json(data):
    text = json.dumps(data, allow_nan=False)
    assert len(text) < 200_000
    for name, sequences in data["sequences"].items():
        for node in data["nodes"]:
            for examples in node.get("examples", {}).get(name, {}).values():
                for sequence, start, _, values in examples:
                    ids = sequences[sequence][start : start + len(values)]
                    assert len(ids) == len(values)
                    assert all(str(i) in data["tokens"] for i in ids)
    pattern = data["heads"]["heads"][0]["circuit"][0]
    length = len(data["pairs"][0][0]["ids"])
    assert len(pattern) == length * (length + 1) // 2
    assert node_of(data, "h.0.attn.k", 4)["head"] == 1


def test_the_model_is_left_as_it_was_and_the_page_is_seeded(planted, data, tmp_path):
    _, tokenizer, task, circuit = planted
    model = planted_model().train()
    path = write_report(
        circuit, tmp_path / "new" / "page.html", model, tokenizer, task=task,
        reference=reference_ids(), config=SMALL, progress=False,
    )  # fmt: skip
    assert model.training
    assert not any(site._forward_hooks for site in node_sites(model).values())
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert path.read_text(encoding="utf-8") == render_page(data)


def test_nodes_of_a_block_that_writes_nothing_are_shown_all_the_same(planted):
    model, tokenizer, task, circuit = planted
    nodes = {site: ids for site, ids in circuit.nodes.items() if site != "h.1.mlp.resid_delta"}
    cut = dataclasses.replace(circuit, nodes=nodes)
    data = report_data(
        cut, model, tokenizer, task=task, reference=reference_ids(), config=SMALL, progress=False
    )
    neuron = node_of(data, "h.1.mlp.post_act", 7)
    assert neuron["effect"] == 0 and not any(map(any, neuron["byToken"]))
    with circuit.apply(model), recorded_sites(model, ["h.1.mlp.post_act"]) as recorded:
        model(torch.tensor([data["pairs"][0][0]["ids"]]))
    expected = recorded["h.1.mlp.post_act"][0, :, 7].tolist()
    assert neuron["pairs"][0] == pytest.approx(expected, abs=1e-2)


def test_pruned_edges_and_tokens_stay_out(planted):
    model, tokenizer, task, circuit = planted
    kept = [("h.0.attn.act_in", 0, "h.0.attn.v", 5)]
    mean = model.get_input_embeddings().weight.mean(0).detach()
    cut = dataclasses.replace(circuit, kept_edges=kept, tokens=[ON], token_mean=mean)
    data = report_data(
        cut, model, tokenizer, task=task, reference=reference_ids(), config=SMALL, progress=False
    )
    assert data["size"]["edges"] == 1 and data["size"]["cutEdges"] >= 3
    assert [n["index"] for n in data["nodes"] if n["site"] == "token"] == [ON]
    assert data["losses"]["circuit"]["loss"] > 0.6  # what carried the answer is cut


def test_bad_input_is_one_sentence_and_writes_nothing(planted, tmp_path):
    model, tokenizer, task, circuit = planted
    page = tmp_path / "page.html"
    empty = Circuit({}, circuit.means, "on_off", circuit.model_fingerprint)
    nan = {site: mean * torch.nan for site, mean in circuit.means.items()}
    damaged = dataclasses.replace(circuit, means=nan)
    for made, of_model, given, named in [
        (empty, model, task, "on_off"),
        (circuit, model, None, "task="),
        (circuit, planted_model(seed=3), task, circuit.model_fingerprint),
        (damaged, model, task, "'circuit' is nan"),
    ]:
        with pytest.raises(ValueError, match=named):
            write_report(made, page, of_model, tokenizer, task=given, config=SMALL)
    with pytest.raises(ValueError, match="prompts=0"):
        ReportConfig(prompts=0)
    assert not page.exists()


def test_data_cannot_leave_its_element():
    text = "</title></script><script>alert(1)</script><!-- & \u2028\u2029 \ud800 '\"\\ {{ style }}"
    page = render_page({"task": text})
    element = re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[1]
    assert not re.search(r"[<>&'\u2028\u2029]", element)
    assert json.loads(element) == {"task": text}
    assert "alert" not in page.replace(element, "").replace("&lt;script&gt;alert", "")
    page.encode("utf-8")
    with pytest.raises(ValueError, match="JSON"):
        render_page({"task": "", "a": float("nan")})


def test_the_library_comes_with_its_licence():
    from importlib.resources import files

    vendor = files("hf_circuit_sparsity.circuits.viewer") / "vendor"
    library = (vendor / "d3" / "d3.min.js").read_text(encoding="utf-8")
    version = re.search(r"d3js\.org v([\d.]+)", library).group(1)
    assert version in (vendor / "README.md").read_text(encoding="utf-8")
    assert "Mike Bostock" in (vendor / "d3" / "LICENSE").read_text(encoding="utf-8")
