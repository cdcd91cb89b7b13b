"""Finding circuits of planted models in a second."""

from dataclasses import replace
from typing import Any

from hf_circuit_sparsity import Circuit, PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuits
from tests.circuits.planted import on_off_task, planted_model, reference_ids

QUICK = PruningConfig(max_steps=200, batch_size=32, selection_prompts=200)
QUICKER = PruningConfig(
    max_steps=20, batch_size=8, learning_rate=1e-2, selection_prompts=60, screen_prompts=30
)


def find(model: Any = None, config: PruningConfig = QUICK, task: Any = None, **settings: Any):
    """The first circuit found; `find_all` gives those of every seed."""
    return find_all(model, config, task, **settings)[0]


def find_all(
    model: Any = None, config: PruningConfig = QUICK, task: Any = None, **settings: Any
) -> list[Circuit]:
    model, task = planted_model() if model is None else model, task or on_off_task()
    config = replace(config, **settings)
    return find_circuits(model, task, config, reference=reference_ids(), progress=False)
