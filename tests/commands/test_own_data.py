"""Training on anybody's dataset: on the Hub, in files, in memory and streamed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_circuit_sparsity import CircuitGPTForCausalLM, load_documents
from hf_circuit_sparsity.cli import main
from tests.two_processes import launch

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
SMALL = shlex.split(
    "--d-model 16 --n-layer 1 --d-mlp 16 --d-head 8 --block-size 16 --per-device-train-batch-size 4"
    " --report-to none --target-density 0.5 --use-cpu --logging-steps 1 --vocab-size 300"
    " --validation-documents 20"
)
TALES = [f"Once, {name} found {n} stones. {name} was glad." for n in range(60) for name in "ABC"]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Stories as files of every kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    (folder / "stories").mkdir(parents=True)
    rows = Dataset.from_dict({"number": range(len(TALES)), "story": TALES})
    rows.to_parquet(folder / "stories" / "train.parquet")
    rows.select(range(9)).to_json(folder / "stories.jsonl")
    (folder / "book.txt").write_text("\n\n".join(TALES))
    (folder / "python").mkdir()
    for number in range(3):
        (folder / "python" / f"{number}.py").write_text(f"x = {number}\n" * 50)
    rows.add_column("odd", [None, *TALES[1:]]).to_parquet(folder / "odd.parquet")
    (folder / "damaged.jsonl").write_text('{"story": "x"}\n{"story": ')
    return folder


@pytest.fixture
def on_hub(data, hub_server) -> None:
    rows = Dataset.from_parquet(str(data / "stories" / "train.parquet"))
    for config in ("default", "long"):
        for split in ("train", "test"):
            rows.push_to_hub("ada/stories", config_name=config, split=split)


def losses(folder: str | Path) -> list[float]:
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def test_the_commands_of_the_document_run(on_hub, capsys):
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line[0] != "#"]
    assert len(commands) == 6
    for command in commands:
        argv = shlex.split(command.replace("user/", "ada/"))[1:]
        steps = ["--max-steps", "3"]
        assert main([*argv, *SMALL, *steps]) == 0, capsys.readouterr().err
        assert len(losses(argv[argv.index("--output-dir") + 1])) == 3
    printed = capsys.readouterr().out
    assert "its first" in printed and "bigram table" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("data/stories --text-column text", "'story'"),
        ("data/stories --text-column text --streaming --max-steps 1", "'story'"),
        ("data/stories --streaming", "--max-steps"),
        ("data/stories --corpus data/python", "--corpus"),
        ("data/stories --text-column story --dataset-split nothing", "nothing"),
        ("data/stories --text-column story --validation-split train", "train"),
        (
            "data/stories --text-column story --streaming --max-steps 1 --validation-split nothing",
            "nothing",
        ),
        ("data/stories --text-column number", "Row 0"),
        ("data/odd.parquet --text-column odd", "Row 0"),
        ("data/odd.parquet --text-column odd --streaming --max-steps 1", "Row 0"),
        ("data/damaged.jsonl --text-column story", "damaged.jsonl"),
        ("data/stories.jsonl --text-column story --streaming --max-steps 1", "stories.jsonl"),
        ("data/python", "data/python"),
        ("data/nowhere", "nowhere"),
        ("ada/nothing", "ada/nothing"),
        ("ada/stories --dataset-config nothing", "nothing"),
    ],
)
def test_says_what_is_wrong_before_training(arguments, named, on_hub, capsys):
    argv = ["train", "--output-dir", "out", *SMALL, "--dataset", *arguments.split()]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_held_out_is_not_trained_on(streaming, data, monkeypatch):
    splits = load_documents(data / "book.txt", streaming=streaming, validation_documents=8)
    assert isinstance(splits["train"], IterableDataset if streaming else Dataset)
    train, held_out = ([row["text"] for row in splits[n]] for n in ("train", "validation"))
    assert held_out == TALES[:8] and train == TALES[8:]
    monkeypatch.chdir(data)
    whole = load_documents("book.txt", sample_by="line", validation_documents=1)
    assert whole["train"].num_rows > len(TALES)


def test_a_resumed_run_is_the_run_that_was_not_stopped(data):
    # More steps than the stream has batches, so that it begins anew before the checkpoint.
    argv = ["train", *SMALL, "--dataset", "data/stories", "--text-column", "story", "--streaming"]
    argv += ["--max-steps", "120", "--save-steps", "100"]
    assert main([*argv, "--output-dir", "whole"]) == 0
    assert main([*argv, "--output-dir", "again", "--resume-from-checkpoint",
                 "whole/checkpoint-100"]) == 0  # fmt: skip
    assert losses("again") == losses("whole")
    whole, again = (CircuitGPTForCausalLM.from_pretrained(name) for name in ("whole", "again"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


SCRIPT = """
import sys
import torch
from datasets import IterableDataset
from hf_circuit_sparsity import (
    CircuitGPTConfig, CircuitGPTForCausalLM, SparseTrainer, SparseTrainingArguments, pack_dataset,
    tokenizer_from_openai,
)

folder, tokenizer, dispatch = sys.argv[1:]
rows = IterableDataset.from_generator(lambda: ({"text": f"x{i} = {i}"} for i in range(1000)))
blocks = pack_dataset(rows, tokenizer_from_openai(tokenizer), 8).shuffle(seed=0, buffer_size=100)
config = CircuitGPTConfig(n_layer=1, n_head=1, d_head=8, d_model=8, block_size=8)
args = SparseTrainingArguments(
    folder, max_steps=20, per_device_train_batch_size=4, report_to="none", use_cpu=True,
    accelerator_config={"dispatch_batches": dispatch == "dispatch"},
)
model = CircuitGPTForCausalLM(config)
seen = []
model.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
)
trainer = SparseTrainer(model, args, train_dataset=blocks)
trainer.train()
expected = torch.tensor([row["input_ids"] for row in blocks.take(160)])
torch.save([torch.cat(seen), expected], f"{folder}/rank{args.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["dispatch", "each"])
def test_two_processes_share_a_stream(dispatch, tmp_path):
    tokenizer = Path(__file__).parents[1] / "fixtures" / "tokenizer"
    first, second = launch(SCRIPT, tmp_path, str(tokenizer), dispatch)
    assert first[0].shape == second[0].shape == (80, 8)
    rows = sorted(torch.cat([first[0], second[0]]).tolist())
    assert rows == sorted(first[1].tolist())
    assert len({tuple(row) for row in rows}) == len(rows)
