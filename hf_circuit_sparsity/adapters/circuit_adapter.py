"""Fine-tuning the weights of one circuit and nothing else, as a PEFT method.

The trainable parameters are one number for each edge of the circuit, added to the weight that is
that edge; the adapter is as small as the circuit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..circuits.circuit import Circuit
from ..circuits.edges import Edge
from ..modeling.fingerprint import model_fingerprint

UNEMBEDDING = "lm_head"


def edge_weight(model: nn.Module, edge: Edge) -> tuple[str, int, int]:
    """The layer of a CircuitGPT that an edge is a weight of, and its row and column there."""
    block, _, target = edge.target_site.rpartition(".")
    prefix = "transformer." if hasattr(model, "transformer") else ""
    if target in ("q", "k", "v"):
        inner = model.get_submodule(f"{prefix}{block}.c_attn").weight.shape[0] // 3
        return f"{prefix}{block}.c_attn", "qkv".index(target) * inner + edge.target, edge.source
    layer = "c_fc" if target == "post_act" else "c_proj"
    return f"{prefix}{block}.{layer}", edge.target, edge.source


@dataclass
class CircuitPeftConfig(PeftConfig):
    """Which weights are trained; make one with [`from_circuit`].

    Attributes:
        edges: full layer name → list of `[row, column]` of its weight, rows being outputs.
        task: the circuit's task, for people.
        base_model_fingerprint: of the model the circuit belongs to; not checked if empty.
    """

    PEFT_TYPE = "CIRCUIT_EDGES"

    edges: dict[str, list[list[int]]] = field(
        default_factory=dict, metadata={"help": "Layer name to [row, column] of its weights."}
    )
    task: str = field(default="", metadata={"help": "The circuit's task."})
    base_model_fingerprint: str = field(
        default="", metadata={"help": "Of the model that the circuit belongs to."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.PEFT_TYPE
        for name, pairs in self.edges.items():
            places = {tuple(pair) for pair in pairs}
            if len(places) != len(pairs) or any(len(pair) != 2 for pair in places):
                raise ValueError(
                    f"edges[{name!r}] must be a list of different [row, column], but it is "
                    f"{pairs[:3]}{'…' if len(pairs) > 3 else ''}."
                )

    @property
    def target_modules(self) -> list[str]:
        """The layers inside the blocks that have edges.

        Without the unembedding: PEFT would save all of a layer that it takes for an embedding.
        """
        return [name for name in self.edges if name != UNEMBEDDING]

    @classmethod
    def from_circuit(
        cls,
        circuit: Circuit,
        model: nn.Module,
        tokens: Sequence[int] = (),
        into: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "CircuitPeftConfig":
        """Train the edges of `circuit`.

        Args:
            circuit: of `model`.
            model: a CircuitGPT.
            tokens: ids of tokens whose unembedding weights on the channels the circuit writes to
                are edges too.
            into: only the edges into these kinds of sites, for example `["resid_delta"]` for those
                that write to the residual stream; all if not given.
            kwargs: other fields of the config.

        Raises:
            ValueError: the circuit belongs to another model, or has no edge.
        """
        edges: dict[str, list[list[int]]] = {}
        for edge in circuit.edges(model):
            if into is not None and edge.target_site.rpartition(".")[2] not in into:
                continue
            name, row, column = edge_weight(model, edge)
            edges.setdefault(name, []).append([row, column])
        written = {c for s, ids in circuit.nodes.items() if s.endswith("resid_delta") for c in ids}
        rows = [
            [int(token), channel] for token in sorted(set(tokens)) for channel in sorted(written)
        ]
        if rows:
            edges[UNEMBEDDING] = rows
        if not edges:
            raise ValueError(
                f"The circuit for {circuit.task!r} has no such edge, so there is nothing to train; "
                "pass tokens or other sites, or find a larger circuit with a smaller target_loss."
            )
        return cls(
            edges=edges,
            task=circuit.task,
            base_model_fingerprint=circuit.model_fingerprint,
            base_model_name_or_path=kwargs.pop("base_model_name_or_path", circuit.model_name),
            task_type=kwargs.pop("task_type", "CAUSAL_LM"),
            **kwargs,
        )


class CircuitLayer(nn.Module, BaseTunerLayer):
    """A linear layer with something added to a few of its weights."""

    adapter_layer_names = ("circuit_values",)

    def __init__(self, base_layer: nn.Module):
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.circuit_values = nn.ParameterDict()
        # Row and column of each value, by adapter. They are in the config, not in the weights.
        self.places: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, places: Iterable[Sequence[int]], inference: bool) -> None:
        """Give an adapter its values, zero at first."""
        weight = self.get_base_layer().weight
        self.places[adapter_name] = torch.tensor(list(places), dtype=torch.long).T
        values = torch.zeros(self.places[adapter_name].shape[1], device=weight.device)
        self.circuit_values[adapter_name] = nn.Parameter(values, requires_grad=not inference)

    def _weight_index(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.places[adapter_name].to(self.get_base_layer().weight.device)
        return (columns, rows) if isinstance(self.get_base_layer(), Conv1D) else (rows, columns)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name not in self.circuit_values:
                continue
            rows, columns = self.places[name].to(x.device)
            values = self.circuit_values[name].to(x.dtype)
            y = y.index_add(-1, rows, x.index_select(-1, columns) * values)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the values to the layer's own weights."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.circuit_values:
                continue
            values = self.circuit_values[name]
            if safe_merge and not torch.isfinite(values).all():
                raise ValueError(f"The adapter {name!r} has values that are not finite.")
            weight = self.get_base_layer().weight
            weight.index_put_(self._weight_index(name), values.to(weight.dtype), accumulate=True)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo [`merge`]."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            values = -self.circuit_values[name].to(weight.dtype)
            weight.index_put_(self._weight_index(name), values, accumulate=True)


class CircuitTuner(BaseTuner):
    """Puts a [`CircuitLayer`] around every layer with edges.

    Raises:
        ValueError: the adapter belongs to another model, or names a weight that is not there.
    """

    prefix = "circuit_"
    tuner_layer_cls = CircuitLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _pre_injection_hook(
        self, model: nn.Module, config: CircuitPeftConfig, adapter_name: str
    ) -> None:
        wanted = config.base_model_fingerprint
        # The first adapter only: afterwards the state dict has the adapters' own weights.
        if wanted and not any(isinstance(m, CircuitLayer) for m in model.modules()):
            found = model_fingerprint(model)
            if found != wanted:
                known = config.base_model_name_or_path
                raise ValueError(
                    f"This adapter trains a circuit for {config.task!r} of the model {wanted}"
                    f"{f' ({known})' if known else ''}, but the model passed is {found}; load "
                    "that model, or find the circuit anew in this one."
                )
        modules = dict(model.named_modules())
        for name, places in config.edges.items():
            layer = modules.get(name)
            layer = layer.get_base_layer() if isinstance(layer, CircuitLayer) else layer
            if not isinstance(layer, nn.Linear | Conv1D):
                raise ValueError(
                    f"The adapter names the layer {name!r}, which is "
                    f"{'not there' if layer is None else type(layer).__name__}; expected a Linear "
                    "or Conv1D of the model it was made for (call to_dense() if it runs on its "
                    "nonzeros)."
                )
            shape = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
            for row, column in places:
                if not (0 <= row < shape[0] and 0 <= column < shape[1]):
                    raise ValueError(
                        f"The adapter names the weight [{row}, {column}] of {name}, which has "
                        f"the shape {list(shape)}."
                    )

    @staticmethod
    def _check_target_module_exists(config: CircuitPeftConfig, key: str) -> bool:
        return key in config.edges

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: CircuitPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target
        if not isinstance(target, CircuitLayer):
            layer = CircuitLayer(target)
            setattr(parent, target_name, layer)
        layer.add(adapter_name, peft_config.edges[current_key], peft_config.inference_mode)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
