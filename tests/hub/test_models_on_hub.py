"""Models that were pushed, loaded where this package is not; and OpenAI's own layout."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity import (
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands.hub_advice import hub_advice
from tests.conftest import FIXTURES, random_model, sparsify
from tests.hub.outside import run_outside
from tests.modeling.test_checkpoints import logits_of, openai_hub_folder

# Prints the logits of a repository at a revision, as the process outside sees it.
LOAD = """
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
results = {{}}
for name, repo, revision in {wanted!r}:
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision=revision)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        results[name] = model.eval()(torch.arange(24).reshape(2, 12)).logits
torch.save(results, "logits.pt")
"""


def logits_outside(wanted: list[tuple[str, str, str]], folder: Path) -> dict[str, torch.Tensor]:
    run_outside(LOAD.format(wanted=wanted), folder)
    return torch.load(folder / "logits.pt")


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi()


def test_loads_elsewhere_at_a_pinned_revision(api, tiny_config, tmp_path):
    first, second = (sparsify(random_model(tiny_config, seed)) for seed in (0, 1))
    sparse_commit = first.push_to_hub("ada/small")
    dense_commit = second.push_to_hub("ada/small", sparse=False)
    sizes = [
        api.get_paths_info("ada/small", "model.safetensors", revision=commit.oid)[0].size
        for commit in (sparse_commit, dense_commit)
    ]
    assert sizes[0] < sizes[1] / 2
    wanted = [("sparse", "ada/small", sparse_commit.oid), ("dense", "ada/small", "main")]
    outside = logits_outside(wanted, tmp_path)
    torch.testing.assert_close(outside["sparse"], logits_of(first), atol=1e-6, rtol=0)
    torch.testing.assert_close(outside["dense"], logits_of(second), atol=1e-6, rtol=0)

    at_first = CircuitGPTForCausalLM.from_pretrained(
        "ada/small", revision=sparse_commit.oid, sparse=True
    )
    torch.testing.assert_close(logits_of(at_first), logits_of(first), atol=1e-5, rtol=0)
    assert at_first.config._commit_hash == sparse_commit.oid


def test_openais_hub_layout(api, tmp_path):
    paper = FIXTURES / "reference" / "paper"
    model = CircuitGPTForCausalLM.from_openai(paper)
    folder = openai_hub_folder(tmp_path / "openai", model)
    commit = api.create_repo("ada/openai") and api.upload_folder(
        repo_id="ada/openai", folder_path=folder
    )
    expected = load_file(paper / "expected.safetensors")
    for load in (CircuitGPTForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained("ada/openai", revision=commit.oid).eval()
        with torch.no_grad():
            logits = loaded(expected["input_ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-4)


@pytest.fixture
def make_trainer(api, tmp_path):
    def make(**arguments) -> SparseTrainer:
        rows = [{"input_ids": ids, "labels": ids} for ids in [[*range(8)], [*range(8, 16)]] * 8]
        config = CircuitGPTConfig(
            n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=16, vocab_size=32
        )
        args = SparseTrainingArguments(
            str(tmp_path / "run"), hub_model_id="ada/trained", max_steps=6, use_cpu=True,
            per_device_train_batch_size=4, target_density=0.25, report_to="none",
            disable_tqdm=True, **arguments,
        )  # fmt: skip
        return SparseTrainer(CircuitGPTForCausalLM(config), args, train_dataset=rows)

    return make


def test_trainer_pushes_every_save_and_the_end(api, make_trainer, tmp_path):
    trainer = make_trainer(
        push_to_hub=True, hub_strategy="every_save", save_steps=3, hub_always_push=True
    )
    trainer.train()
    trainer.push_to_hub()
    titles = {c.title: c.commit_id for c in api.list_repo_commits("ada/trained")}
    assert "Training in progress, step 3" in titles
    halfway = CircuitGPTForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    halfway_commit = titles["Training in progress, step 3"]
    outside = logits_outside(
        [("halfway", "ada/trained", halfway_commit), ("end", "ada/trained", "main")], tmp_path
    )
    torch.testing.assert_close(outside["halfway"], logits_of(halfway))
    torch.testing.assert_close(outside["end"], logits_of(trainer.model))
    assert not torch.equal(outside["halfway"], outside["end"])


@pytest.mark.parametrize("always", [True, False])
def test_nothing_changes_under_an_upload(always, api, make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(push_to_hub=True, hub_strategy="every_save", hub_always_push=always)
    checkpoint, code = tmp_path / "checkpoint", tmp_path / "run" / "csr.py"
    trainer.model.save_pretrained(checkpoint)
    code.write_text("as it is uploaded")
    seen = []

    class Upload:
        done = False
        jobs = ()

        def is_done(self) -> bool:
            return self.done

        def wait_until_done(self) -> None:
            seen.append(code.read_text())
            self.done = True

    with monkeypatch.context() as elsewhere:  # in a process that knows of no upload
        elsewhere.setattr(trainer, "is_world_process_zero", lambda: False)
        trainer._push_from_checkpoint(str(checkpoint))
    assert code.read_text() == "as it is uploaded"
    trainer.push_in_progress = upload = Upload()
    trainer._push_from_checkpoint(str(checkpoint))
    if always:  # after it
        trainer._finish_current_push()
        assert upload.done and seen == ["as it is uploaded"]
        assert code.read_text() == (checkpoint / "csr.py").read_text()
    else:  # not at all
        assert trainer.push_in_progress is upload and code.read_text() == "as it is uploaded"


def test_commands_say_why_a_model_cannot_be_had(api, hub_server, tiny_model, monkeypatch, capsys):
    tiny_model.push_to_hub("ada/private", private=True)

    def refused(name: str) -> str:
        assert main(["evaluate", "--model", name]) == 2
        return capsys.readouterr().err

    assert "'ada/none'" in refused("ada/none")
    assert "'ada/private' holds a model, but no tokenizer beside it" in refused("ada/private")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf auth login" in refused("ada/private")


def test_who_may_not_push(hub_server, tiny_model, make_trainer, monkeypatch):
    tiny_model.push_to_hub("ada/small")
    for token in (hub_server.add_user("bob"), ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError) as caught:
            tiny_model.push_to_hub("ada/small")
        assert hub_advice(caught.value) is not None
    with pytest.raises(HfHubHTTPError):
        make_trainer(push_to_hub=True)
