"""The card of a repository of circuits.

A circuit is given as the content of its `circuit.json` (`Circuit.to_dict`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from ..hub_cards.card import TASKS_NAME, circuit_results, model_metadata, render
from .circuit_file import is_hub_id
from .evaluation.verdict import verdict


def circuit_card(
    circuits: Mapping[str, Mapping[str, Any]],
    *,
    repo_id: str,
    pictures: Collection[str] = (),
    others: Sequence[str] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    mark: bool = False,
) -> ModelCard:
    """The card of one circuit, or of a repository with several.

    Args:
        circuits: folder in the repository, "" for its root → content of the `circuit.json` there.
        repo_id: where they are published, `user/name`; the example loads the first from there.
        pictures: the folders with a `circuit.png`.
        others: folders of further circuits in the repository, which the card only names.
        base_model: Hub id of the model they were cut out of; what the circuits name if not given.
        datasets: Hub ids of the tasks' datasets.
        license: as the Hub names it.
        tags: beside the usual ones.
        mark: whether the next push may write the card anew.

    Raises:
        ValueError: there is no circuit.
    """
    if not circuits:
        raise ValueError(f"There is no circuit to write a card for {repo_id!r} about; pass one.")
    contents = list(circuits.values())
    named = dict.fromkeys(c["model_name"] for c in contents if is_hub_id(c["model_name"]))
    models = [base_model] if base_model else list(named)
    dataset = datasets[0] if datasets else TASKS_NAME
    results = [result for content in contents for result in circuit_results(content, dataset)]
    data = model_metadata(
        repo_id,
        results,
        tags=["circuit", *tags],
        datasets=datasets,
        license=license,
        base_model=models[0] if len(models) == 1 else models or None,
    )
    settings = contents[0]["config"]
    return render(
        "circuit.md",
        data,
        repo_id,
        mark=mark,
        models=models,
        fingerprints=sorted({c["model_fingerprint"] for c in contents}),
        revisions=sorted({c["model_revision"] for c in contents} - {""}),
        circuits=[
            {
                **content,
                "folder": folder,
                "picture": f"{folder}/circuit.png".lstrip("/") if folder in pictures else "",
                "size": sum(map(len, content["nodes"].values())),
                "verdict": verdict(content["verification"]),
                "called": _called(content),
            }
            for folder, content in circuits.items()
        ],
        others=others,
        settings=settings if all(c["config"] == settings for c in contents) else {},
    )


def _called(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Nodes that people named or noted something of: node, name, note."""
    names, notes = content.get("names", {}), content.get("notes", {})
    nodes = dict.fromkeys([*names, *notes])
    return [(node, names.get(node, ""), notes.get(node, "")) for node in nodes]
