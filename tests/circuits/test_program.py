"""A circuit as a program, run in a process of its own, against the hooks."""

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_circuit_sparsity import Circuit
from hf_circuit_sparsity.circuits.ablation import mean_activations, node_sites
from hf_circuit_sparsity.circuits.edges import circuit_edges
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import on_off_task, planted_circuit, planted_model, word_tokenizer
from tests.conftest import sparsify
from tests.decoders.dense_models import circuitgpt, llama

PROMPTS = torch.randint(0, 64, (6, 11), generator=torch.Generator().manual_seed(3))
RUN = """\
import json, sys
sys.path.insert(0, {folder!r})
import {name}
print(json.dumps([{name}.answers(prompt) for prompt in json.loads(sys.argv[1])]))
"""


def random_circuit_of(model, share: float, **fields) -> Circuit:
    generator = torch.Generator().manual_seed(5)
    means = mean_activations(model, PROMPTS.flip(0))
    nodes = {
        s: (torch.rand(site.width, generator=generator) < share).nonzero()[:, 0].tolist()
        for s, site in node_sites(model).items()
    }
    return Circuit(nodes, means, "random", model_fingerprint(model), **fields)


def by_program(path, prompts) -> np.ndarray:
    """In a process that imports numpy and nothing of ours."""
    code = RUN.format(name=path.stem, folder=str(path.parent))
    command = [sys.executable, "-I", "-c", code, json.dumps(prompts)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return np.array([list(answers.values()) for answers in json.loads(run.stdout)])


@torch.no_grad()
def by_hooks(circuit, model, prompts, answers) -> np.ndarray:
    with circuit.apply(model):
        logits = [model(torch.tensor([p])).logits[0, -1, answers] for p in prompts]
    return torch.stack(logits).numpy()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sink": True, "bias": True, "afrac": 0.5},
        {"rms_norm": False, "activation_type": "relu", "residual_activation_type": "relu"},
        {"d_pos_emb": 8, "sinusoidal_cat_pos_emb": True, "enable_bigram_table": False},
        {"afrac": None, "sink": False},
        {"afrac": 0.25, "afrac_loctypes": "attn_in,mlp_neuron,resid_post_attn,resid_post_mlp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("density", [1.0, 0.15])
def test_answers_are_those_of_the_hooks(fields, density, tmp_path):
    model = circuitgpt(**fields)
    if density < 1:
        sparsify(model, density)
    circuit = random_circuit_of(model, 0.3, calibration=Calibration(1.7, {3: -0.5}))
    path = circuit.to_program(tmp_path / "circuit.py", model, answers=[9, 3])
    expected = by_hooks(circuit, model, PROMPTS.tolist(), [3, 9])
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(by_program(path, PROMPTS.tolist()), expected, rtol=1e-4, atol=1e-4)


def test_a_model_on_its_nonzeros_gives_the_same_program(tmp_path):
    dense = sparsify(circuitgpt(), 0.1)
    circuit = random_circuit_of(dense, 0.3)
    path = circuit.to_program(tmp_path / "dense.py", dense, answers=[3, 9])
    on_nonzeros = dense.to_sparse()
    other = circuit.to_program(tmp_path / "sparse.py", on_nonzeros, answers=[3, 9])
    assert np.array_equal(by_program(path, [[1, 2, 3]]), by_program(other, [[1, 2, 3]]))


@pytest.mark.parametrize("site", ["h.0.attn.act_in", "h.1.mlp.resid_delta"])
def test_hardly_a_circuit_and_names_that_look_like_placeholders(site, tmp_path):
    model = circuitgpt(residual_activation_type="relu")
    circuit = random_circuit_of(model, 0.0)
    circuit.nodes, circuit.task = {site: [2, 3]}, "{digest}{name}\\N{x}"
    path = circuit.to_program(tmp_path / "circuit.py", model, answers=[3, 9])
    expected = by_hooks(circuit, model, PROMPTS.tolist(), [3, 9])
    np.testing.assert_allclose(by_program(path, PROMPTS.tolist()), expected, rtol=1e-4, atol=1e-4)


def test_cut_edges_and_tokens(tmp_path):
    model = sparsify(circuitgpt(), 0.3)
    circuit = random_circuit_of(model, 0.4)
    edges = circuit_edges(model, circuit.nodes)
    circuit.kept_edges = [edge.name for edge in edges[::2]]
    circuit.edge_offsets = {edge.target_site: {edge.target: 0.3} for edge in edges[1::2]}
    circuit.tokens, circuit.token_mean = list(range(0, 64, 2)), torch.randn(32)
    path = circuit.to_program(tmp_path / "circuit.py", model, answers=[3, 9])
    expected = by_hooks(circuit, model, PROMPTS.tolist(), [3, 9])
    np.testing.assert_allclose(by_program(path, PROMPTS.tolist()), expected, rtol=1e-4, atol=1e-4)


def test_held_out_prompts_of_a_task_and_what_is_read(tmp_path):
    model, task, tokenizer = planted_model(), on_off_task(), word_tokenizer()
    names = {"h.1.mlp.post_act.7": 'is it "on"?\n"""x'}
    circuit = planted_circuit(model, own_task=task.text, task=task.name, names=names)
    path = circuit.to_program(tmp_path / "on_off.py", model, tokenizer=tokenizer)
    prompts = [row["input_ids"] for row in task.test][:20]
    found = by_program(path, prompts)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    np.testing.assert_allclose(found, by_hooks(circuit, model, prompts, [yes, no]), atol=1e-4)
    text = path.read_text(encoding="utf-8")
    ast.parse(text)
    for site, index in circuit:
        assert f"{site}.{index}" in text
    assert "is it 'on'? '''x" in text and "'yes'" in text
    printed = subprocess.run(
        [sys.executable, str(path), *map(str, prompts[0])], capture_output=True, text=True
    ).stdout
    assert f"{found[0, 0]:.3f}" in printed


def test_arrays_of_another_program_are_refused(tmp_path):
    model = planted_model()
    circuit = planted_circuit(model)
    path = circuit.to_program(tmp_path / "circuit.py", model, answers=[1, 2])
    other = planted_circuit(planted_model(seed=1)).to_program(
        tmp_path / "other.py", planted_model(seed=1), answers=[1, 2]
    )
    path.with_suffix(".npz").write_bytes(other.with_suffix(".npz").read_bytes())
    run = subprocess.run([sys.executable, str(path), "1"], capture_output=True, text=True)
    assert run.returncode and "does not belong" in run.stderr


def test_what_cannot_be_written_is_refused(tmp_path):
    model = planted_model()
    circuit = planted_circuit(model)
    with pytest.raises(ValueError, match="path"):
        circuit.to_program(tmp_path / "circuit.txt", model, answers=[1])
    with pytest.raises(ValueError, match="CircuitGPT"):
        other = llama()
        random_circuit_of(other, 0.2).to_program(tmp_path / "circuit.py", other, answers=[1])
    with pytest.raises(ValueError, match="answers"):
        circuit.example = {}
        circuit.to_program(tmp_path / "circuit.py", model)
    assert not list(tmp_path.iterdir())
