"""Top-k on parameters whose rows are spread over processes, against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_circuit_sparsity import (
    CircuitGPTConfig,
    RCDSparseOptimizer,
    TopKAdamW,
    sparse_param_groups,
)
from hf_circuit_sparsity.optim.projection import (
    nonzero_budget,
    project_topk_,
    project_topk_each_,
    project_topk_reference_,
)
from tests.conftest import random_model

STEPS, HALF = 50, 25
SETTINGS = {"target_density": 1 / 16, "total_steps": STEPS, "anneal_end": 0.6, "lr": 1e-2}


def config():
    # 33 tokens: with two ranks the embedding is cut unevenly.
    return CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=16, vocab_size=33
    )


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(33, (6, 8), generator=generator) for _ in range(steps)]


def cases(dtype):
    """Matrices with budgets and row minima: ties within a rank and across ranks, shards of unequal
    size, one rank without any, and an all-zero row."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(51, 20, generator=g)
    normal[3] = 0
    ties = torch.randint(-3, 4, (30, 20), generator=g).float()
    tensors = {
        "normal": normal,
        "ties": ties,
        "constant": torch.full((9, 20), -0.5),
        "mostly zeros": normal * (torch.rand(51, 20, generator=g) < 0.05),
        "one row": normal[:1],
        "three dimensions": normal[:30].reshape(5, 6, 20).clone(),
        "vector": normal[:, 0].clone(),
        "huge and tiny": normal**5,
    }
    for name, tensor in tensors.items():
        n = tensor.numel()
        for minimum in (0, 3, 100) if tensor.ndim > 1 else (0,):
            for k in (0, n // 16, n // 3, n):
                yield name, tensor.to(dtype), k, minimum


def part_of(tensor, rank, size):
    """The rows of a rank as `fully_shard` deals them; none may be left for the last."""
    return (*tensor.chunk(size), *[tensor[:0]] * size)[rank].clone()


def project_all(rank, size):
    """What the sharded projection of all cases gets wrong; a mesh may have replicas too."""
    flat = init_device_mesh("cpu", (size,))
    hybrid = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicate", "shard"))
    wrong = []
    for mesh, placements, dtypes in (
        (flat, [Shard(0)], (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        (hybrid, [Replicate(), Shard(0)], (torch.float32,)),
        (flat, [Replicate()], (torch.float32,)),
    ):
        shards = size if placements[-1].is_shard() else 1
        for dtype in dtypes:
            tests = list(cases(dtype))
            sharded = [
                DTensor.from_local(
                    part_of(t, rank % shards, shards), mesh, placements, run_check=False,
                    shape=t.shape, stride=t.stride(),
                )
                for _, t, *_ in tests
            ]  # fmt: skip
            budgets, minima = [t[2] for t in tests], [t[3] for t in tests]
            project_topk_each_(sharded, budgets, minima, [0] * len(tests))
            for (name, tensor, k, minimum), got in zip(tests, sharded, strict=True):
                project_topk_reference_(expected := tensor.clone(), k, minimum)
                if not torch.equal(got.to_local(), part_of(expected, rank % shards, shards)):
                    wrong.append((name, str(placements), str(dtype), k, minimum))
    return wrong


def train(model, optimizer, steps, start=0, rank=0, size=1):
    """Each rank on its share of the batches; its losses."""
    losses = []
    for batch in batches(STEPS)[start:steps]:
        batch = batch[rank::size]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def new_run(mesh=None, dtype=torch.float32):
    model = random_model(config()).to(dtype)
    if mesh is not None:
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, TopKAdamW(sparse_param_groups(model), **SETTINGS)


def kept_at_the_start(model):
    """What a projection to the final density would keep."""
    masks = {name: p != 0 for name, p in model.named_parameters()}
    for group in sparse_param_groups(copy.deepcopy(model)):
        for name, p in group["params"] if group["sparse"] else ():
            budget = nonzero_budget(p.numel(), SETTINGS["target_density"])
            project_topk_(p, budget, group["min_nonzeros"], group["row_dim"])
            masks[name] = p != 0
    return masks


def whole_weights(model):
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def message(error, call):
    """The error that a call raises, and that nothing was changed by it."""
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"


def bad_inputs(mesh, rank):
    def weight(*placements, device=None):
        made = distribute_tensor(torch.ones(8, 8), mesh, placements)
        return nn.Parameter(made if device is None else made.to(device))

    def step_of(*schedule):
        p = weight(Shard(0))
        optimizer = TopKAdamW([p], total_steps=schedule[rank])
        p.grad = torch.ones_like(p)
        try:
            optimizer.step()
        except ValueError:
            assert torch.equal(p.full_tensor(), torch.ones(8, 8)) and optimizer.steps_taken == 0
            raise

    broken = weight(Shard(0)).detach()
    if rank == 1:
        broken.to_local()[0, 0] = torch.nan
    plain = nn.Parameter(torch.ones(8, 8))
    swapped = RCDSparseOptimizer([plain], target_density=0.5)
    swapped.param_groups[0]["params"] = [weight(Shard(0))]  # as Accelerate exchanges them
    return {
        "cut rows": message(
            ValueError, lambda: TopKAdamW([weight(Shard(0))], total_steps=9, row_dim=1)
        ),
        "other dimension": message(
            ValueError, lambda: TopKAdamW([weight(Shard(1))], total_steps=9, min_nonzeros=0)
        ),
        "offloaded": message(
            ValueError, lambda: TopKAdamW([weight(Shard(0), device="meta")], total_steps=9)
        ),
        "total_steps": message(ValueError, lambda: step_of(10, 11)),
        "agreed": message(ValueError, lambda: step_of(10, 10)),
        "rcd": message(
            ValueError, lambda: RCDSparseOptimizer([weight(Shard(0))], target_density=0.5)
        ),
        "rcd, exchanged": message(ValueError, swapped.step),
        "not finite": message(ValueError, lambda: project_topk_(broken, 3)),
    }


def checkpoint(folder, model, optimizer, load=False):
    weights, state = get_state_dict(model, optimizer)
    content = {"weights": weights, "optimizer": state}
    if not load:
        return dcp.save(content, checkpoint_id=folder)
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=content["optimizer"]
    )


def start(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size
    )
    return init_device_mesh("cpu", (size,))


def work(rank, size, folder):
    mesh = start(rank, size, folder)
    results = {"wrong": project_all(rank, size), "bad": bad_inputs(mesh, rank)}
    model, optimizer = new_run(mesh)
    losses = train(model, optimizer, HALF, 0, rank, size)
    checkpoint(f"{folder}/half", model, optimizer)
    losses += train(model, optimizer, STEPS, HALF, rank, size)
    results["run"] = (whole_weights(model), losses, optimizer.grad_rms)
    model, optimizer = new_run(mesh)
    batch = batches(1)[0]
    for step in range(2):
        model(batch, labels=batch).loss.backward()
        if step == 1 and rank == 1:
            local = model.lm_head.weight.grad.to_local()
            local[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
    results["skipped"] = optimizer.skipped_steps
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def resume(rank, size, folder):
    model, optimizer = new_run(start(rank, size, folder))
    checkpoint(f"{folder}/half", model, optimizer, load=True)
    train(model, optimizer, STEPS, HALF, rank, size)
    torch.save(whole_weights(model), f"{folder}/resumed{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # Forked, so that they need not import everything again.
    mp.start_processes(work, (2, str(folder)), nprocs=2, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_projection_keeps_what_the_reference_keeps_of_the_whole(ranks):
    assert [rank["wrong"] for rank in ranks] == [[], []]


def test_training_is_that_of_one_process(ranks):
    model, optimizer = new_run()
    first = kept_at_the_start(model)
    losses = train(model, optimizer, STEPS)
    moved = sum(int((first[n] & (w == 0)).sum()) for n, w in whole_weights(model).items())
    assert moved > 50  # or else masks are equal because weights are
    shared = torch.tensor([rank["run"][1] for rank in ranks]).mean(0)
    assert shared.tolist() == pytest.approx(losses, rel=1e-4)
    for weights, _, rms in (rank["run"] for rank in ranks):
        assert rms == pytest.approx(optimizer.grad_rms, rel=1e-4)
        assert_same_masks(weights, whole_weights(model))


def assert_same_masks(weights, expected):
    for name, weight in expected.items():
        assert torch.equal(weights[name] != 0, weight != 0), name
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_three_processes_go_on_from_the_checkpoint_of_two(folder, ranks):
    mp.start_processes(resume, (3, str(folder)), nprocs=3, start_method="fork")
    for rank in range(3):
        weights = torch.load(folder / f"resumed{rank}.pt", weights_only=True)
        assert_same_masks(weights, ranks[0]["run"][0])


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, ranks):
    model, optimizer = new_run()
    checkpoint(folder / "half", model, optimizer, load=True)
    assert optimizer.steps_taken == HALF
    train(model, optimizer, STEPS, HALF)
    assert_same_masks(whole_weights(model), ranks[0]["run"][0])


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks):
    assert [rank["skipped"] for rank in ranks] == [1, 1]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("cut rows", "min_nonzeros"), ("other dimension", "placed"), ("offloaded", "offloaded"),
        ("total_steps", "total_steps"), ("agreed", "nothing was raised"),
        ("rcd", "RCDProcessGroup"), ("rcd, exchanged", "RCDProcessGroup"),
        ("not finite", "NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_step_on_all_ranks(ranks, case, named):
    for rank in ranks:
        assert named in rank["bad"][case]
