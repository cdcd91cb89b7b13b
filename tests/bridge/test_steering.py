"""Which channel to steer and what it does, on a model whose circuit is known."""

import pytest
import torch

from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.bridge.steering import (
    answer_probabilities,
    answer_rows,
    margin_gradients,
    steering_candidates,
    steering_sweep,
    tokens_beginning_alike,
)  # fmt: skip
from hf_circuit_sparsity.decoders.hooks import temporary_hooks
from tests.circuits.planted import (
    NO,
    YES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)  # fmt: skip


def planted_bridge() -> BridgedCausalLM:
    """The planted model is dense and sparse model at once; every bridge is the identity."""
    bridged = BridgedCausalLM.from_models(planted_model(), planted_model(), encoder_afrac=None)
    with torch.no_grad():
        for bridge in bridged.bridges:
            for linear in (bridge.encoder, bridge.decoder):
                linear.weight.copy_(torch.eye(len(linear.weight)))
                linear.bias.zero_()
    return bridged.eval()


bridged = pytest.fixture(planted_bridge)


def test_candidates_are_the_channels_that_carry_the_answer(bridged):
    with torch.no_grad():
        best = steering_candidates(bridged, on_off_task(), YES)[0]
    assert (best.location, best.channel) in {(1, 3), (2, 3), (3, 3), (4, 4)}
    assert best.effect > 0


def test_a_circuit_limits_the_candidates(bridged):
    circuit = planted_circuit(bridged.sparse)
    found = steering_candidates(bridged, on_off_task(), YES, circuit=circuit)
    places = {(candidate.location, candidate.channel) for candidate in found}
    assert places == {(0, 0), (1, 3), (3, 3), (4, 4)}


@pytest.mark.parametrize("where", [1, "h.0.attn.resid_delta", "h.1.mlp.post_act"])
def test_a_sweep_turns_the_answer_and_its_controls_do_not(bridged, where, tmp_path):
    channel = 7 if where == "h.1.mlp.post_act" else 3
    sweep = steering_sweep(
        bridged, on_off_task(), YES, where, channel, [-5, -10],
        random_channels=4, text=reference_ids()[:4],
    )  # fmt: skip
    assert sweep.strengths == [-10, -5, 0]
    assert (sweep.answer, sweep.other) == (" yes", " no")
    assert sweep.other_probability[0] > 0.5 > sweep.unsteered_probability
    assert sweep.answer_probability[0] < 0.3 < 0.5 < sweep.answer_probability[2]
    assert len(sweep.random_probability) == 4
    for line, kl in zip(sweep.random_probability, sweep.random_text_kl, strict=True):
        assert line[2] == pytest.approx(sweep.unsteered_probability)
        assert kl[2] == pytest.approx(0, abs=1e-6) and kl[0] > 0
    assert sorted(line[0] for line in sweep.random_probability)[2] < sweep.other_probability[0]
    picture = sweep.plot(tmp_path / "sweep.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_measured_probabilities_are_those_of_each_prompt_alone(bridged):
    """Padding on the left must not move the positions of a model that counts them itself."""
    task = on_off_task()
    sweep = steering_sweep(bridged, task, NO, 1, 3, [], random_channels=0, rows=7)
    rows = [row for row in task.test if row["target_id"] == NO][:7]
    alone = [
        bridged.dense(torch.tensor([row["input_ids"]])).logits[0, -1].softmax(-1)[YES].item()
        for row in rows
    ]
    assert sweep.unsteered_probability == pytest.approx(sum(alone) / 7, rel=1e-4)


def test_tokens_that_begin_with_the_answer_count_as_it(bridged):
    class Tokenizer:
        def __len__(self):
            return 16

        def decode(self, ids):
            return {YES: "yes", NO: "no", 5: "yes,", 6: "yes ", 7: "ye", 8: "not"}.get(ids[0], "-")

    tensors = answer_rows(on_off_task(), "test", YES, 5)
    same = tokens_beginning_alike(Tokenizer(), tensors)
    assert {k: v.tolist() for k, v in same.items()} == {YES: sorted([YES, 5, 6]), NO: [NO, 8]}
    logits = bridged.dense(tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
    p = logits[:, -1].softmax(-1).mean(0)
    found = answer_probabilities(bridged.dense, tensors, same)
    expected = p[[YES, 5, 6]].sum().item(), p[[NO, 8]].sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_answer_the_task_does_not_have_is_refused(bridged):
    with pytest.raises(ValueError, match="answer"):
        answer_rows(on_off_task(), "test", 9, 4)


def test_the_gradient_of_the_margin_is_what_a_small_move_changes(bridged):
    rows, stream = answer_rows(on_off_task(), "train", YES, 6), bridged.dense_stream
    gradients = margin_gradients(stream, rows)
    assert len(gradients) == bridged.n_locations

    def margin(location: int, move: torch.Tensor) -> float:
        ids, mask = rows["input_ids"], rows["attention_mask"]
        with temporary_hooks(stream.add_edit(location, lambda x: x + move)), torch.no_grad():
            logits = bridged.dense(ids, attention_mask=mask).logits[:, -1]
        right, other = rows["target_ids"][:, None], rows["counterfactual_target_ids"][:, None]
        return (logits.gather(1, other) - logits.gather(1, right)).mean().item()

    for location in (1, 2, 4):
        direction = gradients[location] / gradients[location].norm()
        step = 1e-2 * direction
        change = margin(location, step) - margin(location, -step)
        assert change / 2e-2 == pytest.approx(gradients[location].norm().item(), rel=0.05)
