"""What nodes do at single tokens, against hooks that ablate them there one by one."""

import dataclasses

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import hooked_sites, mean_activations
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.circuits.viewer import positions
from hf_circuit_sparsity.circuits.viewer.layout import layered_graph
from hf_circuit_sparsity.circuits.viewer.positions import position_effects, token_weights
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import NO, OFF, ON, YES, planted_circuit, planted_model
from tests.decoders.dense_models import circuitgpt, gpt2, llama

PROMPT = [6, 9, ON, 7, 11]


def some_circuit(model) -> Circuit:
    """Every fourth node of a model whose weights were drawn."""
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    means = mean_activations(model, ids)
    nodes = {site: list(range(0, len(mean), 4)) for site, mean in means.items()}
    calibration = Calibration(1.5, {3: 0.5, 5: -0.5})
    return Circuit(nodes, means, "some", model_fingerprint(model), calibration=calibration)


MODELS = {
    "planted": lambda: (model := planted_model(noise=0.1), planted_circuit(model)),
    "circuitgpt": lambda: (model := circuitgpt(afrac=0.25, sink=True), some_circuit(model)),
    "gpt2": lambda: (model := gpt2(), some_circuit(model)),
    "llama": lambda: (model := llama(), some_circuit(model)),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_effects_are_those_of_one_ablation_each(name, monkeypatch):
    monkeypatch.setattr(positions, "_AT_ONCE", 7 * len(PROMPT))  # several passes
    model, circuit = MODELS[name]()
    model.eval()
    nodes = [(site, ids[-1]) for site, ids in circuit.nodes.items()]
    whole, effects = position_effects(circuit, model, nodes, PROMPT, (3, 5), last=4)
    assert effects.shape == (len(nodes), 4)

    def difference():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
        return (logits[3] - logits[5]).item()

    with circuit.apply(model):
        assert whole == pytest.approx(difference(), abs=1e-4)
        for (site, index), row in zip(nodes, effects.tolist(), strict=True):
            for token, effect in enumerate(row, start=1):

                def there(module, args, output, site=site, index=index, token=token):
                    output = output.clone()
                    output[:, token, index] = circuit.means[site][index]
                    return output

                with hooked_sites(model, {site: there}):
                    assert effect == pytest.approx(whole - difference(), abs=1e-4)
    assert effects.abs().max() > 1e-2


def test_planted_nodes_matter_where_they_were_planted():
    model = planted_model()
    circuit = planted_circuit(model)
    nodes = [("h.0.attn.v", 5), ("h.1.mlp.post_act", 7)]
    for word, answers in ((ON, (YES, NO)), (OFF, (NO, YES))):
        prompt = [word if token == ON else token for token in PROMPT]
        whole, effects = position_effects(circuit, model, nodes, prompt, answers, last=48)
        assert effects.shape == (2, len(prompt))
        assert whole > 1
        value, neuron = effects.abs().tolist()
        assert max(value) == value[2] > 0.5  # the value of the word
        assert max(neuron) == neuron[-1] > 0.5 and max(neuron[:-1]) < 1e-4  # read at the end


def test_tokens_write_what_their_embeddings_say():
    model = planted_model(noise=0.0)
    circuit = planted_circuit(model)
    weights = token_weights(circuit, model, PROMPT, [YES, NO])
    assert weights["embed"] == [(ON, 0, 1.5)]
    assert sorted(weights["unembed"]) == [(4, YES, 3.0), (4, NO, -3.0)]
    mean = model.get_input_embeddings().weight.mean(0).detach()
    pruned = dataclasses.replace(circuit, tokens=[OFF], token_mean=mean)
    assert token_weights(pruned, model, PROMPT, [YES])["embed"] == []


def test_a_shared_value_is_brought_by_every_head_that_reads_it():
    model = llama()
    circuit = some_circuit(model)
    links = [link for link in layered_graph(circuit, model).links if link.source[0].endswith(".v")]
    assert {link.head for link in links} == {0, 1}
    weight = model.model.layers[0].self_attn.o_proj.weight
    for link in links:
        if link.source[0] == "h.0.attn.v":
            column = link.head * model.config.head_dim + link.source[1]
            assert link.weight == weight[link.target[1], column].item()
