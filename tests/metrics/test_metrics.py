"""The `evaluate` modules, loaded as people load them, and held against plain formulas."""

import math

import evaluate
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_circuit_sparsity.circuits.task_scores import binary_accuracy, binary_loss
from hf_circuit_sparsity.metrics import METRICS, metric_path
from hf_circuit_sparsity.metrics.task_loss.pair_loss import task_loss


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("evaluate"))
    return {name: evaluate.load(metric_path(name), cache_dir=cache) for name in METRICS}


def logits(rows=40, columns=2, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def test_task_loss_is_the_cross_entropy_of_the_two_candidates(metrics):
    whole = logits(columns=9)
    right, wrong = torch.randperm(9)[:2].tolist()
    references, others = [right, wrong] * 20, [wrong, right] * 20
    result = metrics["task_loss"].compute(
        predictions=whole, references=references, counterfactual_references=others
    )
    two = torch.stack([whole[range(40), references], whole[range(40), others]], dim=1)
    expected = F.cross_entropy(two, torch.zeros(40, dtype=torch.long)).item()
    assert result["task_loss"] == pytest.approx(expected, abs=1e-6)
    assert result["task_accuracy"] == pytest.approx((two.argmax(1) == 0).float().mean().item())
    # The same from the two columns alone, in either order, and in batches.
    metrics["task_loss"].add_batch(predictions=two[:10], references=[0] * 10)
    metrics["task_loss"].add_batch(predictions=two[10:].flip(1), references=[1] * 30)
    assert metrics["task_loss"].compute() == pytest.approx(result)
    # What pruning optimises is the number that is reported.
    assert binary_loss(two).item() == pytest.approx(task_loss(two.numpy()), abs=1e-6)
    assert binary_accuracy(two) == result["task_accuracy"]


def test_a_guess_costs_ln_2_and_a_tie_is_wrong(metrics):
    result = metrics["task_loss"].compute(predictions=[[1.0, 1.0]] * 3, references=[0, 1, 0])
    assert result == {"task_loss": pytest.approx(math.log(2)), "task_accuracy": 0.0}
    apart = [[1e4, -1e4], [-1e4, 1e4]]
    certain = metrics["task_loss"].compute(predictions=apart, references=[0, 0])
    assert certain == {"task_loss": pytest.approx(1e4), "task_accuracy": 0.5}


PAIRS = [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("task_loss", {"predictions": [[1.0]], "references": [0]}, "predictions"),
        ("task_loss", {"predictions": [[1.0] * 3], "references": [0]}, "counterfactual_references"),
        ("task_loss", {"predictions": PAIRS, "references": [2]}, "references"),
        ("task_loss", {"predictions": PAIRS, "references": [-1]}, "references"),
        ("task_loss", {"predictions": [[1.0, math.nan]], "references": [0]}, "predictions"),
        ("circuit_faithfulness", {"predictions": PAIRS, "references": [[1.0] * 3]}, "references"),
        (
            "circuit_faithfulness",
            {"predictions": PAIRS, "references": PAIRS, "baseline": PAIRS * 2},
            "baseline",
        ),
        ("circuit_size", {"nodes": [-1], "edges": [1]}, "counts"),
        ("circuit_size", {"nodes": [5], "edges": [1], "model_nodes": [4]}, "counts"),
    ],
)
def test_what_cannot_be_scored_is_refused(metrics, name, arguments, argument):
    with pytest.raises(ValueError, match=argument):
        metrics[name].compute(**arguments)


def test_faithfulness(metrics):
    circuit, model, baseline = logits(seed=1), logits(seed=2), logits(seed=3)
    result = metrics["circuit_faithfulness"].compute(
        predictions=circuit, references=model, baseline=baseline
    )
    same = (circuit.argmax(1) == model.argmax(1)).float().mean().item()
    expected = F.kl_div(
        circuit.log_softmax(1), model.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert result["agreement"] == pytest.approx(same)
    assert result["kl"] == pytest.approx(expected.item(), abs=1e-6)
    gap = [(p[:, 0] - p[:, 1]).mean().item() for p in (circuit, model, baseline)]
    share = (gap[0] - gap[2]) / (gap[1] - gap[2])
    assert result["faithfulness"] == pytest.approx(share, abs=1e-5)

    itself = metrics["circuit_faithfulness"].compute(predictions=model, references=model)
    assert itself == {"agreement": 1.0, "kl": 0.0}


def test_size(metrics):
    size = metrics["circuit_size"]
    assert size.compute(nodes=[11], edges=[10]) == {"nodes": 11.0, "edges": 10.0}
    result = size.compute(nodes=[4, 9], edges=[1, 16], model_nodes=[8, 90], model_edges=[16, 16])
    assert result == pytest.approx(
        {"nodes": 6.0, "edges": 4.0, "node_share": np.sqrt(0.05), "edge_share": 0.25}
    )
    assert size.compute(nodes=[3, 3], edges=[0, 5])["edges"] == 0.0


def test_there_is_no_other_metric():
    with pytest.raises(ValueError, match="loss"):
        metric_path("loss")
