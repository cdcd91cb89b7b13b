"""The card of a bridge between a dense model and its sparse twin."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..bridge.modeling_bridge import BridgedCausalLM
from ..hub.repository import is_hub_id
from .markdown import NOT_MEASURED, code, number, python, table, text
from .metadata import LIBRARY, all_tags, measured, render, repo_title, result

_TERMS = (
    ("lm", "the twin's loss", "nats per token"),
    ("kl", "KL(dense ‖ twin)", "nats per token"),
    ("nmse", "normalised error of the bridges", "share of variance missed, both ways added"),
    ("dense_to_sparse", "KL of runs from dense to sparse", "nats per token"),
    ("sparse_to_dense", "KL of runs from sparse to dense", "nats per token"),
)


def bridge_card(
    bridged: BridgedCausalLM,
    *,
    repo_id: str,
    summary: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of a bridge.

    Args:
        bridged: its configs go onto the card.
        repo_id: where it is published, `user/name`; the example loads it from there.
        summary: what training measured, the content of `bridge_summary.json`.
        base_model: Hub id of the dense model; what the bridge names if not given.
        datasets: Hub ids of what it was trained on.
        license: as the Hub names it.
        tags: beside the usual ones.
    """
    config = bridged.config
    named = config.base_model_name_or_path
    base = base_model or (named if is_hub_id(named) else None)
    title = repo_title(repo_id)
    results = [
        result(metric, name, value, "python", "Held-out Python")
        for metric, name, _ in _TERMS
        if (value := measured(summary, metric)) is not None
    ]
    data = ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=all_tags(["bridge", "sparse-twin"], tags),
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=list(datasets) or None,
        metrics=sorted({r.metric_type for r in results}) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    twin = bridged.sparse.config
    keeps = config.encoder_afrac
    dense = code(base) if base else f"a {code(config.base_model_type)} model that is not named"
    rows = [
        ("dense model", dense),
        ("its fingerprint", code(config.base_model_fingerprint)),
        ("its width", str(config.base_width)),
        ("sparse twin", f"{twin.n_layer} layers, d_model {twin.d_model}"),
        ("bridges", f"{bridged.n_locations}, one for each residual location"),
        ("encoders keep", "all channels" if keeps is None else f"the largest {keeps:.0%}"),
    ]
    return render(
        ModelCard,
        "bridge.md",
        data,
        title=text(title),
        summary=(
            f"A sparse twin of {dense}, and bridges that map the residual stream of one model to "
            "that of the other, so that what is found in the twin can be tried on the dense model."
        ),
        snippet=_snippet(repo_id, base),
        models=table(("", ""), rows),
        evaluation=_evaluation(bridged, summary),
    )


def _evaluation(bridged: BridgedCausalLM, summary: Mapping[str, Any] | None) -> str:
    parts = [
        table(
            ("", "", ""),
            [(name, number(measured(summary, key)), unit) for key, name, unit in _TERMS],
        )
    ]
    columns = ("encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl")
    rows = []
    for i in range(bridged.n_locations):
        values = [measured(summary, f"{column}_{i}") for column in columns]
        rows.append([str(i), *map(number, values)])
    if any(cell != NOT_MEASURED for row in rows for cell in row[1:]):
        parts.append(
            "By residual location (0 is after the embedding, 2i + 1 after the attention of layer "
            "i, 2i + 2 after its MLP); NMSE is the share of variance missed, KL of the hybrid run:"
        )
        header = ("location", "NMSE encoding", "decoding", "KL dense → sparse", "sparse → dense")
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def _snippet(repo_id: str, base: str | None) -> str:
    dense = "" if base else ", dense=dense"
    lines = ["import torch", "from hf_circuit_sparsity import BridgedCausalLM", ""]
    if not base:
        lines += ["# `dense` is the model that the bridge was trained for."]
    lines += [
        f"bridged = BridgedCausalLM.from_pretrained({python(repo_id)}{dense})",
        "ids = torch.tensor([[1, 2, 3]])",
        "before = bridged.dense(ids).logits",
        "with bridged.steer(0, channel=0, strength=5.0):  # moves one sparse channel",
        "    after = bridged.dense(ids).logits",
        "print((after - before).abs().max())",
    ]
    return "\n".join(lines)
