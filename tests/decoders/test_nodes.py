"""Node sites are where the model computes, and projections are the weights between them."""

import pytest
import torch
from torch.nn import functional as F

from hf_circuit_sparsity.decoders.decoder import decoder_of
from tests.decoders.dense_models import DENSE, PARALLEL, PHI3

IDS = torch.arange(24).reshape(2, 12) % 60
ALL = {**DENSE, **PARALLEL, **PHI3}
every_model = pytest.mark.parametrize("make", [*ALL.values()], ids=ALL)


def recorded(model, sites):
    activations = {}
    handles = [
        site.register_forward_hook(lambda module, args, x, n=name: activations.update({n: x}))
        for name, site in sites.items()
    ]
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return activations, logits


@every_model
def test_sites_are_what_the_layers_read_and_write(make):
    model = make()
    decoder = decoder_of(model)
    sites = decoder.node_sites()
    assert len(sites) == 8 * decoder.depth
    inputs, outputs = {}, {}
    for projection in decoder.projections():
        module = projection.module

        def remember(module, args, output):
            inputs[module], outputs[module] = args[0], output

        module.register_forward_hook(remember)
    activations, _ = recorded(model, sites)
    assert all(activations[name].shape == (2, 12, site.width) for name, site in sites.items())
    gated = {}
    for projection in decoder.projections():
        module, source = projection.module, activations[projection.source]
        if not projection.source.endswith(".v"):  # which attention mixes over positions
            assert torch.equal(inputs[module], source)
            bias = getattr(module, "bias", None)
            torch.testing.assert_close(
                F.linear(source, projection.weight(), bias), outputs[module], rtol=1e-4, atol=1e-4
            )
        for target in projection.targets:
            written = outputs[module]
            written = written if target.rows is None else written[..., target.rows]
            if target.site.endswith(".post_act"):
                gated.setdefault(target.site, {})[target.gate] = written
            elif "circuitgpt" not in model.config.model_type:  # whose sites come after AbsTopK
                assert torch.equal(written, activations[target.site])
    for site, parts in gated.items():
        block = decoder.blocks[int(site.split(".")[1])]
        if True in parts:
            act = getattr(block.mlp, "act_fn", None) or block.mlp.activation_fn
            expected = act(parts[True]) * parts[False]
            torch.testing.assert_close(activations[site], expected)


@every_model
def test_values_reach_the_output_projection_on_the_columns_that_are_named(make):
    """Every token that attends to one token alone reads exactly that token's values."""
    model = make()
    decoder = decoder_of(model)
    sites, read = decoder.node_sites(), {}
    values = [p for p in decoder.projections() if p.source.endswith(".v")]
    for projection in values:
        projection.module.register_forward_pre_hook(
            lambda module, args, name=projection.source: read.update({name: args[0]})
        )
    activations, _ = recorded(model, sites)
    for projection in values:
        v = activations[projection.source][:, 0]
        expected = v if projection.columns is None else v[:, projection.columns]
        if getattr(model.config, "sink", False):  # takes its share of the first token
            assert torch.equal(read[projection.source][:, 0] != 0, expected != 0)
        else:
            torch.testing.assert_close(read[projection.source][:, 0], expected)


@every_model
def test_what_a_hook_returns_takes_the_place_of_the_nodes(make):
    """Ablated by hand in plain PyTorch, or through the site: the same logits."""
    model = make()
    decoder = decoder_of(model)
    _, whole = recorded(model, {})
    modules = {}
    for i, layer in enumerate(decoder.layers):
        modules[f"h.{i}.attn.act_in"] = (layer.attn_norm, None, False)
        for part, (module, rows) in zip("qkv", (layer.query, layer.key, layer.value), strict=True):
            modules[f"h.{i}.attn.{part}"] = (module, rows, False)
        modules[f"h.{i}.attn.resid_delta"] = (layer.attn_out, None, False)
        modules[f"h.{i}.mlp.act_in"] = (layer.mlp_norm, None, False)
        modules[f"h.{i}.mlp.post_act"] = (layer.down, None, True)
        modules[f"h.{i}.mlp.resid_delta"] = (layer.down, None, False)
    for name, site in decoder.node_sites().items():
        nodes = torch.tensor([1, site.width - 1])

        def ablate(module, args, x, nodes=nodes):
            return x.index_fill(-1, nodes, 0.25)

        handle = site.register_forward_hook(ablate)
        _, through_site = recorded(model, {})
        handle.remove()
        module, rows, of_input = modules[name]
        columns = nodes if rows is None else rows[nodes]
        if model.config.model_type == "circuitgpt":
            module, of_input, columns = site, False, nodes
        original = module.forward

        def by_hand(x, *args, original=original, columns=columns, of_input=of_input):
            if of_input:
                return original(x.index_fill(-1, columns, 0.25), *args)
            return original(x, *args).index_fill(-1, columns, 0.25)

        module.forward = by_hand
        _, expected = recorded(model, {})
        del module.forward
        assert torch.equal(through_site, expected)
        assert not torch.equal(through_site, whole), name
    assert torch.equal(recorded(model, {})[1], whole)
