"""Running on a circuit whatever was made of the model: compiled, wrapped, adapted, in half."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_circuit_sparsity import Circuit, evaluate_circuit
from hf_circuit_sparsity.circuits.ablation import in_eval_mode, reference_means
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import (
    PLANTED_EDGES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)
from tests.circuits.pruning.conftest import QUICKER, find

IDS = reference_ids()[:4]


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_parts(model):
    for block in model.transformer.h:
        block.compile(backend="eager")
    model.transformer.h[1].mlp = torch.compile(model.transformer.h[1].mlp, backend="eager")
    return model


def with_lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["c_fc", "c_proj"], r=2))


WRAPPERS = {
    "model.compile()": compiled_in_place,
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "parts compiled": compiled_in_parts,
    "data-parallel": nn.DataParallel,
    "PEFT, adapters off": with_lora,
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request, model):
    """The planted model as people hand it over, run once as it is."""
    torch._dynamo.reset()
    made = WRAPPERS[request.param](copy.deepcopy(model)).eval()
    with torch.no_grad():
        made(IDS)
    with made.disable_adapter() if "PEFT" in request.param else nullcontext():
        yield made


def test_it_is_the_circuit_that_answers(model, circuit, wrapped):
    circuit.calibration = Calibration(2.0, {1: 0.5})
    with torch.no_grad(), circuit.apply(model):
        expected = model(IDS).logits
    with torch.no_grad(), circuit.apply(wrapped) as inside:
        assert inside is wrapped
        torch.testing.assert_close(wrapped(IDS).logits, expected)
    with torch.no_grad():  # and afterwards the model does again
        torch.testing.assert_close(wrapped(IDS).logits, model(IDS).logits)
    assert circuit.edges(wrapped) == circuit.edges(model)


@pytest.fixture(scope="module")
def of_the_plain_model():
    """What is measured of the planted circuit, and the circuit that is found."""
    model = planted_model()
    return evaluate_circuit(planted_circuit(model), model, on_off_task()), find(model, QUICKER)


def test_it_is_the_circuit_that_is_measured_and_found(of_the_plain_model, circuit, wrapped):
    measured, expected = of_the_plain_model
    assert evaluate_circuit(circuit, wrapped, on_off_task()) == pytest.approx(measured, abs=1e-5)
    found = find(wrapped, QUICKER)
    assert found.nodes == expected.nodes
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-4)
    assert found.model_fingerprint == expected.model_fingerprint


def test_loss_and_tuples_are_those_of_the_calibrated_logits(model, circuit):
    circuit.calibration = Calibration(3.0, {1: 0.5})
    with torch.no_grad(), circuit.apply(model):
        output = model(IDS, labels=IDS)
        loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close((loss, logits), (output.loss, output.logits))


def test_an_active_adapter_is_said(model, circuit):
    adapted = with_lora(copy.deepcopy(model)).eval()  # which changes nothing yet
    with torch.no_grad(), circuit.apply(model):
        expected = model(IDS).logits
    with torch.no_grad(), pytest.warns(UserWarning, match="default"), circuit.apply(adapted):
        torch.testing.assert_close(adapted(IDS).logits, expected)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    circuit.check_model(get_peft_model(copy.deepcopy(model), prompts))
    merged = adapted.base_model.model
    with torch.no_grad():
        merged.transformer.h[0].mlp.c_fc.lora_B["default"].weight.fill_(1.0)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=model_fingerprint(model)):
        circuit.check_model(adapted)


def test_in_half_precision_it_says_what_it_cannot_tell(model, circuit):
    with torch.no_grad(), circuit.apply(model):
        expected = model(IDS).logits
    half = copy.deepcopy(model).half()
    with torch.no_grad(), pytest.warns(UserWarning, match="float16"), circuit.apply(half):
        torch.testing.assert_close(half(IDS).logits.float(), expected, atol=0.05, rtol=0.01)
    wider = {**circuit.means, "h.0.attn.q": torch.zeros(9)}
    with pytest.warns(UserWarning, match="float16"), pytest.raises(ValueError, match="means"):
        Circuit({}, wider, "on_off", circuit.model_fingerprint).check_model(half)


def test_modes_and_hooks_are_restored_after_an_error():
    model = planted_model().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    broken = planted_circuit(model)
    broken.means["h.0.attn.q"] = torch.zeros(3)
    for attempt in (
        lambda: evaluate_circuit(broken, model, on_off_task()),
        lambda: reference_means(model, torch.full((1, 99), 3)),  # longer than the context
        lambda: find(model, task="no task"),
    ):
        with pytest.raises((ValueError, AttributeError)):
            attempt()
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())


def with_busy_lora(model):
    adapted = with_lora(model).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.3)
    return adapted


HOW = [{}, {"inverse": True}, {"beside": {"h.0.attn.q": torch.arange(8) < 3}}]


@pytest.mark.filterwarnings("ignore:The adapter")
@pytest.mark.parametrize("how", HOW, ids=["alone", "inverse", "beside"])
@torch.no_grad()
def test_a_collapsed_circuit_gives_the_same_logits(how, model, wrapped):
    mean = model.get_input_embeddings().weight.mean(0).detach()
    kept = list(PLANTED_EDGES)[1:]
    circuit = planted_circuit(model, kept_edges=kept, tokens=[3, 7, 8], token_mean=mean)
    for made in (wrapped, with_busy_lora(copy.deepcopy(model))):
        with circuit.apply(made, **how):
            expected = made(IDS).logits
        with circuit.apply(made, collapsed=True, **how):
            logits = made(IDS).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(made(IDS).logits, expected, atol=1e-4)
