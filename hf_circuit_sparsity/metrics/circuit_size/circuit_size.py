"""`evaluate` module: how small circuits are, over one task or many."""

import datasets
import evaluate

from .geometric_mean import geometric_mean, shares

_DESCRIPTION = """
Size of circuits: the geometric means of their numbers of nodes and of edges over tasks, and of the
shares of the model's nodes and weights that these are.
"""
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
_CITATION = """
@article{gao2025weight,
  title={Weight-sparse transformers have interpretable circuits},
  author={Gao, Leo and others},
  journal={arXiv preprint arXiv:2511.13653},
  year={2025}
}
"""


class CircuitSize(evaluate.Metric):
    """See `_INPUTS` above."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"nodes": datasets.Value("int64"), "edges": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2511.13653"],
        )

    def _compute(self, nodes, edges, model_nodes=None, model_edges=None) -> dict[str, float]:
        result = {"nodes": geometric_mean(nodes), "edges": geometric_mean(edges)}
        if model_nodes is not None:
            result["node_share"] = geometric_mean(shares(nodes, model_nodes))
        if model_edges is not None:
            result["edge_share"] = geometric_mean(shares(edges, model_edges))
        return result
