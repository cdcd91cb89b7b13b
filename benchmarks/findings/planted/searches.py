"""One search on one planted mechanism, and what is kept of it.

Apart from the command, so that the processes it starts can import it.
"""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.verification import random_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuit
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_accuracy
from hf_circuit_sparsity.files import replacing

from ...experiment import stored
from .mechanisms import Nodes, Planted, plant

SHORT = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=3e-2, node_penalty=3e-3, selection_prompts=96,
    screen_prompts=0,
)  # fmt: skip
METHODS: dict[str, PruningConfig] = {
    "rest off": SHORT,
    "rest random": replace(SHORT, outside="random"),
    "rest adversarial": replace(SHORT, outside="adversarial"),
    "interchange": replace(SHORT, interchange=1.0, interchange_depths=2),
    "zero": replace(SHORT, ablation="zero"),
    "task mean": replace(SHORT, ablation="task_mean"),
    "resample": replace(SHORT, ablation="resample"),
    "frozen norms": replace(SHORT, freeze_norms=True),
    "KL": replace(SHORT, objective="kl"),
    "no masks": replace(SHORT, max_steps=0),
}
"""The searches that are compared: name → settings. "rest off" is the paper's in a tenth of the
time; each other one differs from it in one setting. Without masks nodes are ranked at random, and
the clean-up, which goes by gradients, does all."""
CONTROL = "random"
ARCHIVE = "planted_runs.json.gz"
NOISES = (0.0, 0.01, 0.03)


def cell_name(method: str, name: str, architecture: str, noise: float, seed: int) -> str:
    """What one run is called in the folder and in the archive."""
    return f"{method} {name} {architecture} {noise:g} {seed}"


def cell_path(folder: Path, cell: str) -> Path:
    """Where one run is stored until it is archived."""
    return folder / f"{cell}.json"


def cell_rows(folder: Path, method: str, *of: Any) -> list[dict[str, Any]]:
    """What one run measured, now or before. At module level, so that a worker can be sent it."""
    torch.set_num_threads(1)
    path = cell_path(folder, cell_name(method, *of))
    return stored(path, lambda: measured(METHODS[method], plant(*of), of[-1]))


def archived(results: Path) -> dict[str, list[dict[str, Any]]]:
    """What was measured on any machine and committed: cell → rows. It is not measured again."""
    path = results / ARCHIVE
    return json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}


def archive(results: Path, kept: dict[str, list[dict[str, Any]]]) -> None:
    """Keep it beside the report; the same content gives the same bytes."""
    with replacing(results / ARCHIVE) as temporary:
        text = json.dumps(dict(sorted(kept.items())))
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def measured(config: PruningConfig, planted: Planted, seed: int) -> list[dict[str, Any]]:
    """What a search finds, and what a random circuit of as many nodes at every site is."""
    config = replace(config, seed=seed)
    try:
        found = find_circuit(
            planted.model, planted.task, config, reference=planted.reference, progress=False
        )
    except TaskNotLearnedError:
        return [{"refused": True}] * 2
    drawn = random.Random(f"{planted.name} {seed}").randrange(2**32)
    generator = torch.Generator().manual_seed(drawn)
    return [score(planted, found), score(planted, random_circuit(found, generator))]


def score(planted: Planted, circuit: Circuit) -> dict[str, Any]:
    """A circuit beside the truth.

    Returns:
        `precision` and `recall` of nodes; `nodes`; `decoys` among them; `accuracy` alone, on
        held-out prompts; `turned`: share of the whole model's answers that change when the
        circuit's nodes are swapped from the counterfactual.
    """
    nodes: Nodes = frozenset((site, i) for site, ids in circuit.nodes.items() for i in ids)
    precision, recall = planted.truth.precision_and_recall(nodes)
    test = planted.task.tensors("test")
    with circuit.apply(planted.model):
        alone = all_pair_logits(planted.model, test)
    whole, swapped = all_pair_logits(planted.model, test), planted.swapped(nodes)
    turned = ((whole[:, 0] > whole[:, 1]) != (swapped[:, 0] > swapped[:, 1])).float().mean()
    return {
        "precision": precision,
        "recall": recall,
        "nodes": len(nodes),
        "decoys": len(nodes & planted.truth.decoys),
        "accuracy": binary_accuracy(alone),
        "turned": turned.item(),
    }
