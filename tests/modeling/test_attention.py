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


def test_bfloat16_stays_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    sink = torch.randn(2, generator=generator)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.3, 0.0, sink)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), reference(q, k, v, 0.3, sink), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("width", "dtype"), [(8, torch.float64), *((width, torch.float32) for width in (16, 32, 64))]
)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (2, 2), (5, 5), (16, 16), (70, 70), (1, 9), (33, 40)]
)
def test_equals_the_reference_in_double_precision(queries, keys, width, dtype, either_path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    # As the model passes them: heads split from one projection, so not contiguous.
    query, key, value = random(2, queries, 3, width), *(random(2, keys, 3, width) for _ in "kv")
    sink, up = random(3), torch.randn(2, queries, 3, width, generator=generator)
    inputs = [query, key, value, sink]
    by_head = [t.transpose(1, 2) for t in inputs[:3]]
    ours = attend(*by_head, None, 0.5, 0.0, sink)
    by_kernels = either_path == "kernels" and dtype == torch.float32 and queries > 1
    assert ("ByKernels" in ours.grad_fn.next_functions[0][0].name()) == by_kernels
    got = torch.autograd.grad((ours * up).sum(), inputs)

    precise = [t.detach().double().requires_grad_() for t in inputs]
    heads = [t.transpose(1, 2) for t in precise[:3]]
    if queries > 1:  # keys beyond the queries are those of a static cache, not filled yet
        heads[1:] = [t[:, :, :queries] for t in heads[1:]]
    expected = reference(*heads, 0.5, precise[3])
    wanted = torch.autograd.grad((expected * up).sum(), precise)
    close = 2e-5 if dtype == torch.float32 else 1e-6  # the reference's softmax is in float32
    for a, b in zip((ours, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b.to(dtype), atol=close, rtol=2e-5)


def test_scores_of_any_size_and_nan(either_path):
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    for size, sink in ((1e4, 0.0), (1e-4, 80.0), (1.0, -1e4), (30.0, 300.0)):
        ours = attend(size * q, k, v, None, 1.0, 0.0, torch.tensor([sink]))
        expected = reference(size * q, k, v, 1.0, torch.tensor([sink]))
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    q[0, 0, 5, 3] = torch.nan
    ours = attend(q, k, v, None, 1.0, 0.0, torch.zeros(1))
    assert ours[0, 5].isnan().all() and not ours[0, :5].isnan().any()
