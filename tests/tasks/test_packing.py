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
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from hf_circuit_sparsity.tasks.packing import pack_dataset

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
def test_a_stream_is_packed_as_a_dataset(openai, features):
    stream = IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS), features=features)
    expected = pack_dataset(Dataset.from_dict({"text": TEXTS}), openai, 4).to_dict()
    assert pack_dataset(stream, openai, 4).to_dict() == expected
    splits = pack_dataset(IterableDatasetDict({"train": stream}), openai, 4)
    assert splits["train"].to_dict() == expected


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
        ((dataset.to_iterable_dataset(), openai, 4), {"text_column": "nothing"}, "nothing"),
        ((Dataset.from_dict({"text": ["x", None]}), openai, 4), {}, "Row 1"),
        ((one_is_empty, openai, 4), {}, "validation"),
        ((dataset, without_end, 4), {}, "eos_token"),
    ):
        with pytest.raises(ValueError, match=argument):
            pack_dataset(*arguments, **options)
