import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer

from hf_circuit_sparsity.tasks.tokenizer import (
    decode_bytes,
    encode_bytes,
    tokenizer_from_openai,
    train_tokenizer,
)  # fmt: skip
from tests.conftest import FIXTURES

EXPECTED = json.loads((FIXTURES / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
HARD_TEXTS = [
    "", " ", "\n", "\r\n\r\n\t x\r", "  leading, trailing and   inner  ", "it's we'll ' s",
    "e\u0301 \u0301 \u200d\u200b\ufeff", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "日本語 العربية हिन्दी",
    "١٢٣ ½ ² 12345678", "".join(map(chr, range(0x180))), "\U0010ffff\ue000\u2028\u2029\x85\xa0",
]  # fmt: skip


@pytest.mark.parametrize("example", EXPECTED, ids=lambda example: repr(example["text"][:20]))
def test_openai_ids_exactly(openai, example):
    assert openai(example["text"])["input_ids"] == example["ids"]
    assert openai.decode(example["ids"]) == example["text"]


def test_entries_and_special_tokens(tokenizer):
    assert len(tokenizer) == 2048
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 2047
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {2047}


def random_text(rng):
    ranges = (range(128), range(0xD800), range(0xE000, 0x110000))
    return "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randrange(60)))


def test_text_comes_back(tokenizer):
    rng = random.Random(0)
    for text in [*HARD_TEXTS, *(random_text(rng) for _ in range(500))]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert decode_bytes(tokenizer, ids) == text.encode()


def test_any_bytes_come_back(tokenizer):
    rng = random.Random(0)
    every_byte = bytes(range(256))
    some = (rng.randbytes(rng.randrange(80)) for _ in range(500))
    halves = (b"x = '\xe9'\n", "é".encode()[:1], b"\xed\xa0\x80")
    for data in (b"", every_byte, every_byte[::-1], *halves, *some):
        assert decode_bytes(tokenizer, encode_bytes(tokenizer, data)) == data
    ids = [encode_bytes(tokenizer, bytes([byte])) for byte in range(256)]
    assert sorted(ids) == [[i] for i in range(256)]


def test_bytes_of_valid_text_are_encoded_as_the_text(tokenizer):
    for text in HARD_TEXTS:
        assert encode_bytes(tokenizer, text.encode()) == tokenizer(text)["input_ids"]
    spelled = encode_bytes(tokenizer, b"<|endoftext|>")
    assert tokenizer.eos_token_id not in spelled and len(spelled) > 1
    assert decode_bytes(tokenizer, [tokenizer.eos_token_id]) == b"<|endoftext|>"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loader in (AutoTokenizer, type(tokenizer)):
        loaded = loader.from_pretrained(tmp_path)
        for text in [*HARD_TEXTS, *(example["text"] for example in EXPECTED)]:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_trained_splits_as_openai_does(trained, openai):
    splitters = [t.backend_tokenizer.pre_tokenizer.pre_tokenize_str for t in (trained, openai)]
    for text in [*HARD_TEXTS, *(example["text"] for example in EXPECTED)]:
        assert splitters[0](text) == splitters[1](text)
    # On Python, merges of their own make the trained one no worse than OpenAI's.
    code = "import os\n\n\ndef main(self, value=None):\n    return self.value + 1\n" * 3
    assert len(trained(code)["input_ids"]) <= 1.1 * len(openai(code)["input_ids"])


@pytest.mark.parametrize(
    "pieces",
    [
        ["def", " f", "(x", "):\n", "   ", " return", " x", "\n"],
        ["it", "'s", " a", ".b", "_c", "__", "d"],
        ["123", "456", "7"],
        ["a", ");\n\n//", "b"],
        [" \n\n", " ", " x"],
        ["#", " x", "  \r\n", "\t", "\ty"],
        ["x", " =", " [[", "1", "],", " [", "2", "]]\n"],
    ],
    ids="".join,
)
def test_the_pieces_that_no_merge_crosses(tokenizer, pieces):
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    spans = pre_tokenizer.pre_tokenize_str("".join(pieces))
    assert ["".join(pieces)[start:end] for _, (start, end) in spans] == pieces


def test_training_is_deterministic_over_processes_and_threads(tmp_path):
    script = (
        "import json, sys, pathlib\n"
        "from hf_circuit_sparsity.tasks import train_tokenizer\n"
        "texts = [p.read_text() for p in sorted(pathlib.Path(json.__file__).parent.glob('*.py'))]\n"
        "train_tokenizer(texts, 500).backend_tokenizer.save(sys.argv[1])\n"
    )
    for threads, hash_seed in (("1", "1"), ("4", "2")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", script, str(tmp_path / threads)]
        subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()


def test_what_train_tokenizer_reads():
    texts = ["def f(x):\n    return x\n"] * 3
    from_list = train_tokenizer(texts, 300)
    dataset = Dataset.from_dict({"text": texts})
    other = Dataset.from_dict({"text": ["zz qq zz qq"]})
    from_splits = train_tokenizer(DatasetDict({"train": dataset, "validation": other}), 300)
    unknown = IterableDataset.from_generator(lambda: iter([{"text": t, "n": 1} for t in texts]))
    streams = (train_tokenizer(stream, 300) for stream in (dataset.to_iterable_dataset(), unknown))
    for tokenizer in (train_tokenizer(dataset, 300), from_splits, *streams):
        assert tokenizer.get_vocab() == from_list.get_vocab()
    assert train_tokenizer(texts, 300, model_max_length=64).model_max_length == 64
    # Spelled out in a document, the special token is text like any other.
    spelled = train_tokenizer(["<|endoftext|> x"] * 9, 400)
    assert "endoftext" in spelled.get_vocab()
    assert spelled.eos_token_id == len(spelled) - 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "error", "argument"),
    [
        (["x"], 256, ValueError, "vocab_size"),
        ([], 300, ValueError, "no text"),
        ([""], 300, ValueError, "no text"),
        ("x = 1", 300, TypeError, "texts"),
        ([{"text": "x = 1"}], 300, TypeError, "texts"),
        (Dataset.from_dict({"code": ["x"]}), 300, ValueError, "'text'"),
        (Dataset.from_dict({"code": ["x"]}).to_iterable_dataset(), 300, ValueError, "'text'"),
        (DatasetDict({"all": Dataset.from_dict({"text": ["x"]})}), 300, ValueError, "'train'"),
    ],
)
def test_train_tokenizer_errors(texts, vocab_size, error, argument):
    with pytest.raises(error, match=argument):
        train_tokenizer(texts, vocab_size)


@pytest.fixture
def copy(tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(FIXTURES / "tokenizer" / name, tmp_path)
    return tmp_path


def with_line(line):
    return lambda text: "\n".join([*text.split("\n")[:2], line, *text.split("\n")[2:]])


def with_entries(**entries):
    return lambda text: json.dumps({**json.loads(text), **entries})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("encoder.json", lambda text: text[:1000], r"encoder\.json"),
        ("encoder.json", lambda text: json.dumps(list(json.loads(text))), "JSON"),
        ("encoder.json", with_entries(a="1"), "'a'"),
        ("encoder.json", with_entries(a=True), "'a'"),
        ("encoder.json", with_entries(a=5000), "2047"),
        ("encoder.json", with_entries(a=1), "2047"),
        ("encoder.json", lambda text: text.replace("<|endoftext|>", "eot"), "<.endoftext.>"),
        ("encoder.json", lambda text: b"\xff\xfe\x00", r"encoder\.json"),
        ("vocab.bpe", with_line("abc"), "line 3.*'abc'"),
        ("vocab.bpe", with_line("a b c"), "line 3.*'a b c'"),
        ("vocab.bpe", with_line("qq zz"), "line 3.*'qq'"),
        ("vocab.bpe", with_line("q z"), "line 3.*'qz'"),
        ("vocab.bpe", lambda text: b"\xff\xfe\x00", r"vocab\.bpe.*UTF-8"),
    ],
)
def test_damaged_files(copy, name, damage, message):
    text = damage((copy / name).read_text(encoding="utf-8"))
    (copy / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        tokenizer_from_openai(copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        tokenizer_from_openai(copy)
