"""`SparseTrainer` on several processes, against one with the same global batch."""

import os
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.distributed.tensor import DTensor

from hf_circuit_sparsity import (
    BridgedCausalLM,
    BridgeTrainer,
    BridgeTrainingArguments,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_circuit_sparsity.trainer.checkpoints import problem_of
from tests.conftest import random_model
from tests.several_processes import on_ranks

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["CircuitGPTBlock"],
    },
}  # fmt: skip

SAVING = {"save_strategy": "steps", "save_steps": 3}
SETTINGS = {
    "ddp": SAVING,
    "ddp, accumulating": {"gradient_accumulation_steps": 2},
    "ddp, bf16": {"bf16": True},
    "fsdp": {**FSDP, **SAVING},
    "fsdp, files per rank": {
        **FSDP, **SAVING, "gradient_accumulation_steps": 2,
        "fsdp_config": {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"},
    },
    "fsdp, bf16": {**FSDP, "bf16": True},
}  # fmt: skip


def config():
    return CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=16, vocab_size=33
    )


def trainer_in(folder, size, **settings):
    """A trainer whose optimizer steps see the same 8 rows, however many processes there are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # left there by a trainer that was
    bridge = settings.pop("bridge", False)
    rows = torch.randint(33, (64, 16), generator=torch.Generator().manual_seed(1)).tolist()
    settings.setdefault("gradient_accumulation_steps", 1)
    args = (BridgeTrainingArguments if bridge else SparseTrainingArguments)(
        **{
            "output_dir": str(folder), "max_steps": 6, "target_density": 1 / 16, "use_cpu": True,
            "per_device_train_batch_size": 8 // size // settings["gradient_accumulation_steps"],
            "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
            "learning_rate": 1e-2,
            **settings,
        }
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = random_model(config())
    if bridge:
        bridged = BridgedCausalLM.from_models(model, config())
        return BridgeTrainer(bridged, args, train_dataset=dataset)
    return SparseTrainer(model, args, train_dataset=dataset)


def run(rank, size, folder, settings, resume=None):
    """Losses, what else was logged at the end, weights, and whether these were sharded."""
    trainer = trainer_in(folder, size, **settings)
    trainer.train(resume_from_checkpoint=resume)
    parameters = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    trainer.save_model(folder / "saved")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "last": {k: logs[-1][k] for k in ("nonzeros", "grad_rms", "density")},
        "sharded": all(isinstance(p, DTensor) for p in parameters.values()),
        "weights": {
            name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
            for name, p in parameters.items()
        },
    }


def refused(rank, size, folder, **settings):
    """The error of a run that cannot be, and whether it left its folder alone."""
    try:
        trainer_in(folder, size, **settings).train()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def runs(rank, size, folder):
    results = {
        name: run(rank, size, folder / name, settings) for name, settings in SETTINGS.items()
    }
    results["resumed"] = {
        "ddp": run(rank, size, folder / "again", SAVING, folder / "ddp" / "checkpoint-3")
    }
    results["refused"] = {
        "schedule": refused(rank, size, folder / "a", anneal_end=0.5 + rank / 10),
        "rcd": refused(rank, size, folder / "b", sparsifier="rcd", **FSDP),
        "bridge": refused(rank, size, folder / "e", bridge=True, **FSDP),
        "offloaded": refused(
            rank, size, folder / "c", fsdp=True, fsdp_config={"version": 2, "cpu_offload": True}
        ),
        "version": refused(
            rank,
            size,
            folder / "d",
            fsdp=True,
            fsdp_config={"version": 1, "sync_module_states": False},
        ),
        "folders": [path.name for path in folder.glob("?")],
    }
    return results


def resume_sharded(rank, size, folder):
    return {
        name: run(
            rank, size, folder / f"{name} on {size}", SETTINGS[name],
            folder / name / "checkpoint-3",
        )
        for name in ("fsdp", "fsdp, files per rank")
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_ranks(runs, 2, folder, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(0, 1, tmp_path_factory.mktemp("alone"), {})


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(ranks, alone, name):
    folder, results = ranks
    first, second = (rank[name] for rank in results)
    saved = CircuitGPTForCausalLM.from_pretrained(folder / name / "saved")
    code = {path.name for path in (folder / name / "saved").glob("*.py")}
    assert "modeling_circuitgpt.py" in code and not any("fsdp" in file for file in code)
    for key, weight in saved.named_parameters():
        assert torch.equal(weight, first["weights"][key]), key
    assert first["sharded"] == second["sharded"] == name.startswith("fsdp")
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key]), key
        assert weight.dtype == torch.float32
    if name.endswith("bf16"):
        assert first["losses"] != pytest.approx(alone["losses"], rel=1e-5)  # is it bf16?
        assert first["losses"] == pytest.approx(alone["losses"], rel=5e-2)
        assert first["last"]["nonzeros"] == alone["last"]["nonzeros"]
        return
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["last"] == pytest.approx(alone["last"], rel=1e-4)
    for key, weight in alone["weights"].items():
        assert torch.equal(first["weights"][key] != 0, weight != 0), key
        torch.testing.assert_close(first["weights"][key], weight, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_of_two_processes_is_the_one_that_was_not_stopped(ranks):
    for rank in ranks[1]:
        for key, weight in rank["ddp"]["weights"].items():
            assert torch.equal(rank["resumed"]["ddp"]["weights"][key], weight), key


def test_a_sharded_run_is_resumed_on_another_number_of_ranks(ranks, tmp_path):
    folder, (first, _) = ranks
    (resumed,) = on_ranks(resume_sharded, 1, tmp_path, folder)
    for name, found in resumed.items():
        assert found["losses"] == pytest.approx(first[name]["losses"], rel=1e-4)
        for key, weight in first[name]["weights"].items():
            assert torch.equal(found["weights"][key] != 0, weight != 0), key
            torch.testing.assert_close(found["weights"][key], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_a_sharded_checkpoint_that_a_rank_did_not_finish_is_noticed(ranks, part, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(ranks[0] / "fsdp, files per rank" / "checkpoint-3", checkpoint)
    assert problem_of(checkpoint) is None
    (checkpoint / part / ".metadata").unlink()
    assert part in problem_of(checkpoint)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("schedule", "anneal_end"), ("rcd", "sparsifier='rcd'"), ("offloaded", "offload"),
        ("version", "fsdp_version"), ("bridge", "BridgeTrainer"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_step(ranks, case, named):
    for rank in ranks[1]:
        assert named in rank["refused"][case]
    assert "b" not in ranks[1][0]["refused"]["folders"]
