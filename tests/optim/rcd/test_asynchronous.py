"""Ranks that are slow, lost, or begin with something else."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_circuit_sparsity import (
    PartialGradients,
    RCDSparseOptimizer,
    sparse_from_config,
    sparse_param_groups,
)
from hf_circuit_sparsity.optim.rcd.distributed import LostRankError, RCDProcessGroup
from tests.optim.rcd.test_distributed import SETTINGS, batches, config

STALENESS, STEPS, LOST_AT = 3, 12, 5


def connect(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def make(seed=0, process_group=None, **settings):
    model = sparse_from_config(config(), 1 / 8, seed=seed)
    optimizer = RCDSparseOptimizer(
        sparse_param_groups(model), process_group=process_group, **{**SETTINGS, **settings}
    )
    return model, optimizer


def go(model, optimizer, steps, before=None, after=None):
    with PartialGradients(model, optimizer):
        for step, batch in enumerate(steps, 1):
            if before is not None:
                before(step)
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if after is not None:
                after(step)


def wait_for(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.002)


def one_is_slow(rank, folder):
    """Rank 1 begins no step before rank 0 has ended one that is `STALENESS` steps ahead."""
    connect(rank, folder)
    model, optimizer = make(process_group=RCDProcessGroup(average_dense=True), staleness=STALENESS)

    def before(step):
        if rank == 1 and step > 1 and step + STALENESS - 1 <= STEPS:
            wait_for(folder / f"ended{step + STALENESS - 1}")

    def after(step):
        if rank == 0:
            (folder / f"ended{step}").touch()

    go(model, optimizer, batches(rank, STEPS), before, after)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_is_lost(rank, folder, staleness):
    connect(rank, folder)
    group = RCDProcessGroup(average_dense=True)
    model, optimizer = make(process_group=group, staleness=staleness, block_steps=2)

    def before(step):
        if rank == 1 and step == LOST_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        go(model, optimizer, batches(rank, STEPS), before)
    except LostRankError as error:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**saved, "said": str(error)}, folder / "saved.pt")


def one_begins_otherwise(rank, folder):
    connect(rank, folder)
    said = []
    for seed, settings in ((rank, {}), (0, {"lr": 0.1 + rank})):
        model, optimizer = make(seed, RCDProcessGroup(average_dense=True), **settings)
        before = model.state_dict()
        with pytest.raises(ValueError, match="rank 1") as caught:
            go(model, optimizer, batches(rank, 1))
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
        assert optimizer.steps_taken == 0
        said.append(str(caught.value))
    torch.save(said, folder / f"{rank}.pt")
    dist.destroy_process_group()


def start(function, *arguments):
    # Forked, so that they need not import everything again.
    return mp.start_processes(function, arguments, nprocs=2, start_method="fork", join=False)


def test_no_rank_waits_for_one_that_is_slow_within_the_staleness(tmp_path):
    """If one did, the other, which waits for it, would wait for ever."""
    processes = start(one_is_slow, tmp_path)
    while not processes.join():
        pass
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    fresh = make()[0].state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(first[weight] != 0, fresh[weight] != 0)  # it grew what came late


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_lost_rank_stops_the_others_with_what_can_go_on_alone(tmp_path, staleness):
    context = start(one_is_lost, tmp_path, staleness)
    for process in context.processes:
        process.join(60)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert "\n" not in saved["said"]
    model, optimizer = make(seed=1, block_steps=2)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    at = optimizer.steps_taken
    assert LOST_AT - 1 <= at <= LOST_AT - 1 + staleness
    go(model, optimizer, batches(0, 3))
    assert optimizer.steps_taken == at + 3
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_ranks_that_begin_with_other_weights_or_settings_are_refused(tmp_path):
    processes = start(one_begins_otherwise, tmp_path)
    while not processes.join():
        pass
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt")


def test_stale_gradients_that_are_not_finite_are_skipped_when_their_turn_comes():
    weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = RCDSparseOptimizer([weight], staleness=2, block_fraction=0.5)
    skipped = []
    for step in range(6):
        weight.grad = torch.full((8, 8), float("nan") if step == 1 else 1.0)
        optimizer.step()
        skipped.append(optimizer.skipped_steps)
    assert skipped == [0, 0, 0, 1, 1, 1]
    assert weight.isfinite().all()


def test_row_minima_above_the_budget_are_told_before_the_first_step(caplog):
    weight = nn.Parameter(torch.eye(16))
    optimizer = RCDSparseOptimizer([weight], target_density=1 / 16, min_nonzeros=4)
    for _ in range(2):
        weight.grad = torch.ones(16, 16)
        optimizer.step()
    (told,) = [r.getMessage() for r in caplog.records]
    assert "min_nonzeros=4" in told
    assert "64" in told
    assert "16" in told


def test_going_on_with_other_processes_is_told(caplog):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = RCDSparseOptimizer([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert not caplog.records
    saved["param_groups"][0]["computed_by"]["processes"] = 2
    optimizer.load_state_dict(saved)
    (told,) = [r.getMessage() for r in caplog.records]
    assert "processes 2, now 1" in told
    assert optimizer.state_dict()["param_groups"][0]["computed_by"]["processes"] == 1
