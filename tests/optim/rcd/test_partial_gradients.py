import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_circuit_sparsity import (
    PartialGradients,
    RCDSparseOptimizer,
    sparse_param_groups,
    sparsify_initialization_,
)
from hf_circuit_sparsity.kernels.cpu import without_kernels
from tests.conftest import random_model, sparsify
from tests.optim.conftest import Largest

TOKENS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(0))


def optimizer_for(model, **settings):
    return RCDSparseOptimizer(
        sparse_param_groups(model), **{"block_fraction": 0.25, "seed": 3, **settings}
    )


def gradients_of(model, optimizer, run):
    """Name → (gradient at the active coordinates, at the block) as the optimizer would get them."""
    names = {p: name for name, p in model.named_parameters()}
    with PartialGradients(model, optimizer, min_entries=0):  # small ones too, as these are
        run(model)
    states = [optimizer.sparse_state(p) for _, p in optimizer.sparse_parameters()]
    found = {names[s.parameter]: s.gradient for s in states if s.gradient is not None}
    assert all(names[p] in found for _, p in optimizer.sparse_parameters() if p.ndim > 1)
    return found


def assert_slices_of_the_full_gradient(
    model, optimizer, run, rtol=1e-4, atol=1e-6, assert_close=torch.testing.assert_close
):
    twin = copy.deepcopy(model)
    run(twin)
    found = gradients_of(model, optimizer, run)
    full = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        if name not in found:
            assert_close(p.grad, full[name], rtol=rtol, atol=atol)
            continue
        assert p.grad is None
        state, (active, block) = optimizer.sparse_state(p), found[name]
        assert block.any() or not full[name].any()
        block_expected = state.own_block.take(full[name])
        assert_close(block.float(), block_expected.float(), rtol=rtol, atol=atol)
        active_expected = full[name].flatten()[state.active]
        assert_close(active, active_expected.float(), rtol=rtol, atol=atol)


def backward(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize("block", ["rows", "columns", "entries"])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_values_equal_the_slice_in_conv1d_and_a_tied_embedding(block, density, make_gpt2):
    model = make_gpt2()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and density < 1:
                p *= torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < density
    assert_slices_of_the_full_gradient(model, optimizer_for(model, block=block), backward)


@pytest.mark.parametrize("block", ["rows", "columns", "entries"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_equal_the_slice_in_circuitgpt(block, checkpointing, tiny_config):
    model = sparsify(random_model(tiny_config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_slices_of_the_full_gradient(model, optimizer_for(model, block=block), backward)


def test_autocast(tiny_config):
    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()

    def assert_alike(got, expected, **tolerances):
        similarity = torch.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0)
        assert similarity > 0.98 or not expected.any()

    # Dense, as AbsTopK may fall either way for numbers of eight bits.
    tiny_config.afrac = None
    model = sparsify(random_model(tiny_config)).train()
    optimizer = optimizer_for(model)
    assert_slices_of_the_full_gradient(model, optimizer, run, assert_close=assert_alike)
    states = [optimizer.sparse_state(p) for _, p in optimizer.sparse_parameters() if p.ndim > 1]
    assert {state.gradient[0].dtype for state in states} == {torch.float32}


def test_half_precision_weights():
    model = sparsify(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))).bfloat16()
    optimizer = optimizer_for(model)
    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_slices_of_the_full_gradient(
        model, optimizer, lambda m: m(x).float().square().sum().backward(), rtol=0.05, atol=0.05
    )


def test_frozen_layers_and_inputs_without_gradient():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 4))
    model[1].weight.requires_grad_(False)
    optimizer = optimizer_for(model)
    found = gradients_of(model, optimizer, lambda m: m(torch.ones(2, 6)).sum().backward())
    assert set(found) == {"0.weight", "2.weight"}
    assert model[1].weight.grad is None
    assert model[1].bias.grad is not None


def test_padding_token_has_no_gradient():
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=3), nn.Linear(4, 2))
    optimizer = optimizer_for(model, block_fraction=1.0)
    ids = torch.tensor([[1, 3, 3, 5]])
    assert_slices_of_the_full_gradient(model, optimizer, lambda m: m(ids).sum().backward())


