"""Which weights of a model the fine-tuning of one circuit trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn

from ...circuits.circuit import Circuit
from ...circuits.edges import Edge
from ..peft_types import peft_type

UNEMBEDDING = "lm_head"


@dataclass
class CircuitPeftConfig(PeftConfig):
    """Trains one number for each edge of a circuit; make one with [`from_circuit`].

    Attributes:
        edges: full layer name to a list of `[row, column]` of its weight, rows being outputs.
        task: name of the circuit's task.
        base_model_fingerprint: of the model the circuit belongs to; not checked if empty.

    Raises:
        ValueError: an edge that is no `[row, column]`, or is given twice.
    """

    PEFT_TYPE = peft_type("CIRCUIT_EDGES")

    edges: dict[str, list[list[int]]] = field(
        default_factory=dict, metadata={"help": "Layer name to [row, column] of its weights."}
    )
    task: str = field(default="", metadata={"help": "Name of the circuit's task."})
    base_model_fingerprint: str = field(
        default="", metadata={"help": "Fingerprint of the model that the circuit belongs to."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.PEFT_TYPE
        for name, pairs in self.edges.items():
            distinct = {tuple(pair) for pair in pairs}
            if len(distinct) != len(pairs) or any(len(pair) != 2 for pair in distinct):
                raise ValueError(
                    f"edges[{name!r}] is {pairs[:3]}{'…' if len(pairs) > 3 else ''}, expected a "
                    "list of distinct [row, column]."
                )

    @property
    def target_modules(self) -> list[str]:
        """The layers inside the blocks that have edges.

        Without the unembedding: PEFT would save the whole of a layer it takes for an embedding.
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
            tokens: token ids whose unembedding weights on the channels the circuit writes to are
                trained too.
            into: train only the edges into these kinds of sites, for example `["resid_delta"]` for
                those that write to the residual stream; all if `None`.
            kwargs: other fields of the config.

        Raises:
            ValueError: the circuit belongs to another model, or there is no such edge.
        """
        edges: dict[str, list[list[int]]] = {}
        for edge in circuit.edges(model):
            if into is None or edge.target_site.rpartition(".")[2] in into:
                name, row, column = edge_weight(model, edge)
                edges.setdefault(name, []).append([row, column])
        written = {c for s, ids in circuit.nodes.items() if s.endswith("resid_delta") for c in ids}
        rows = [[int(t), channel] for t in sorted(set(tokens)) for channel in sorted(written)]
        if rows:
            edges[UNEMBEDDING] = rows
        if not edges:
            raise ValueError(
                f"The circuit for {circuit.task!r} has no such edge, so there is nothing to train; "
                "pass tokens or other sites, or find a larger circuit with a smaller target_loss."
            )
        defaults = {"base_model_name_or_path": circuit.model_name, "task_type": "CAUSAL_LM"}
        return cls(
            edges=edges,
            task=circuit.task,
            base_model_fingerprint=circuit.model_fingerprint,
            **{**defaults, **kwargs},
        )


def edge_weight(model: nn.Module, edge: Edge) -> tuple[str, int, int]:
    """The layer of a CircuitGPT that an edge is a weight of, and its row and column there."""
    block, _, target = edge.target_site.rpartition(".")
    prefix = "transformer." if hasattr(model, "transformer") else ""
    if target in ("q", "k", "v"):
        inner = model.get_submodule(f"{prefix}{block}.c_attn").weight.shape[0] // 3
        return f"{prefix}{block}.c_attn", "qkv".index(target) * inner + edge.target, edge.source
    layer = "c_fc" if target == "post_act" else "c_proj"
    return f"{prefix}{block}.{layer}", edge.target, edge.source
