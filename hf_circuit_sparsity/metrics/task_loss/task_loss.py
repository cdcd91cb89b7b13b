"""Cross-entropy and accuracy of a model between the two candidate tokens of a binary task."""

import datasets
import evaluate

from .pair_loss import answer_pairs, task_accuracy, task_loss

_INPUTS = """
Args:
    predictions: logits (n, k) at the answer's position, of the two candidates (k = 2) or of the
        whole vocabulary.
    references: (n,) column of the right candidate; with the whole vocabulary, its token id.
    counterfactual_references: (n,) column of the wrong candidate; may be left out where k is 2.
Returns:
    task_loss: mean of -log p(right candidate) between the two, in nats; guessing is ln 2 = 0.693.
    task_accuracy: share of rows in which the right candidate has the larger logit.
"""


class TaskLoss(evaluate.Metric):
    """See `_INPUTS` above."""

    def _info(self) -> evaluate.MetricInfo:
        logits, column = datasets.Sequence(datasets.Value("float32")), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            inputs_description=_INPUTS,
            citation="Gao et al. 2025, Weight-sparse transformers have interpretable circuits",
            features=datasets.Features({"predictions": logits, "references": column}),
            reference_urls=["https://arxiv.org/abs/2511.13653"],
        )

    def _compute(self, predictions, references, counterfactual_references=None) -> dict[str, float]:
        pairs = answer_pairs(predictions, references, counterfactual_references)
        return {"task_loss": task_loss(pairs), "task_accuracy": task_accuracy(pairs)}