class Twice(nn.Module):
    """A weight used by its layer and, past it, by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return nn.functional.linear(self.layer(x).relu(), self.layer.weight)


def test_other_uses_of_a_weight_are_added():
    torch.manual_seed(0)
    ours, theirs = Twice(), Twice()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6)
    theirs(x).square().sum().backward()
    settings = {"update": "plain", "block_fraction": 1.0, "lr": 0.1}
    optimizer = RCDSparseOptimizer(ours.parameters(), **settings)
    with PartialGradients(ours, optimizer):
        ours(x).square().sum().backward()
        optimizer.step()
    expected = theirs.layer.weight - 0.1 * theirs.layer.weight.grad
    torch.testing.assert_close(ours.layer.weight, expected)


def sampled_flops(pattern, left, right, *args, **kwargs):
    """PyTorch knows no formula for the sampled product: two for each entry and token."""
    return 2 * left.shape[1] * pattern._nnz()


sampled_flops._get_raw = True  # pass it the tensors, not their shapes
SAMPLED = {torch.ops.aten.sparse_sampled_addmm: sampled_flops}


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("block", "fraction"),
    [("rows", 1 / 16), ("rows", 1 / 4), ("columns", 1 / 16), ("columns", 1 / 4),
     ("entries", 1 / 16)],
)  # fmt: skip
@without_kernels()  # PyTorch counts what PyTorch computes
def test_weight_gradient_flops_are_the_blocks_share(layer, block, fraction):
    tokens, inputs, outputs = 32, 128, 192
    module = nn.Linear(inputs, outputs) if layer == "linear" else Conv1D(outputs, inputs)
    x = torch.randn(tokens, inputs)  # no gradient: what remains is the weight's

    def count(model, **settings):
        counter = FlopCounterMode(display=False, custom_mapping=SAMPLED)
        optimizer = optimizer_for(model, block=block, block_fraction=fraction, **settings)
        with PartialGradients(model, optimizer) if settings else nullcontext():
            y = model(x)
            with counter:
                y.sum().backward()
        return counter.get_total_flops()

    full = count(module)
    assert full == 2 * tokens * inputs * outputs
    assert count(module, move_active=False) == pytest.approx(fraction * full, rel=0.02)
    # With the active coordinates, their share is added.
    with torch.no_grad():
        module.weight.zero_().view(-1)[::50] = 1.0
    active = int(torch.count_nonzero(module.weight)) / module.weight.numel()
    assert count(module, move_active=True) == pytest.approx((fraction + active) * full, rel=0.02)


def test_nothing_of_the_weights_size_is_made():
    """Training steps, forward to update, on a sparse layer: no tensor as large as the weight."""
    model = nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 300, bias=False))
    sparsify(model, 0.02)
    optimizer = RCDSparseOptimizer(
        sparse_param_groups(model), target_density=0.02, block_fraction=1 / 16
    )
    made = Largest(*(layer.weight for layer in model))
    with PartialGradients(model, optimizer):
        for step in range(3):
            with made if step else nullcontext():  # the first reads what is active
                model(torch.ones(8, 300)).square().sum().backward()
                optimizer.step()
    # The largest are positions (int64) of the block and of what is active, or the activations,
    # which the kernels pad to 64 tokens.
    block, active = 400 * 300 / 16, 0.02 * 400 * 300
    assert 0 < made.bytes <= max(8 * (block + 1.2 * active), 4 * 64 * 400)
    assert made.bytes < 4 * 400 * 300 / 4


def test_layers_get_their_own_methods_back(make_gpt2):
    model = make_gpt2()
    before = model(input_ids=TOKENS).logits
    optimizer = optimizer_for(model)
    handle = PartialGradients(model, optimizer)
    assert all("forward" in layer.__dict__ for layer in handle.layers)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before)
    handle.close()
    handle.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_bad_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(TypeError, match="AdamW, expected RCDSparseOptimizer"):
        PartialGradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"LayerNorm has no nn\.Linear"):
        PartialGradients(nn.LayerNorm(4), RCDSparseOptimizer(nn.LayerNorm(4).parameters()))
    optimizer = RCDSparseOptimizer(model.parameters())
    with pytest.raises(ValueError, match="threshold=2"):
        PartialGradients(model, optimizer, threshold=2)
    model.register_parameter("table", nn.Parameter(torch.zeros(3, 3)))
    optimizer = RCDSparseOptimizer(model.parameters())
    with pytest.raises(ValueError, match="no rule covers the sparse parameters table:"):
        PartialGradients(model, optimizer)
    PartialGradients(model, optimizer, exclude_parameters=["table"]).close()


def test_a_loop_of_ones_own_with_accelerate(make_llama, dataset):
    """Accelerate wraps the optimizer, accumulates gradients and runs in bfloat16."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
    model = make_llama()
    sparsify_initialization_(model, 1 / 8)
    optimizer = optimizer_for(model, target_density=1 / 8, lr=0.03, normalize_gradients="always")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = torch.tensor(dataset["input_ids"]).split(8)
    losses = []
    with PartialGradients(model, optimizer) as handle:
        assert len(handle.layers) == 16
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert optimizer.optimizer.steps_taken == len(batches) / 2
    assert sum(losses[-2:]) < sum(losses[:2])
    assert optimizer.optimizer.density <= 0.3
    assert all(p.grad is None for p in model.parameters())
