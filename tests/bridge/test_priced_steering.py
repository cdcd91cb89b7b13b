"""Directions are compared at the same price, on a model whose circuit is known."""

import pytest
import torch

from hf_circuit_sparsity.bridge.losses import mean_kl
from hf_circuit_sparsity.bridge.priced_steering import (
    StreamShift,
    best_at_price,
    channel_shifts,
    mean_difference_shifts,
    shifted,
)
from hf_circuit_sparsity.bridge.steering import answer_probabilities, answer_rows
from hf_circuit_sparsity.bridge.steering import steering_candidates as candidates
from tests.bridge.test_steering import planted_bridge
from tests.circuits.planted import YES, on_off_task, reference_ids

bridged = pytest.fixture(planted_bridge)


def test_the_answers_channel_goes_farther_than_others_at_the_same_price(bridged):
    task, text = on_off_task(), reference_ids()[:8]
    ranked = candidates(bridged, task, YES)
    answers = [c for c in ranked if (c.location, c.channel) == (4, 4)]
    others = [StreamShift(4, torch.eye(16)[c], c) for c in (1, 6, 9)]
    found = best_at_price(bridged.dense, task, YES, channel_shifts(bridged, answers), text, 4.0)
    control = best_at_price(bridged.dense, task, YES, others, text, 4.0)
    assert 3.9 < found.text_kl <= 4.0 and control.text_kl <= 4.0
    assert found.unsteered_probability == control.unsteered_probability < 0.01
    # Followed far enough, the others drown out all else, and the answer is anyone's.
    assert found.other_probability > 0.9 > 0.7 > control.other_probability
    assert found.shift.channel == 4 and found.answer_probability < 0.1


def test_the_figures_are_those_of_the_steered_model(bridged):
    task, text = on_off_task(), reference_ids()[:8]
    found = best_at_price(
        bridged.dense, task, YES, mean_difference_shifts(bridged.dense, task, YES), text
    )
    rows = answer_rows(task, "test", YES, 128)
    plain = bridged.dense(text).logits
    with shifted(bridged.dense, found.shift, found.scale), torch.no_grad():
        assert answer_probabilities(bridged.dense, rows) == pytest.approx(
            (found.answer_probability, found.other_probability)
        )
        assert mean_kl(plain, bridged.dense(text).logits).item() == pytest.approx(found.text_kl)
    torch.testing.assert_close(bridged.dense(text).logits, plain)  # and nothing is left behind


def test_the_difference_of_means_is_that_of_the_streams(bridged):
    task = on_off_task()
    rows = answer_rows(task, "train", YES, 5)
    found = mean_difference_shifts(bridged.dense, task, YES, rows=5)
    assert [shift.location for shift in found] == list(range(bridged.n_locations))
    stream = bridged.dense_stream
    for location in (0, 2):
        means = []
        for side in ("counterfactual_", ""):
            x, context = stream.embed(rows[f"{side}input_ids"], rows[f"{side}attention_mask"])
            means.append(stream.run(x, context)[location][:, -1].mean(0))
        torch.testing.assert_close(found[location].vector, means[0] - means[1])


def test_a_direction_that_does_nothing_is_no_loop_without_end(bridged):
    still = [StreamShift(1, torch.zeros(16))]
    found = best_at_price(bridged.dense, on_off_task(), YES, still, reference_ids()[:2])
    assert found.text_kl == 0 and found.other_probability == found.unsteered_probability


@pytest.mark.parametrize(
    ("shifts", "price", "said"),
    [([], 0.1, "No shifts"), ([StreamShift(1, torch.ones(16))], 0.0, "price=0.0")],
)
def test_nothing_to_compare_is_refused(bridged, shifts, price, said):
    with pytest.raises(ValueError, match=said):
        best_at_price(bridged.dense, on_off_task(), YES, shifts, reference_ids()[:2], price)
