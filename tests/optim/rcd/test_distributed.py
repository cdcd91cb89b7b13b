"""Several processes that share the coordinates: equal bit for bit, and few bytes."""

import subprocess

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config

from hf_circuit_sparsity import CircuitGPTConfig, sparse_from_config, sparse_param_groups
from hf_circuit_sparsity.optim.rcd.distributed import RCDProcessGroup, part_of
from tests.conftest import random_model
from tests.optim.conftest import train
from tests.two_processes import launch, launch_and_resume

SETTINGS = {
    "lr": 0.05,
    "target_density": 1 / 8,
    "block_fraction": 1 / 4,
    "normalize_gradients": "always",
}

REPLACING = {"replace_fraction": 0.2, "grace_steps": 2}
# Without zeros, of which every rank sees its own part on its own data.
AVERAGED = {"average_gradients": True, "explore_end": 0.0, "total_steps": 6}


def config():
    return CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=16, vocab_size=32
    )


def gpt2_config():
    return GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip


def batches(rank, steps, same=False):
    generator = torch.Generator().manual_seed(0 if same else rank)
    return [torch.randint(32, (4, 16), generator=generator) for _ in range(steps)]


def work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    results = {}
    settings = {
        "rows": {"selection": "gradient"},
        "columns, staying": {"block": "columns", "block_steps": 2, "selection": "magnitude"},
        "entries": {"block": "entries"},
        "stale": {"staleness": 2},
        "averaged": {"average_gradients": True, "block_steps": 2},
        "replacing": REPLACING,
    }
    settings["gpt2"] = settings["rows"]
    for name, own in settings.items():
        model = sparse_from_config(gpt2_config() if name == "gpt2" else config(), 1 / 8)
        group = RCDProcessGroup(average_dense=True)
        losses, _ = train(model, batches(rank, 8), group, **{**SETTINGS, **own})
        results[name] = (model.state_dict(), losses, group.bytes_sent)
    for name, own, same in (
        ("same data", {}, True),
        ("same data, stale", {"staleness": 2, "block_steps": 2}, True),
        ("averaged without zeros", AVERAGED, False),
    ):
        model = sparse_from_config(config(), 1 / 8)
        group = RCDProcessGroup(average_dense=True)
        losses, _ = train(model, batches(rank, 6, same=same), group, **{**SETTINGS, **own})
        results[name] = (model.state_dict(), losses, group.bytes_sent)
    # What DDP hands over for the same model, counted by its own hook.
    ddp = DistributedDataParallel(random_model(config()))
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, count)
    batch = batches(rank, 1)[0]
    ddp(batch, labels=batch).loss.backward()
    results["ddp"] = ({}, [], sum(sent))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # Forked, so that the two need not import everything again.
    mp.start_processes(work, (2, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "name", ["rows", "columns, staying", "entries", "stale", "gpt2", "averaged", "replacing"]
)
def test_ranks_stay_bitwise_equal_on_different_data(ranks, name):
    (first, first_losses, _), (second, second_losses, _) = (rank[name] for rank in ranks)
    assert first_losses != second_losses  # they did see different data
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    fresh = sparse_from_config(gpt2_config() if name == "gpt2" else config(), 1 / 8).state_dict()
    moved = [key for key in fresh if not torch.equal(fresh[key], first[key])]
    table = set() if name == "gpt2" else {"bigram_table"}
    assert {"transformer.wte.weight", "lm_head.weight", *table} <= set(moved)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("same data", {}), ("same data, stale", {"staleness": 2, "block_steps": 2})],
)
def test_on_the_same_data_two_ranks_are_one(ranks, name, settings):
    alone = sparse_from_config(config(), 1 / 8)
    losses, _ = train(alone, batches(0, 6, same=True), **{**SETTINGS, **settings})
    together, others, _ = ranks[0][name]
    assert losses == pytest.approx(others, rel=1e-4)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(value, together[key], atol=1e-4, rtol=1e-3)


def test_averaged_gradients_are_those_of_the_data_of_all_ranks(ranks):
    alone = sparse_from_config(config(), 1 / 8)
    both = [torch.cat(pair) for pair in zip(batches(0, 6), batches(1, 6), strict=True)]
    losses, _ = train(alone, both, **{**SETTINGS, **AVERAGED})
    seen = [rank["averaged without zeros"] for rank in ranks]
    means = [(a + b) / 2 for a, b in zip(seen[0][1], seen[1][1], strict=True)]
    assert losses == pytest.approx(means, rel=1e-4)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(value, seen[0][0][key], atol=1e-4, rtol=1e-3)


def test_only_own_changes_are_shipped(ranks):
    sent, ddp = ranks[0]["rows"][2] / 8, ranks[0]["ddp"][2]
    model = random_model(config())
    dense = sum(p.numel() for g in sparse_param_groups(model) if not g["sparse"]
                for _, p in g["params"])  # fmt: skip
    sparse = sum(p.numel() for p in model.parameters()) - dense
    assert ddp == 4 * (dense + sparse)
    # Half of an eighth of the sparse parameters, in four bytes each, what grows, and bookkeeping.
    assert sent - 4 * dense < 4 * sparse / 2
    assert sent < ddp


def test_every_coordinate_has_one_owner():
    for n in (0, 1, 5, 64):
        owned = [i for rank in range(3) for i in range(n)[part_of(n, rank, 3)]]
        assert owned == list(range(n))


SCRIPT = """
    import os
    import signal
    import sys
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from hf_circuit_sparsity.trainer import SparseTrainer, SparseTrainingArguments
    from tests.conftest import random_model
    from tests.optim.rcd.test_distributed import config

    class Lose(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4 and args.process_index == 1 and sys.argv[-1] == "lose":
                os.kill(os.getpid(), signal.SIGKILL)

    folder = sys.argv[1]
    rows = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(1)).tolist()
    args = SparseTrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=4, sparsifier="rcd",
        rcd_config={"block_fraction": 0.25}, target_density=0.125, use_cpu=True, report_to=[],
        save_steps=3, logging_steps=1, disable_tqdm=True, gradient_accumulation_steps=2,
    )
    model = random_model(config())
    trainer = SparseTrainer(model, args, train_dataset=Dataset.from_dict(
        {"input_ids": rows, "labels": rows}))
    trainer.add_callback(Lose())
    checkpoint = sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] != "lose" else None
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("c_fc.weight"))
    torch.save({"weights": model.state_dict()}, f"{folder}/rank{args.process_index}.pt")
"""


@pytest.mark.slow
def test_the_trainer_with_two_processes_keeps_ranks_equal_and_resumes(tmp_path):
    launch_and_resume(SCRIPT, tmp_path)


@pytest.mark.slow
def test_a_run_that_lost_a_rank_goes_on_from_its_checkpoint_with_fewer(tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        launch(SCRIPT, tmp_path / "lost", "lose")
    assert not (tmp_path / "lost" / "checkpoint-6").exists()
    checkpoint = tmp_path / "lost" / "checkpoint-3"
    (alone,) = launch(SCRIPT, tmp_path / "alone", str(checkpoint), processes=1)
    assert "processes 2, now 1" in capfd.readouterr().err
    saved = load_file(checkpoint / "model.safetensors")
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(alone["weights"][weight], saved[weight])
    assert all(x.isfinite().all() for x in alone["weights"].values())
