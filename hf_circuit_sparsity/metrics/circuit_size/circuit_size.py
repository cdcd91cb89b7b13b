"""How small circuits are, over one task or many: geometric means of their nodes and edges."""

import datasets
import evaluate

from .geometric_mean import geometric_mean, shares

_INPUTS = """
Args:
    nodes: (n,) nodes of each circuit.
    edges: (n,) edges of each circuit: nonzero weights between two of its nodes.
    model_nodes: optional, (n,) nodes of the model each was cut out of.
    model_edges: optional, (n,) nonzero weights between nodes of that model.
Returns:
    nodes, edges: geometric means over the circuits; 0 if one of them has none.
    node_share, edge_share: with the model's numbers, geometric means of the shares.
"""


class CircuitSize(evaluate.Metric):
    """See `_INPUTS` above."""

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            inputs_description=_INPUTS,
            citation="Gao et al. 2025, Weight-sparse transformers have interpretable circuits",
            features=datasets.Features({"nodes": integer, "edges": integer}),
            reference_urls=["https://arxiv.org/abs/2511.13653"],
        )

    def _compute(self, nodes, edges, model_nodes=None, model_edges=None) -> dict[str, float]:
        result = {"nodes": geometric_mean(nodes), "edges": geometric_mean(edges)}
        if model_nodes is not None:
            result["node_share"] = geometric_mean(shares(nodes, model_nodes))
        if model_edges is not None:
            result["edge_share"] = geometric_mean(shares(edges, model_edges))
        return result
