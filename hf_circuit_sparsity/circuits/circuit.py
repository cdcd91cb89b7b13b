"""A circuit: which nodes of a model carry a behaviour, and how to run the model on them alone."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..modeling.fingerprint import model_fingerprint
from .ablation import mean_ablated
from .edges import Edge, circuit_edges
from .task_loss import Calibration

FORMAT_VERSION = 1
JSON_NAME = "circuit.json"
TENSORS_NAME = "circuit.safetensors"


@dataclass
class Circuit:
    """Nodes of one model that carry one behaviour.

    Attributes:
        nodes: site → sorted indices of the kept nodes; sites without any are left out.
        means: site → float32 `(width,)`, the values the other nodes are fixed at; every site of
            the model.
        calibration: scale and shift of the logits that belong to the circuit.
        task: name of the task it was found for.
        model_fingerprint: of the model it was cut out of (see `model_fingerprint`).
        model_name: that model's path or Hub id, for people to find it.
        metrics: numbers about it, by name (losses in nats).
        config: how it was found, as plain values.
        example: a prompt of the task, its counterfactual and the answers, for pictures: `prompt`,
            `target`, `token_ids`, `target_id`, and the same names with `counterfactual_`.
        scores: site → float32 `(width,)`, the learned mask parameters; empty if it was not learned.
    """

    nodes: dict[str, list[int]]
    means: dict[str, torch.Tensor]
    task: str
    model_fingerprint: str
    calibration: Calibration = field(default_factory=Calibration)
    model_name: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {site: sorted(ids) for site, ids in self.nodes.items() if ids}
        for site, ids in self.nodes.items():
            if site not in self.means:
                raise ValueError(f"nodes names the site {site!r}, which means does not have.")
            width = len(self.means[site])
            if len(set(ids)) != len(ids) or ids[0] < 0 or ids[-1] >= width:
                raise ValueError(
                    f"nodes[{site!r}] must be distinct indices from 0 to {width - 1}, but it is "
                    f"{ids[:5]}{'…' if len(ids) > 5 else ''}."
                )

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.nodes.values())

    def masks(self) -> dict[str, torch.Tensor]:
        """Site → bool `(width,)`, true for the circuit's nodes; every site of the model."""
        masks = {}
        for site, mean in self.means.items():
            masks[site] = torch.zeros(len(mean), dtype=torch.bool)
            masks[site][self.nodes.get(site, [])] = True
        return masks

    def edges(self, model: nn.Module) -> list[Edge]:
        """The nonzero weights of `model` between two of the circuit's nodes."""
        self.check_model(model)
        return circuit_edges(model, self.nodes)

    def check_model(self, model: nn.Module) -> None:
        """Raise a `ValueError` if `model` is not the one this circuit was cut out of."""
        fingerprint = model_fingerprint(model)
        if fingerprint != self.model_fingerprint:
            known = f" ({self.model_name})" if self.model_name else ""
            raise ValueError(
                f"This circuit for {self.task!r} was cut out of the model {self.model_fingerprint}"
                f"{known}, but the model passed is {fingerprint}; load that model, or find the "
                "circuit anew in this one."
            )

    @contextmanager
    def apply(
        self, model: nn.Module, *, calibrated: bool = True, inverse: bool = False
    ) -> Iterator[nn.Module]:
        """Within the block, `model` runs on this circuit alone: all other nodes are mean-ablated.

        Args:
            model: the model this circuit was cut out of.
            calibrated: also scale and shift the logits as fitted. Never done for the inverse.
            inverse: ablate the circuit instead, and keep everything else (a test of necessity).

        Raises:
            ValueError: the circuit was made for another model.
        """
        self.check_model(model)
        masks = self.masks()
        if inverse:
            masks = {site: ~mask for site, mask in masks.items()}

        def calibrate(module, args, output):
            output.logits = self.calibration.logits(output.logits)
            return output

        with mean_ablated(model, masks, self.means):
            handle = None
            if calibrated and not inverse:
                handle = model.register_forward_hook(calibrate)
            try:
                yield model
            finally:
                if handle is not None:
                    handle.remove()

    def plot(self, path: str | os.PathLike, model: nn.Module, tokenizer: Any = None) -> Path:
        """Draw the circuit as a layered graph into a PNG, SVG or PDF file (needs matplotlib).

        Args:
            path: where to; its ending says the format.
            model: the model the circuit was cut out of; its weights are the edges.
            tokenizer: names the tokens at both ends, if given.
        """
        from .plot import plot_circuit

        return plot_circuit(self, path, model, tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `circuit.json` and `circuit.safetensors` into a folder, each moved into place."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"means.{site}": mean.contiguous() for site, mean in self.means.items()}
        tensors |= {f"scores.{site}": s.contiguous() for site, s in self.scores.items()}
        temporary = folder / f".{TENSORS_NAME}.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / TENSORS_NAME)
        temporary = folder / f".{JSON_NAME}.tmp"
        shift = {str(token): value for token, value in self.calibration.shift.items()}
        content = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "model_name": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "nodes": self.nodes,
            "calibration": {"scale": self.calibration.scale, "shift": shift},
            "metrics": self.metrics,
            "config": self.config,
            "example": self.example,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, folder / JSON_NAME)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "Circuit":
        """Read a circuit from a folder that [`Circuit.save_pretrained`] wrote.

        Raises:
            FileNotFoundError: one of its two files is missing.
            ValueError: a file is damaged or does not hold a circuit; names the file and the field.
        """
        folder = Path(directory)
        for name in (JSON_NAME, TENSORS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} was not found; a circuit is a folder with {JSON_NAME} and "
                    f"{TENSORS_NAME}."
                )
        content = _read_json(folder / JSON_NAME)
        try:
            tensors = load_file(folder / TENSORS_NAME)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / TENSORS_NAME} is damaged ({error}); copy or download it again."
            ) from error
        by_kind: dict[str, dict[str, torch.Tensor]] = {"means": {}, "scores": {}}
        for key, tensor in tensors.items():
            kind, _, site = key.partition(".")
            if kind not in by_kind or tensor.dim() != 1 or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{folder / TENSORS_NAME} has {key!r} of dtype {tensor.dtype} and shape "
                    f"{tuple(tensor.shape)}, expected float32 vectors named means.* and scores.*."
                )
            by_kind[kind][site] = tensor
        calibration = content["calibration"]
        try:
            return cls(
                nodes=content["nodes"],
                calibration=Calibration(
                    float(calibration["scale"]),
                    {int(t): float(v) for t, v in calibration["shift"].items()},
                ),
                **by_kind,
                **{
                    name: content[name]
                    for name in (
                        "task",
                        "model_name",
                        "model_fingerprint",
                        "metrics",
                        "config",
                        "example",
                    )
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / JSON_NAME} does not hold a circuit: {error}") from error


_FIELD_TYPES: Mapping[str, type] = {
    "task": str,
    "model_name": str,
    "model_fingerprint": str,
    "nodes": dict,
    "calibration": dict,
    "metrics": dict,
    "config": dict,
    "example": dict,
}


def _read_json(path: Path) -> dict[str, Any]:
    """The content of `circuit.json`, each field of the type it must have."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, but this library reads {FORMAT_VERSION}; "
            "update the library or make the circuit anew."
        )
    for name, kind in _FIELD_TYPES.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(
                f"{path}: {name} must be of type {kind.__name__}, but it is "
                f"{type(content.get(name)).__name__}."
            )
    for site, ids in content["nodes"].items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError(f"{path}: nodes[{site!r}] must be a list of integers.")
    return content
