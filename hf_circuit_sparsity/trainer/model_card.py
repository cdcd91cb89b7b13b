"""The card of a model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import TrainerState

from ..hub_cards.card import TASKS_NAME, circuit_results, model_metadata, render, results_of
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.sparse_layers import SparseWeight


def weight_counts(model: nn.Module) -> tuple[int, int]:
    """How many parameters a model has beside its bigram table, and how many of them are not zero.

    A model that runs on its nonzeros counts as the dense one that it stands for. The table is dense
    on purpose: it spares the sparse weights the bigrams.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseWeight)]
    sparse = {id(layer.values): math.prod(layer.shape) for layer in layers}
    total = nonzeros = 0
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] != "bigram_table":
            total += sparse.get(id(parameter), parameter.numel())
            nonzeros += int(torch.count_nonzero(parameter.detach()))
    return total, nonzeros


def numbers_of_run(state: TrainerState) -> dict[str, float]:
    """What a `Trainer` has measured so far, by the names that cards use."""
    names = {
        "eval_loss": "loss",
        "eval_perplexity": "perplexity",
        "train_runtime": "train_seconds",
    }
    found: dict[str, float] = {"steps": state.global_step}
    for log in state.log_history:  # the last one counts
        found.update({names[key]: value for key, value in log.items() if key in names})
    if state.num_input_tokens_seen:
        found["tokens"] = state.num_input_tokens_seen
    return found


def model_card(
    model: nn.Module,
    *,
    repo_id: str,
    summary: Mapping[str, Any] | None = None,
    task_scores: Sequence[Mapping[str, Any]] = (),
    circuits: Mapping[str, Mapping[str, Any]] | None = None,
    corpus: str | None = None,
    picture: str | None = None,
    tokenizer: bool = True,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = "apache-2.0",
    tags: Sequence[str] = (),
    mark: bool = False,
) -> ModelCard:
    """The card of a CircuitGPT, or of a model of another architecture.

    Args:
        model: its config and the number of its nonzeros go onto the card.
        repo_id: where it is published, `user/name`; the example loads it from there.
        summary: what training measured, the content of `training_summary.json`.
        task_scores: what `evaluate_tasks` measured, each as a dictionary.
        circuits: circuits cut out of it, as the content of their `circuit.json`, by where they
            are: a folder of this repository, or another repository.
        corpus: one sentence on what it was trained on.
        picture: file in the repository.
        tokenizer: whether its tokenizer is in the repository too.
        base_model: Hub id of the model that it was trained on from.
        datasets: Hub ids of what it was trained or evaluated on; the first one with tasks.
        license: as the Hub names it; not stated if None.
        tags: beside the usual ones.
        mark: whether the next push may write the card anew.
    """
    summary, circuits = summary or {}, circuits or {}
    dataset = datasets[0] if datasets else TASKS_NAME
    losses = (
        ("loss", "loss", "Validation loss (nats per token)"),
        ("perplexity", "perplexity", "Perplexity"),
    )
    scores = (("accuracy", "accuracy", "Accuracy"), ("loss", "task_loss", "Task loss (nats)"))
    results = results_of(summary, losses)
    for score in task_scores:
        results += results_of(score, scores, task=score["task"], dataset=dataset)
    for circuit in circuits.values():
        results += circuit_results(circuit, dataset)
    total, nonzeros = weight_counts(model)
    is_ours = model.config.model_type == CircuitGPTConfig.model_type
    kinds = ["circuitgpt", "weight-sparse", "custom_code"] if is_ours else []
    if not is_ours and nonzeros < total / 2:
        kinds = ["weight-sparse"]
    data = model_metadata(
        repo_id, results, tags=[*kinds, *tags],
        datasets=datasets, library="transformers", license=license, base_model=base_model,
    )  # fmt: skip
    return render(
        "model.md", data, repo_id, mark=mark, config=model.config, total=total, nonzeros=nonzeros,
        is_ours=is_ours, architecture="CircuitGPT" if is_ours else type(model).__name__,
        picture=picture, tokenizer=tokenizer, corpus=corpus, summary=summary,
        task_scores=task_scores, circuits=circuits,
    )  # fmt: skip
