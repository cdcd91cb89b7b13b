"""Which weights of a model the fine-tuning of one circuit trains."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...circuits.circuit import Circuit
from ...circuits.edges import Edge
from ...decoders.decoder import decoder_of
from ..peft_types import WholeAdapterConfig, peft_type

UNEMBEDDINGS = ("lm_head", "embed_out")  # as models of transformers name theirs


@dataclass
class CircuitPeftConfig(WholeAdapterConfig):
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
        return [name for name in self.edges if name not in UNEMBEDDINGS]

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
            model: of any architecture that has a [`Decoder`].
            tokens: token ids whose unembedding weights on the channels the circuit writes to are
                trained too. An unembedding that is tied to the embedding is untied for that.
            into: train only the edges into these kinds of sites, for example `["resid_delta"]` for
                those that write to the residual stream; all if `None`.
            kwargs: other fields of the config.

        Raises:
            ValueError: the circuit belongs to another model, or there is no such edge.
        """
        chosen = circuit.edges(model)
        if into is not None:
            chosen = [e for e in chosen if e.target_site.rpartition(".")[2] in into]
        edges = edge_weights(model, chosen)
        written = {c for s, ids in circuit.nodes.items() if s.endswith("resid_delta") for c in ids}
        rows = [[int(t), channel] for t in sorted(set(tokens)) for channel in sorted(written)]
        if rows:
            edges[unembedding_name(model)] = rows
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


def edge_weights(model: nn.Module, edges: Iterable[Edge]) -> dict[str, list[list[int]]]:
    """The weights that edges are: name of a layer → `[output, input]` of each."""
    names = {module: name for name, module in model.named_modules()}
    layers = {
        (projection.source, target.site, target.gate): (names[projection.module], target.rows)
        for projection in decoder_of(model).projections()
        for target in projection.targets
    }
    weights: dict[str, list[list[int]]] = {}
    for edge in edges:
        name, rows = layers[edge.source_site, edge.target_site, edge.gate]
        row = edge.target if rows is None else int(rows[edge.target])
        weights.setdefault(name, []).append([row, edge.column])
    return weights


def unembedding_name(model: nn.Module) -> str:
    """The name of the layer that writes the logits."""
    unembedding = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is unembedding)
