"""The card of a model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..circuits.circuit import Circuit
from ..circuits.task_scores import TaskScore
from ..modeling.sparse_layers import SparseWeight
from .circuit_card import TASKS_NAME, circuit_results
from .markdown import NOT_MEASURED, code, number, python, table, text
from .metadata import all_tags, measured, render, repo_title, result

SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = {repo_id}
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name)
prompt = tokenizer("def add(a, b):\\n    return", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0]))"""
SNIPPET_WITHOUT_TOKENIZER = """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({repo_id}, trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]])).logits.shape)"""


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


def model_card(
    model: nn.Module,
    *,
    repo_id: str,
    summary: Mapping[str, Any] | None = None,
    task_scores: Sequence[TaskScore] = (),
    circuits: Mapping[str, Circuit] | None = None,
    corpus: str | None = None,
    picture: str | None = None,
    tokenizer: bool = True,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of a CircuitGPT.

    Args:
        model: its config and the number of its nonzeros go onto the card.
        repo_id: where it is published, `user/name`; the example loads it from there.
        summary: what training measured, the content of `training_summary.json`.
        task_scores: what `evaluate_tasks` measured.
        circuits: circuits cut out of it, by where they are: a folder of this repository, or
            another repository.
        corpus: one sentence on what it was trained on.
        picture: file in the repository.
        tokenizer: whether its tokenizer is there too.
        base_model: Hub id of the model that it was trained on from.
        datasets: Hub ids of what it was trained or evaluated on; the first one with tasks.
        license: as the Hub names it.
        tags: beside the usual ones.
    """
    circuits = circuits or {}
    tasks = datasets[0] if datasets else TASKS_NAME
    results = _results(summary, task_scores, tasks)
    for circuit in circuits.values():
        results += circuit_results(circuit, tasks)
    title = repo_title(repo_id)
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=all_tags(["circuitgpt", "weight-sparse", "custom_code"], tags),
        base_model=base_model,
        datasets=list(datasets) or None,
        metrics=sorted({r.metric_type for r in results}) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    total, nonzeros = weight_counts(model)
    config = model.config
    snippet = SNIPPET if tokenizer else SNIPPET_WITHOUT_TOKENIZER
    shape = f"{config.n_layer} layers and d_model {config.d_model}"
    return render(
        ModelCard,
        "model.md",
        data,
        title=text(title),
        summary=(
            f"A GPT of {shape}. Of its {total:,} weights {nonzeros:,} are not zero "
            f"({nonzeros / total:.2%}; the dense bigram table left out), so that the circuits "
            "behind its behaviours are small enough to read."
        ),
        picture=picture,
        snippet=snippet.format(repo_id=python(repo_id)),
        architecture=_architecture(config),
        training=_training(summary, corpus),
        evaluation=_evaluation(summary, task_scores),
        circuits=_circuits(circuits),
    )


def _results(
    summary: Mapping[str, Any] | None, scores: Sequence[TaskScore], tasks: str
) -> list[EvalResult]:
    results = []
    for metric, name in (
        ("loss", "Validation loss (nats per token)"),
        ("perplexity", "Perplexity"),
    ):
        if (value := measured(summary, metric)) is not None:
            results.append(result(metric, name, value, "python", "Held-out Python"))
    for score in scores:
        if score.loss is None or score.accuracy is None:
            continue
        where = (tasks, f"{score.task} (held-out prompts)", score.task)
        results.append(result("accuracy", "Accuracy", score.accuracy, *where))
        results.append(result("task_loss", "Task loss (nats)", score.loss, *where))
    return results


def _architecture(config: Any) -> str:
    sites = "nowhere" if config.afrac is None else f"the largest {config.afrac:.0%} at each site"
    return table(
        ("", ""),
        [
            ("layers", str(config.n_layer)),
            ("width of the residual stream", str(config.d_model)),
            ("heads", f"{config.n_head} of width {config.d_head}"),
            ("neurons per MLP", str(config.d_mlp)),
            ("vocabulary", f"{config.vocab_size:,}"),
            ("context", f"{config.block_size} tokens"),
            ("activations kept", sites),
            ("attention sink", "yes" if config.sink else "no"),
            ("bigram table", "yes" if config.enable_bigram_table else "no"),
        ],
    )


def _training(summary: Mapping[str, Any] | None, corpus: str | None) -> str:
    seconds = measured(summary, "train_seconds")
    rows = [
        ("corpus", text(corpus) if corpus else "not stated"),
        ("steps", number(measured(summary, "steps"), ",.0f")),
        ("tokens seen", number(measured(summary, "tokens"), ",.0f")),
        ("density of the sparse weights", number(measured(summary, "density"), ".4f")),
        ("time", NOT_MEASURED if seconds is None else f"{seconds / 60:,.1f} minutes"),
    ]
    return "By `SparseTrainer` of `hf-circuit-sparsity`.\n\n" + table(("", ""), rows)


def _evaluation(summary: Mapping[str, Any] | None, scores: Sequence[TaskScore]) -> str:
    rows = [
        ("validation loss", number(measured(summary, "loss")), "nats per token, held-out files"),
        ("perplexity", number(measured(summary, "perplexity"), ".2f"), ""),
    ]
    parts = [table(("", "", ""), rows)]
    if not scores:
        return f"{parts[0]}\n\nThe binary tasks: {NOT_MEASURED}."
    parts.append(
        "Binary tasks on held-out prompts; guessing has accuracy 50 % and loss 0.693 nats:"
    )
    rows = []
    for score in scores:
        known = score.accuracy is not None
        problem = f"not asked: {text(score.problem)}" if score.problem else NOT_MEASURED
        accuracy = number(score.accuracy, ".1%") if known else problem
        rows.append((code(score.task), accuracy, number(score.loss), str(score.prompts)))
    parts.append(table(("task", "accuracy", "loss", "prompts"), rows))
    return "\n\n".join(parts)


def _circuits(circuits: Mapping[str, Circuit]) -> str:
    if not circuits:
        return ""
    rows = [
        (
            code(circuit.task),
            str(len(circuit)),
            number(measured(circuit.metrics, "edges"), ".0f"),
            number(measured(circuit.metrics, "circuit_loss")),
            number(measured(circuit.metrics, "ablated_loss")),
            code(place),
        )
        for place, circuit in circuits.items()
    ]
    header = ("task", "nodes", "edges", "loss alone", "loss without it", "where")
    return table(header, rows)
