import json

import pytest
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
)  # fmt: skip
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from benchmarks.experiment import in_new_process, peak_memory
from hf_circuit_sparsity.tasks.documents import load_documents
from hf_circuit_sparsity.tasks.packing import pack_dataset, spread_sample
from hf_circuit_sparsity.tasks.tokenizer import tokenizer_from_openai
from tests.conftest import FIXTURES

TEXTS = ["x = 1\n", "def f(x):\n    return x\n", "import os\n", "y = [1, 2, 3]\n"]


def stream(tokenizer, texts):
    ids = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return ids


def flat(blocks):
    return [index for block in blocks["input_ids"] for index in block]


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_blocks_are_the_documents_joined_by_end_of_text(openai, block_size):
    blocks = pack_dataset(Dataset.from_dict({"text": TEXTS}), openai, block_size)
    expected = stream(openai, TEXTS)
    n_blocks = len(expected) // block_size
    assert blocks.num_rows == n_blocks
    assert all(len(block) == block_size for block in blocks["input_ids"])
    assert flat(blocks) == expected[: n_blocks * block_size]
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_order_holds_over_many_documents(openai):
    texts = [f"x{i} = {i}\n" for i in range(300)]
    blocks = pack_dataset(Dataset.from_dict({"text": texts}), openai, 7)
    expected = stream(openai, texts)
    assert flat(blocks) == expected[: 7 * (len(expected) // 7)]


def test_a_document_cannot_fake_its_end(openai):
    blocks = pack_dataset(Dataset.from_dict({"text": ["<|endoftext|>"]}), openai, 2)
    assert flat(blocks)[0] == openai("<")["input_ids"][0]
    assert flat(blocks).count(openai.eos_token_id) <= 1
    # ... and the tokenizer still knows its special token afterwards.
    assert openai("<|endoftext|>")["input_ids"] == [openai.eos_token_id]


def test_splits_and_columns(openai):
    dataset = Dataset.from_dict({"code": TEXTS * 3})
    splits = DatasetDict({"train": dataset, "test": dataset})
    packed = pack_dataset(splits, openai, 4, text_column="code")
    assert set(packed) == {"train", "test"}
    assert packed["train"].column_names == ["input_ids", "labels"]
    alone = pack_dataset(dataset, openai, 4, text_column="code")
    assert packed["train"].to_dict() == alone.to_dict()
    assert packed["train"].cache_files == []


@pytest.mark.parametrize("features", [None, Features({"text": Value("string")})])
def test_a_stream_is_packed_as_a_dataset_while_it_is_read(openai, features):
    read = 0

    def documents():
        nonlocal read
        for number in range(300):
            read += 1
            yield {"text": f"x{number} = {number}\n"}

    stream = IterableDataset.from_generator(documents, features=features)
    texts = [f"x{number} = {number}\n" for number in range(300)]
    expected = pack_dataset(Dataset.from_dict({"text": texts}), openai, 4)
    packed = pack_dataset(stream, openai, 4)
    assert read == 0 and packed.features == expected.features
    assert next(iter(packed)) == expected[0]
    assert 0 < read <= 65  # a batch of documents, and one that a generator is ahead
    for _ in range(2):  # nothing of one pass is left for the next
        assert list(packed) == expected.to_list()
    # Workers of a loader do not split the documents below the blocks.
    by_workers = DataLoader(packed, num_workers=2, batch_size=None, collate_fn=lambda row: row)
    assert list(by_workers) == expected.to_list()
    assert spread_sample(packed, 7).to_dict() == expected.select(range(7)).to_dict()
    splits = pack_dataset(IterableDatasetDict({"train": stream}), openai, 4)
    assert isinstance(splits, IterableDatasetDict)
    assert list(splits["train"]) == expected.to_list()


def peak_of_streaming(file):
    """Bytes that reading a stream adds to the peak of this process."""
    before = peak_memory()
    stream = load_documents(file, streaming=True)["train"]
    blocks = pack_dataset(stream, tokenizer_from_openai(FIXTURES / "tokenizer"), 128)
    assert sum(1 for _ in blocks) > 1000
    return peak_memory() - before


@pytest.mark.slow
def test_memory_does_not_grow_with_a_stream(tmp_path):
    line = json.dumps({"text": "for index in range(10):\n    print(index)\n" * 40}) + "\n"
    peaks = []
    for megabytes in (15, 40):  # files are read in pieces of 10 MB
        file = tmp_path / f"{megabytes}.jsonl"
        file.write_text(line * (megabytes * 10**6 // len(line)))
        peaks.append(in_new_process(peak_of_streaming, file))
    # Held in memory, blocks of 25 MB of text take 270 MB.
    assert peaks[1] - peaks[0] < 60e6, peaks


def test_trainer_takes_the_blocks_as_they_are(openai, tmp_path):
    blocks = pack_dataset(Dataset.from_dict({"text": TEXTS * 20}), openai, 16)
    batch = collate([blocks[0], blocks[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"].dtype == torch.int64
    config = GPT2Config(vocab_size=len(openai), n_positions=16, n_embd=32, n_layer=1, n_head=2)
    arguments = TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    for extra in ({}, {"processing_class": openai}):
        trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=blocks, **extra)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 1


def test_errors(openai):
    dataset = Dataset.from_dict({"text": TEXTS})
    one_is_empty = DatasetDict({"train": dataset, "validation": dataset.select([])})
    without_end = type(openai)(tokenizer_object=openai.backend_tokenizer)
    for arguments, options, argument in (
        ((dataset, openai, 1), {}, "block_size"),
        ((dataset, openai, 1000), {}, "block_size"),
        ((dataset, openai, 4), {"text_column": "nothing"}, "nothing"),
        ((Dataset.from_dict({"text": ["x", None]}), openai, 4), {}, "Row 1"),
        ((one_is_empty, openai, 4), {}, "validation"),
        ((dataset, without_end, 4), {}, "eos_token"),
    ):
        with pytest.raises(ValueError, match=argument):
            pack_dataset(*arguments, **options)
    rows = [{"text": "x"}, {"text": None}, {"text": 3}]
    for texts, column, argument in (
        (rows[:1], "nothing", "nothing"),
        (rows[:2], "text", "Row 1"),
        (rows[2:], "text", "Row 0"),
        ([], "text", "dataset"),
    ):
        stream = IterableDataset.from_generator(texts.__iter__)
        with pytest.raises(ValueError, match=argument):
            next(iter(pack_dataset(stream, openai, 4, text_column=column)))
