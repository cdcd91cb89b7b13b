"""Activations are kept as their nonzeros, and training is what it was."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_circuit_sparsity import CircuitGPTForCausalLM, SparseTrainingArguments
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.optim import saved_activations
from hf_circuit_sparsity.optim.saved_activations import (
    Compact,
    compact_activations,
    pack_bits,
    pack_bits_reference,
    unpack_bits,
    unpack_bits_reference,
)

pytestmark = pytest.mark.usefixtures("either_path")


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(saved_activations, "_MIN_ENTRIES", 1)


def mostly_zero(*shape: int, share: float = 0.25, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * (torch.rand(shape, generator=generator) < share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7,), (16,), (3, 5, 11), (2, 70_001), (300, 1, 700)])
def test_what_is_taken_out_is_what_was_put_away(shape, dtype):
    x = mostly_zero(*shape, share=0.3).to(dtype)
    x.view(-1)[0] = 0  # as a tensor without nonzeros is, too
    compact = Compact.of(x)
    assert compact is not None and len(compact.values) == torch.count_nonzero(x)
    torch.testing.assert_close(compact.dense(), x, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 8, 9, 1000, 70_003])
def test_booleans_are_bits(n):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.7
    compact = Compact.of(mask)
    assert compact.bits.numel() == -(-n // 8) and compact.values is None
    assert compact.dense().equal(mask)
    # As on other devices.
    assert pack_bits_reference(mask).equal(pack_bits(mask))
    assert unpack_bits_reference(compact.bits, n).equal(mask)
    assert unpack_bits(compact.bits, n).dtype == torch.bool


def test_order_in_memory_and_numbers_that_are_none_come_back():
    x = mostly_zero(3, 40, 20, share=0.2)
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for view in (x.transpose(0, 1), x.permute(2, 0, 1), x[1:], x.view(-1)[7:]):
        found = Compact.of(view).dense()
        assert found.stride() == view.stride()
        torch.testing.assert_close(found, view, rtol=0, atol=0, equal_nan=True)


def test_what_has_gaps_or_many_nonzeros_or_another_dtype_stays():
    x = mostly_zero(64, 64)
    for other in (x[:, ::2], x[:1].expand(64, 64), torch.ones(64, 64), x.long(), x.to_sparse()):
        assert Compact.of(other) is None


@pytest.mark.skipif(load_kernels() is None, reason="no compiled kernels here")
def test_threads_share_the_work_and_give_the_same(either_path):
    if either_path != "kernels":
        pytest.skip("threads are the kernels'")
    x, before, found = mostly_zero(5, 100_003), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            compact = Compact.of(x)
            found.append((compact.bits, compact.values, compact.dense()))
    finally:
        torch.set_num_threads(before)
    for parts in found:
        assert all(part.equal(first) for part, first in zip(parts, found[0], strict=True))
        assert parts[2].equal(x)


@pytest.mark.skipif(load_kernels() is None, reason="no compiled kernels here")
def test_bits_that_do_not_fit_the_values_are_refused_and_not_read():
    bits, values = load_kernels().pack(mostly_zero(1000))
    with pytest.raises(ValueError, match="bits were passed for"):
        load_kernels().unpack(bits, values[:-1], 1000)


def gradients(model: nn.Module, ids: torch.Tensor, compact: bool) -> list[torch.Tensor]:
    model.zero_grad()
    with compact_activations(model) if compact else nullcontext():
        loss = model(ids, labels=ids).loss
        if model.is_gradient_checkpointing:
            loss.backward()
    if not model.is_gradient_checkpointing:
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_the_same(tiny_config, act, bias):
    torch.manual_seed(0)
    tiny_config.activation_type, tiny_config.bias = act, bias
    model = CircuitGPTForCausalLM(tiny_config).train()
    with torch.no_grad():  # rows of zeros, so that neurons read exact zeros and AbsTopK has ties
        for block in model.transformer.h:
            block.mlp.c_fc.weight[10:].zero_()
    ids = torch.arange(4 * 32).reshape(4, 32) % 64
    plain, compact = (gradients(model, ids, compact=on) for on in (False, True))
    assert plain[0].equal(compact[0]) and len(plain) == len(compact)
    for one, other in zip(plain, compact, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)


def test_gradients_of_activations_that_are_kept_and_zero_are_not_lost(tiny_config):
    """Of a neuron that reads 0 GELU has a derivative, and AbsTopK may keep it."""
    torch.manual_seed(0)
    tiny_config.bias = True
    model = CircuitGPTForCausalLM(tiny_config).train()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.bias.zero_()
    ids = torch.arange(2 * 32).reshape(2, 32) % 64
    gradients(model, ids, compact=True)
    bias = model.transformer.h[0].mlp.c_fc.bias
    found = bias.grad.clone()
    gradients(model, ids, compact=False)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, bias.grad, rtol=1e-5, atol=1e-8)


def test_memory_is_saved_where_abs_topk_leaves_a_quarter(tiny_config, monkeypatch):
    sizes = []
    of = Compact.of

    def counted(x):
        compact = of(x)
        held = 0 if compact is None else compact.bits.nbytes
        if compact is not None and compact.values is not None:
            held += compact.values.nbytes
        sizes.append((x.nbytes, x.nbytes if compact is None else held))
        return compact

    model = CircuitGPTForCausalLM(tiny_config).train()
    ids = torch.arange(4 * 32).reshape(4, 32) % 64
    weights = {p.data_ptr() for p in model.parameters()}
    monkeypatch.setattr(Compact, "of", counted)
    gradients(model, ids, compact=True)
    dense, held = map(sum, zip(*sizes, strict=True))
    assert 0 < held < 0.8 * dense
    assert weights == {p.data_ptr() for p in model.parameters()}


def test_layers_that_read_one_tensor_keep_it_once(monkeypatch):
    calls = []
    of = Compact.of
    monkeypatch.setattr(Compact, "of", lambda x: calls.append(x.shape) or of(x))
    layers = nn.ModuleList(nn.Linear(64, 8, bias=bool(i)) for i in range(3))
    x = mostly_zero(16, 4, 64).requires_grad_().relu()
    with compact_activations(layers):
        loss = sum(layer(x).sum() for layer in layers)
    loss.backward()
    assert len(calls) <= 2  # by shape: as it came, and as a matrix
    for layer in layers:
        torch.testing.assert_close(layer.weight.grad, x.detach().sum((0, 1)).expand(8, 64))


def test_a_tensor_that_was_changed_in_place_is_kept_anew():
    model, x = nn.Linear(64, 8, bias=False), mostly_zero(16, 64)
    before = x.clone()
    with compact_activations(model):
        first = model(x)
        x.mul_(2)
        second = model(x)
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(model.weight.grad, (3 * before).sum(0).expand(8, 64))


def test_hooks_of_an_mlp_still_see_its_neurons(tiny_config):
    model, seen = CircuitGPTForCausalLM(tiny_config).train(), []
    ids = torch.arange(32)[None]
    mlp = model.transformer.h[0].mlp
    for module in (mlp.act_fn, mlp.post_act):
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    gradients(model, ids, compact=True)
    assert seen == [(1, 32, 64)] * 2
    assert "forward" not in vars(mlp)  # and nothing is left behind


def test_an_evaluation_packs_nothing_and_a_backward_pass_lets_go(tiny_config, monkeypatch):
    model, calls = CircuitGPTForCausalLM(tiny_config).train(), []
    pack = saved_activations.pack
    monkeypatch.setattr(saved_activations, "pack", lambda *args: (calls.append(1), pack(*args))[1])
    ids = torch.arange(32)[None]
    with compact_activations(model), torch.no_grad():
        model(ids)
    assert not calls
    with compact_activations(model):
        loss = model(ids, labels=ids).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert calls


def test_second_derivatives_are_refused_and_not_wrong(tiny_config):
    model = CircuitGPTForCausalLM(tiny_config).train()
    ids = torch.arange(32)[None]
    with compact_activations(model):
        loss = model(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss, model.transformer.wte.weight, create_graph=True)


def test_checkpointing_of_whole_layers_goes_with_it(tiny_config):
    torch.manual_seed(0)
    model = CircuitGPTForCausalLM(tiny_config).train()
    ids = torch.arange(2 * 32).reshape(2, 32) % 64
    plain = gradients(model, ids, compact=False)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(again, ids, compact=True), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_a_training_run_is_the_same(tiny_config, make_trainer, sparsifier):
    ends = []
    for compact in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            CircuitGPTForCausalLM(tiny_config), name=f"run-{compact}",
            compact_activations=compact, sparsifier=sparsifier,
        )  # fmt: skip
        trainer.train()
        ends.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(ends[0]) == 12 and ends[1] == pytest.approx(ends[0], rel=1e-4)


@pytest.mark.parametrize("other", [{"torch_compile": True}, {"fsdp": "full_shard"}])
def test_what_keeps_activations_its_own_way_is_refused(other, tmp_path):
    with pytest.raises(ValueError, match="compact_activations=True was passed with"):
        SparseTrainingArguments(str(tmp_path), compact_activations=True, use_cpu=True, **other)
