"""The benchmarks of bridges and circuit adapters compute what their tables say."""

import math

import pytest
import torch

from benchmarks.findings.bridges import DOSES, bridge_figures, choose_channel, draw, sweep_rows
from benchmarks.findings.circuit_finetuning import (
    adapters,
    follows,
    opposite_loss,
    side_effects,
    teach,
)
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.bridge.steering import steering_candidates, steering_sweep
from hf_circuit_sparsity.circuits.task_loss import all_pair_logits, binary_loss
from tests.adapters.test_circuit_adapter import planted_circuit
from tests.circuits.planted import (
    NO,
    YES,
    on_off_task,
    planted_model,
    reference_ids,
    word_tokenizer,
)


@pytest.fixture
def bridged() -> BridgedCausalLM:
    torch.manual_seed(0)
    bridged = BridgedCausalLM.from_models(planted_model(), planted_model(), encoder_afrac=None)
    with torch.no_grad():
        for bridge in bridged.bridges:
            for linear in (bridge.encoder, bridge.decoder):
                linear.weight.copy_(torch.eye(len(linear.weight)))
                linear.bias.zero_()
    return bridged.eval()


def test_figures_are_means_over_all_text(bridged):
    figures = bridge_figures(bridged, reference_ids()[:32])
    assert figures["encode_nmse"] == pytest.approx([0.0] * 5, abs=1e-6)
    assert figures["sparse_to_dense_kl"] == pytest.approx([0.0] * 5, abs=1e-5)
    with torch.no_grad():
        loss = bridged.dense(reference_ids()[:32], labels=reference_ids()[:32]).loss.item()
    assert figures["lm"] == pytest.approx(loss, rel=1e-5)


def test_tables_and_picture_of_a_sweep(bridged, tmp_path):
    task, tokenizer = on_off_task(), word_tokenizer()
    candidates = steering_candidates(bridged, task, YES)
    choice = choose_channel(bridged, tokenizer, task, YES, candidates)
    best = choice.candidate
    sweep = steering_sweep(
        bridged, task, YES, best.location, best.channel, [d * best.difference for d in DOSES],
        text=reference_ids()[:4], random_channels=3, tokenizer=tokenizer,
    )  # fmt: skip
    rows = sweep_rows(sweep, choice, of_circuit=True)
    assert [float(row[3]) for row in rows] == [dose for dose in DOSES if dose <= choice.dose]
    assert float(rows[-1][5]) > 0.5 > float(rows[0][5])
    assert "(circuit's)" in rows[0][2]
    draw([sweep] * 4, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_channel_that_works_is_chosen_and_not_the_one_that_should(bridged):
    task = on_off_task()
    good, *_, bad = steering_candidates(bridged, task, YES)
    order = [bad._replace(effect=99.0), good]
    assert choose_channel(bridged, word_tokenizer(), task, YES, order).candidate == good


def test_only_the_circuit_is_moved():
    model = planted_model()
    task = on_off_task()
    found = adapters(model, planted_circuit(model), [YES, NO])
    assert len(found) == 5
    from peft import get_peft_model

    adapted = get_peft_model(planted_model(), found["the circuit's last edges"])
    loss = teach(adapted, task.tensors("train"), rate=0.1, steps=60)
    pairs = all_pair_logits(adapted, task.tensors("test"))
    assert loss < 0.5 and follows(pairs) > 0.9
    assert opposite_loss(pairs) < math.log(2) < binary_loss(pairs)
    text = reference_ids()[:4]
    with torch.no_grad():
        plain = model(text).logits
    before = {"on_off": binary_loss(all_pair_logits(model, task.tensors("test"))).item()}
    mean, most, kl = side_effects(model, before, {"on_off": task.tensors("test")}, text, plain)
    assert (mean, most) == (0, 0) and kl == pytest.approx(0, abs=1e-6)
    assert side_effects(adapted, before, {"on_off": task.tensors("test")}, text, plain)[1] > 1
