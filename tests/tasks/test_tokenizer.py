import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from hf_circuit_sparsity.tasks.tokenizer import (
    decode_bytes,
    encode_bytes,
    tokenizer_from_openai,
    train_tokenizer,
)
from tests.conftest import FIXTURES

EXPECTED = json.loads((FIXTURES / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
HARD_TEXTS = [
    "",
    " ",
    "\n",
    "\r\n\r\n\t x\r",
    "  leading, trailing and   inner  ",
    "it's we'll ' s",
    "e\u0301 \u0301 \u200d\u200b\ufeff",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "日本語 العربية हिन्दी",
    "١٢٣ ½ ² 12345678",
    "".join(map(chr, range(0x180))),
    "\U0010ffff\ue000\u2028\u2029\x85\xa0",
]


@pytest.mark.parametrize("example", EXPECTED, ids=lambda example: repr(example["text"][:20]))
def test_openai_ids_exactly(openai, example):
    assert openai(example["text"])["input_ids"] == example["ids"]
    assert openai.decode(example["ids"]) == example["text"]


def test_entries_and_special_tokens(tokenizer):
    assert len(tokenizer) == 2048
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 2047
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {2047}


def random_text(rng):
    return "".join(
        chr(
            rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        )
        for _ in range(rng.randrange(60))
    )


def test_text_comes_back(tokenizer):
    rng = random.Random(0)
    for text in [*HARD_TEXTS, *(random_text(rng) for _ in range(500))]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert decode_bytes(tokenizer, ids) == text.encode()


def test_any_bytes_come_back(tokenizer):
    rng = random.Random(0)
    every_byte = bytes(range(256))
    for data in [
        b"",
        every_byte,
        every_byte[::-1],
        b"x = '\xe9'\n",
        "é".encode()[:1],
        b"\xed\xa0\x80",
        *(rng.randbytes(rng.randrange(80)) for _ in range(500)),
    ]:
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
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        type(tokenizer).from_pretrained(tmp_path),
    ):
        for text in [*HARD_TEXTS, *(example["text"] for example in EXPECTED)]:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_trained_splits_as_openai_does(trained, openai):
    def pieces(tokenizer, text):
        pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
        return pre_tokenizer.pre_tokenize_str(text)

    for text in [*HARD_TEXTS, *(example["text"] for example in EXPECTED)]:
        assert pieces(trained, text) == pieces(openai, text)
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
    for tokenizer in (train_tokenizer(dataset, 300), from_splits):
        assert tokenizer.get_vocab() == from_list.get_vocab()
    assert train_tokenizer(texts, 300, model_max_length=64).model_max_length == 64
    # Spelled out in a document, the special token is text like any other.
    spelled = train_tokenizer(["<|endoftext|> x"] * 9, 400)
    assert "endoftext" in spelled.get_vocab()
    assert spelled.eos_token_id == len(spelled) - 1


def test_train_tokenizer_errors():
    with pytest.raises(ValueError, match="vocab_size is 256"):
        train_tokenizer(["x"], 256)
    for nothing in ([], [""], iter(())):
        with pytest.raises(ValueError, match="no text"):
            train_tokenizer(nothing)
    with pytest.raises(TypeError, match="one string"):
        train_tokenizer("x = 1")
    with pytest.raises(ValueError, match="'text' is needed"):
        train_tokenizer(Dataset.from_dict({"code": ["x"]}))
    with pytest.raises(ValueError, match="'train' is needed"):
        train_tokenizer(DatasetDict({"all": Dataset.from_dict({"text": ["x"]})}))


@pytest.fixture
def copy(tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(FIXTURES / "tokenizer" / name, tmp_path)
    return tmp_path


def test_missing_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"encoder\.json' does not exist"):
        tokenizer_from_openai(tmp_path / "nowhere")
    (copy / "vocab.bpe").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.bpe' does not exist"):
        tokenizer_from_openai(copy)


def change(vocab, **changes):
    return json.dumps({**vocab, **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vocab: json.dumps(vocab)[:1000], r"encoder\.json' is not JSON"),
        (lambda vocab: json.dumps(list(vocab)), "must hold one JSON object"),
        (lambda vocab: change(vocab, a="1"), "the id of token 'a' is '1'"),
        (lambda vocab: change(vocab, a=True), "the id of token 'a' is True"),
        (lambda vocab: change(vocab, a=5000), "ids must be the numbers 0 to 2047"),
        (lambda vocab: change(vocab, a=1), "ids must be the numbers 0 to 2047"),
        (
            lambda vocab: json.dumps({("eot" if i == 2047 else t): i for t, i in vocab.items()}),
            r"lacks 1 token.*'<\|endoftext\|>'",
        ),
    ],
)
def test_bad_encoder_json(copy, damage, message):
    file = copy / "encoder.json"
    file.write_text(damage(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tokenizer_from_openai(copy)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abc", "line 3: 'abc' must be two tokens"),
        ("a b c", "line 3: 'a b c' must be two tokens"),
        ("qq zz", "line 3: the token 'qq' is not in encoder.json"),
        ("q z", "line 3: the token 'qz' is not in encoder.json"),
    ],
)
def test_bad_vocab_bpe(copy, line, message):
    file = copy / "vocab.bpe"
    lines = file.read_text(encoding="utf-8").split("\n")
    lines.insert(2, line)
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tokenizer_from_openai(copy)


def test_files_that_are_not_utf8(copy):
    (copy / "vocab.bpe").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"vocab\.bpe' is not UTF-8"):
        tokenizer_from_openai(copy)
    (copy / "encoder.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"encoder\.json' is not JSON"):
        tokenizer_from_openai(copy)
