"""How faithfully a circuit alone follows the whole model's choice between two candidate tokens."""

import datasets
import evaluate

from .pair_agreement import agreement, check_pairs, pair_kl, recovered

_INPUTS = """
Args:
    predictions: the circuit's logits (n, 2) of the right and of the wrong candidate.
    references: the whole model's, in the same order.
    baseline: optional; those of the model with every node ablated.
Returns:
    agreement: share of rows in which both prefer the same candidate.
    kl: mean KL(model || circuit) over the two candidates, in nats.
    faithfulness: with a baseline, the share of the model's mean logit difference (right minus
        wrong) above the baseline's that the circuit recovers; 1 is all of it.
"""


class CircuitFaithfulness(evaluate.Metric):
    """See `_INPUTS` above."""

    def _info(self) -> evaluate.MetricInfo:
        pairs = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=__doc__,
            inputs_description=_INPUTS,
            citation="Wang et al. 2023, Interpretability in the Wild: a Circuit for Indirect "
            "Object Identification in GPT-2 small",
            features=datasets.Features({"predictions": pairs, "references": pairs}),
            reference_urls=["https://arxiv.org/abs/2211.00593", "https://arxiv.org/abs/2511.13653"],
        )

    def _compute(self, predictions, references, baseline=None) -> dict[str, float]:
        circuit = check_pairs("predictions", predictions)
        model = check_pairs("references", references, len(circuit))
        result = {"agreement": agreement(circuit, model), "kl": pair_kl(circuit, model)}
        if baseline is not None:
            ablated = check_pairs("baseline", baseline, len(circuit))
            result["faithfulness"] = recovered(circuit, model, ablated)
        return result
