"""The card of a repository of circuits."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..circuits.circuit import Circuit
from ..hub.repository import is_hub_id
from .markdown import NOT_MEASURED, block, code, number, python, table, text, visible
from .metadata import LIBRARY, all_tags, measured, render, repo_title, result

# What stands for the dataset where the tasks are not published as one.
TASKS_NAME = "circuit-sparsity-tasks"

# Name in `circuit.metrics`, what it is, format.
_NUMBERS = (
    ("nodes", "nodes", ".0f"),
    ("node_share", "share of the model's nodes", ".3%"),
    ("edges", "edges", ".0f"),
    ("edge_share", "share of the model's edges", ".3%"),
    ("model_loss", "task loss of the whole model", ".3f"),
    ("model_accuracy", "accuracy of the whole model", ".1%"),
    ("calibrated_model_loss", "task loss of the whole model, logits calibrated", ".3f"),
    ("circuit_loss", "task loss of the circuit alone", ".3f"),
    ("circuit_accuracy", "accuracy of the circuit alone", ".1%"),
    ("ablated_loss", "task loss of the model without the circuit", ".3f"),
    ("ablated_accuracy", "accuracy of the model without the circuit", ".1%"),
    ("agreement", "circuit and model prefer the same answer", ".1%"),
    ("kl", "KL(model ‖ circuit) over the two answers, nats", ".3f"),
)


def circuit_card(
    circuits: Circuit | Mapping[str, Circuit],
    *,
    repo_id: str,
    subfolder: str = "",
    pictures: bool | Collection[str] = True,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of one circuit, or of a repository with several.

    Args:
        circuits: the circuit; or several by their folders in the repository, "" for its root.
        repo_id: where it is published, `user/name`; the example loads it from there.
        subfolder: folder of a single circuit in the repository.
        pictures: whether each has a `circuit.png` beside it, or the folders in which there is one.
        base_model: Hub id of the model they were cut out of; that which a circuit names if not
            given.
        datasets: Hub ids of the tasks' datasets.
        license: as the Hub names it.
        tags: beside the usual ones.

    Raises:
        ValueError: there is no circuit.
    """
    by_folder = {subfolder: circuits} if isinstance(circuits, Circuit) else dict(circuits)
    if not by_folder:
        raise ValueError(f"There is no circuit to write a card for {repo_id!r} about; pass one.")
    models = [base_model] if base_model else _model_ids(by_folder.values())
    tasks = datasets[0] if datasets else TASKS_NAME
    results = [r for circuit in by_folder.values() for r in circuit_results(circuit, tasks)]
    title = repo_title(repo_id)
    data = ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=all_tags(["circuit"], tags),
        base_model=models[0] if len(models) == 1 else models or None,
        datasets=list(datasets) or None,
        metrics=sorted({r.metric_type for r in results}) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    first_folder, first = next(iter(by_folder.items()))
    return render(
        ModelCard,
        "circuit.md",
        data,
        title=text(title),
        summary=_summary(by_folder, models),
        circuits=[
            _part(folder, circuit, _in(folder, pictures), len(by_folder) > 1)
            for folder, circuit in by_folder.items()
        ],
        snippet=_snippet(repo_id, first_folder, first, models),
        method=_method(by_folder),
    )


def circuit_results(circuit: Circuit, tasks: str) -> list[EvalResult]:
    """The numbers of a circuit for a model-index."""
    where = (tasks, f"{circuit.task} (held-out prompts)", circuit.task)
    return [
        result(metric, name, value, *where)
        for key, metric, name in (
            ("circuit_loss", "task_loss", "Task loss of the circuit alone (nats)"),
            ("circuit_accuracy", "accuracy", "Accuracy of the circuit alone"),
            ("edges", "circuit_size", "Edges of the circuit"),
        )
        if (value := measured(circuit.metrics, key)) is not None
    ]


def _model_ids(circuits: Any) -> list[str]:
    return list(dict.fromkeys(c.model_name for c in circuits if is_hub_id(c.model_name)))


