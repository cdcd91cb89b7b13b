"""Circuits in the layout of OpenAI's release, on a stand-in: their files are not at hand."""

import pytest
import torch

from hf_circuit_sparsity import Circuit
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.circuits.planted import PLANTED_NODES, planted_circuit, planted_model, reference_ids


def viz_data(**changes):
    """What their viewer reads: masks, and beside them samples and figures of the search."""
    masks = {site.removeprefix("h."): torch.tensor(ids) for site, ids in PLANTED_NODES.items()}
    masks["0.attn.q"] = torch.tensor([], dtype=torch.int64)
    masks["0.attn.k"] = torch.tensor([])
    masks["final_resid"] = torch.tensor([4])
    masks["prune_config"] = {"k_coef": 1e-4, "seed": 0}
    return {
        "circuit_data": {**masks, **changes},
        "importances": {"loss": torch.tensor(0.1), "interv_loss": torch.tensor(0.2)},
        "samples": {"0.attn.v": {5: [[(torch.zeros(4), torch.zeros(4), 1)]]}},
        "num_total_nodes": 6,
    }


@pytest.fixture
def write(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "viz_data.pt")
        return tmp_path / "viz_data.pt"

    return write


@torch.no_grad()
def test_it_runs_as_the_circuit_it_is(write, tmp_path):
    model = planted_model()
    circuit = Circuit.from_openai(write(viz_data()), model, reference_ids(), task="on_off")
    assert circuit.nodes == PLANTED_NODES and circuit.task == "on_off"
    for site, mean in mean_activations(model, reference_ids()).items():
        torch.testing.assert_close(circuit.means[site], mean)
    ids = reference_ids(1)[:4]
    with planted_circuit(model).apply(model):
        expected = model(ids).logits
    circuit.save_pretrained(tmp_path / "saved")
    for same in (circuit, Circuit.from_pretrained(tmp_path / "saved")):
        with same.apply(model):
            torch.testing.assert_close(model(ids).logits, expected)


def test_a_mask_may_be_a_bool_per_node(write):
    mask = torch.zeros(8, dtype=torch.bool)
    mask[5] = True
    path = write(viz_data(**{"0.attn.v": mask}))
    assert Circuit.from_openai(path, planted_model(), reference_ids()).nodes == PLANTED_NODES


class Code:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    "content, named",
    [
        (viz_data(**{"0.attn.v": torch.tensor([8])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": torch.tensor([-1])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": torch.tensor([5, 5])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": torch.tensor([5.0])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": torch.tensor([[5]])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": torch.tensor([True, False])}), "0.attn.v"),
        (viz_data(**{"0.attn.v": [5]}), "0.attn.v"),
        (viz_data(**{"7.attn.v": torch.tensor([5])}), "7.attn.v"),
        (viz_data(**{"0.attn.router": torch.tensor([5])}), "0.attn.router"),
        (viz_data(**{"h.0.attn.v": torch.tensor([5])}), "h.0.attn.v"),
        ({"circuit_data": {5: torch.tensor([5])}}, "site 5"),
        ({"circuit_data": {"prune_config": {}}}, "keeps no node"),
        ({"circuit_data": [1]}, "circuit_data"),
        ({}, "circuit_data"),
        ([1], "list"),
        ({"circuit_data": Code()}, "readable"),
    ],
)
def test_a_file_that_does_not_fit(content, named, write, capsys):
    with pytest.raises(ArtifactError, match=named):
        Circuit.from_openai(write(content), planted_model(), reference_ids())
    assert "ran" not in capsys.readouterr().out


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"viz_data\.pt"):
        Circuit.from_openai(tmp_path / "viz_data.pt", planted_model(), reference_ids())
