"""The fused forms of attention with a sink, held against the readable one."""

import pytest
import torch
from torch import nn

from hf_circuit_sparsity.modeling.modeling_circuitgpt import eager_attention_forward
from hf_circuit_sparsity.modeling.sink_attention import sdpa_attention_with_sink, sink_as_key


def reference(query, key, value, scaling, sink_logit):
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys).tril(keys - queries).bool()
    mask = torch.zeros(queries, keys, dtype=query.dtype).masked_fill(~visible, -torch.inf)
    return eager_attention_forward(
        nn.Module(), query, key, value, mask, scaling, sink_logit=sink_logit
    )[0]


@pytest.mark.parametrize("attend", [sdpa_attention_with_sink, sink_as_key])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 1), (1, 9), (70, 70)])
def test_equals_the_reference_forward_and_backward(attend, queries, keys):
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
    half = sdpa_attention_with_sink(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.3, 0.0, sink)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), reference(q, k, v, 0.3, sink), atol=0.05, rtol=0.05)
