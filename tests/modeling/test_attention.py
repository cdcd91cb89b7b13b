"""The fused forms of attention with a sink, held against the readable one."""

import pytest
import torch
from torch import nn

from hf_circuit_sparsity.modeling.functional import (
    eager_attention_forward,
    sdpa_attention_with_sink,
)


def attend(*args):
    return sdpa_attention_with_sink(nn.Module(), *args)[0]


def reference(query, key, value, scaling, s_aux):
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys).tril(keys - queries).bool()
    mask = torch.zeros(queries, keys, dtype=query.dtype).masked_fill(~visible, -torch.inf)
    return eager_attention_forward(nn.Module(), query, key, value, mask, scaling, s_aux=s_aux)[0]


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 1), (1, 9), (70, 70)])
def test_equals_the_reference_forward_and_backward(queries, keys):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    # As the model passes them: heads split from one projection, so not contiguous.
    query = random(2, queries, 3, 8)
    key, value = random(2, keys, 3, 8), random(2, keys, 3, 8)
    sink = random(3)
    inputs = [query, key, value, sink]
    up = torch.randn(2, queries, 3, 8, generator=generator, dtype=torch.float64)
    by_head = [t.transpose(1, 2) for t in inputs[:3]]

    ours = attend(*by_head, None, 0.3, 0.0, sink)
    expected = reference(*by_head, 0.3, sink)
    close = dict(atol=1e-6, rtol=1e-5)  # the reference's softmax is in float32
    torch.testing.assert_close(ours, expected, **close)
    for got, wanted in zip(
        torch.autograd.grad((ours * up).sum(), inputs),
        torch.autograd.grad((expected * up).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, **close)


def test_bfloat16_stays_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    sink = torch.randn(2, generator=generator)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.3, 0.0, sink)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), reference(q, k, v, 0.3, sink), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (5, 5), (16, 16), (70, 70), (33, 40)])
def test_float32_equals_the_reference_in_double_precision(width, queries, keys, either_path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value = random(2, queries, 3, width), *(random(2, keys, 3, width) for _ in "kv")
    sink, up = random(3), torch.randn(2, queries, 3, width, generator=generator)
    inputs = [query, key, value, sink]
    by_head = [t.transpose(1, 2) for t in inputs[:3]]
    ours = attend(*by_head, None, 0.5, 0.0, sink)
    assert ("ByKernels" in ours.grad_fn.next_functions[0][0].name()) == (either_path == "kernels")
    got = torch.autograd.grad((ours * up).sum(), inputs)

    # Keys beyond the queries are those of a static cache, not filled yet.
    precise = [t.detach().double().requires_grad_() for t in inputs]
    heads = [t.transpose(1, 2)[:, :, :queries] for t in precise[:3]]
    expected = reference(*heads, 0.5, precise[3])
    wanted = torch.autograd.grad((expected * up).sum(), precise)
    for a, b in zip((ours, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=2e-5)


def test_scores_of_any_size_and_nan(either_path):
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    for size, sink in ((1e4, 0.0), (1e-4, 80.0), (1.0, -1e4), (30.0, 300.0)):
        ours = attend(size * q, k, v, None, 1.0, 0.0, torch.tensor([sink]))
        expected = reference(size * q, k, v, 1.0, torch.tensor([sink]))
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    q[0, 0, 5, 3] = torch.nan
    ours = attend(q, k, v, None, 1.0, 0.0, torch.zeros(1))
    assert ours[0, 5].isnan().all() and not ours[0, :5].isnan().any()