def _summary(by_folder: Mapping[str, Circuit], models: Sequence[str]) -> str:
    of_model = f"the model {' and '.join(code(m) for m in models)}" if models else "a model"
    fingerprints = sorted({circuit.model_fingerprint for circuit in by_folder.values()})
    revisions = {getattr(circuit, "model_revision", "") for circuit in by_folder.values()} - {""}
    known = f"fingerprint {', '.join(code(f) for f in fingerprints)}"
    if revisions:
        known += f", revision {', '.join(code(r) for r in sorted(revisions))}"
    if len(by_folder) == 1:
        circuit = next(iter(by_folder.values()))
        return (
            f"The {len(circuit)} nodes of {of_model} ({known}) that were found to carry the task "
            f"{code(circuit.task)}. How well they do it alone, with every other node fixed at its "
            "mean, the numbers below say."
        )
    return f"{len(by_folder)} circuits of {of_model} ({known}), one for each of these tasks."


def _in(folder: str, pictures: bool | Collection[str]) -> bool:
    return pictures if isinstance(pictures, bool) else folder in pictures


def _part(folder: str, circuit: Circuit, picture: bool, several: bool) -> dict[str, str]:
    prefix = f"{folder}/" if folder else ""
    example = circuit.example
    shown = {"prompt", "target", "counterfactual_target"} <= set(example)
    return {
        "heading": f"{code(circuit.task)}" if several else "",
        # A path in a link: what Markdown or HTML could read otherwise is percent-encoded.
        "picture": f"{quote(visible(prefix))}circuit.png" if picture else "",
        "numbers": table(
            ("", ""),
            [(name, number(_number(circuit, key), form)) for key, name, form in _NUMBERS],
        )
        + "\n\nTask losses are cross-entropies between the two answers on held-out prompts, in "
        "nats; guessing is 0.693.",
        "example": block(example["prompt"]) if shown else "",
        "answer": code(repr(example["target"])) if shown else "",
        "other": code(repr(example["counterfactual_target"])) if shown else "",
        "nodes": table(
            ("site", "nodes"),
            [(code(site), ", ".join(map(str, ids))) for site, ids in _shortened(circuit)],
        ),
        "checks": _checks(circuit),
    }


def _number(circuit: Circuit, key: str) -> float | None:
    return len(circuit) if key == "nodes" else measured(circuit.metrics, key)


def _shortened(circuit: Circuit, most: int = 40) -> list[tuple[str, list[Any]]]:
    return [
        (site, ids if len(ids) <= most else [*ids[:most], f"and {len(ids) - most} more"])
        for site, ids in circuit.nodes.items()
    ]


def _checks(circuit: Circuit) -> str:
    verification = getattr(circuit, "verification", None)
    if not verification:
        return f"{NOT_MEASURED}."
    rows = []
    for name, check in verification.items():
        threshold, verdict = measured(check, "threshold"), measured(check, "passed")
        bound = "–"
        if threshold is not None:
            bound = f"{'≥' if check.get('at_least') else '≤'} {threshold:g}"
        rows.append(
            (
                code(name),
                number(measured(check, "value")),
                number(measured(check, "control")),
                bound,
                "–" if threshold is None or verdict is None else ("pass" if verdict else "FAIL"),
            )
        )
    return "\n" + table(("check", "circuit", "random", "must be", ""), rows)


def _snippet(repo_id: str, folder: str, circuit: Circuit, models: Sequence[str]) -> str:
    where = f", subfolder={python(folder)}" if folder else ""
    load = f"circuit = Circuit.from_pretrained({python(repo_id)}{where})"
    show = "print(circuit.task, circuit.nodes, circuit.metrics)"
    if len(models) != 1:
        note = "# circuit.edges(model) and circuit.apply(model) take the model it was cut out of."
        return "\n".join(["from hf_circuit_sparsity import Circuit", "", load, show, note])
    lines = [
        "import torch",
        "from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM",
        "",
        load,
        show,
        f"model = CircuitGPTForCausalLM.from_pretrained({python(models[0])})",
        "print(circuit.edges(model))",
    ]
    if circuit.example.get("token_ids"):
        lines += [
            'ids = torch.tensor([circuit.example["token_ids"]])',
            "with circuit.apply(model):  # all other nodes are fixed at their means",
            "    print(model(ids).logits[0, -1].topk(3))",
        ]
    return "\n".join(lines)


def _method(by_folder: Mapping[str, Circuit]) -> str:
    configs = [circuit.config for circuit in by_folder.values()]
    if not configs[0] or any(config != configs[0] for config in configs):
        return "By `find_circuit` of `hf-circuit-sparsity`; `circuit.json` has the settings."
    rows = [(code(name), code(f"{value}"[:200])) for name, value in configs[0].items()]
    settings = table(("setting", "value"), rows)
    return f"By `find_circuit` of `hf-circuit-sparsity` with these settings:\n\n{settings}"
