import pytest
import torch

from hf_circuit_sparsity.trainer.callbacks import SparsityMonitor


def test_counts_and_churn():
    a, b = torch.zeros(3, 5), torch.zeros(7)  # sizes that do not fill whole bytes
    a[0, :4] = 1.0
    b[6] = -2.0
    monitor = SparsityMonitor([a, b])
    assert monitor.measure() == {
        "nonzeros": 5,
        "nonzero_fraction": pytest.approx(5 / 22),
        "mask_churn": 0.0,
    }
    a[0, :2] = 0.0  # two die, one is born, three stay
    b[0] = 3.0
    assert monitor.measure()["mask_churn"] == pytest.approx(1 / 4)
    assert monitor.measure()["mask_churn"] == 0.0
    a.zero_(), b.zero_()
    assert monitor.measure() == {"nonzeros": 0, "nonzero_fraction": 0.0, "mask_churn": 0.0}


def test_agrees_with_plain_counting_in_half_precision():
    g = torch.Generator().manual_seed(0)
    before = torch.randn(50, 33, generator=g).bfloat16() * (torch.rand(50, 33, generator=g) < 0.3)
    after = torch.randn(50, 33, generator=g).bfloat16() * (torch.rand(50, 33, generator=g) < 0.3)
    watched = before.clone()
    monitor = SparsityMonitor([watched])
    watched.copy_(after)
    measured = monitor.measure()
    assert measured["nonzeros"] == int((after != 0).sum())
    born = int(((after != 0) & (before == 0)).sum())
    assert measured["mask_churn"] == pytest.approx(born / measured["nonzeros"])
