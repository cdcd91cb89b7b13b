"""The tokenizer of the method: byte-level BPE, 2,048 entries, trained on Python.

`train_tokenizer` makes one from a corpus, `tokenizer_from_openai` reads the one of OpenAI's
weight-sparse models. Both split text in the same way before any merge.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .documents import documents_of

END_OF_TEXT = "<|endoftext|>"

# How text falls into pieces that no merge crosses: the pattern of OpenAI's `tinypython_2k` encoding
# (its circuit_sparsity release): tiktoken's cl100k_base without the English contractions, and with
# `/` glued to the punctuation before it. So a line end joins the punctuation that it follows:
# `):\n` and `"\n` can be tokens, `x\n` cannot.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def train_tokenizer(
    texts: Iterable[str] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    vocab_size: int = 2048,
    *,
    model_max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits text as OpenAI's does.

    The first 256 entries are the bytes, in the order of GPT-2's vocabulary; then come the merges;
    the last entry is `<|endoftext|>`, which also serves as beginning and padding token.
    The same texts always give the same tokenizer. The standard library takes about two seconds.

    Args:
        texts: strings, a dataset with a `text` column, which may be streamed, or a `DatasetDict`
            of such, of which only `train` is read.
        vocab_size: entries in all. A corpus too small for that many merges gives fewer.
        model_max_length: stored in the tokenizer, which then warns about longer texts.

    Raises:
        ValueError: `vocab_size` below 257 (the bytes and `<|endoftext|>`), no text, or a dataset
            without the column or split.
        TypeError: `texts` is a single string, or holds something else than strings.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}, but must be at least 257: one entry for each byte and "
            f"one for {END_OF_TEXT}."
        )
    seen_characters = 0

    def counted() -> Iterator[str]:
        nonlocal seen_characters
        for text in _texts(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts holds a {type(text).__name__}, expected strings.")
            seen_characters += len(text)
            yield text

    tokenizer = _byte_level(models.BPE(ignore_merges=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if seen_characters == 0:
        raise ValueError("There is no text to train the tokenizer on; pass a corpus that has some.")
    # Added after training, and not as the trainer's special token, so that it comes last (as in
    # OpenAI's vocabulary) and text that spells it out is trained on as ordinary text.
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer, model_max_length)


def tokenizer_from_openai(
    folder: str | os.PathLike[str], *, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Read OpenAI's tokenizer from a folder that holds `vocab.bpe` and `encoder.json`.

    It gives the ids that tiktoken gives with `tinypython_2k`. `<|endoftext|>` also serves as
    beginning and padding token.

    Args:
        folder: local folder with the two files.
        model_max_length: stored in the tokenizer, which then warns about longer texts.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is not what it should be; the sentence names the file and the place.
    """
    encoder_file, merges_file = Path(folder) / "encoder.json", Path(folder) / "vocab.bpe"
    for file in (encoder_file, merges_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(file)!r} does not exist; pass a folder that holds encoder.json and "
                "vocab.bpe."
            )
    vocab = _read_encoder(encoder_file)
    merges = _read_merges(merges_file, vocab)
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer, model_max_length)


def encode_bytes(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """Token ids of any bytes, UTF-8 or not: `decode_bytes` gives exactly `data` back.

    What is valid UTF-8 is tokenized as text (`<|endoftext|>` spelled out is ordinary text here);
    every other byte becomes its own token.
    """
    symbols, ids = _byte_symbols(), []
    # surrogateescape marks each byte that is not UTF-8 by a code point that no valid text has.
    text = data.decode("utf-8", "surrogateescape")
    for run in re.split("([\udc80-\udcff]+)", text):
        if run and "\udc80" <= run[0] <= "\udcff":
            raw = run.encode("utf-8", "surrogateescape")
            ids += tokenizer.convert_tokens_to_ids([symbols[byte] for byte in raw])
        elif run:
            ids += tokenizer(
                run, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
    return ids


def decode_bytes(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> bytes:
    """The bytes that the tokens stand for, also where a token is only a part of a character."""
    byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    special = set(tokenizer.all_special_tokens)
    return b"".join(
        token.encode() if token in special else bytes(byte_of[symbol] for symbol in token)
        for token in tokenizer.convert_ids_to_tokens(list(ids))
    )


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, model_max_length: int | None) -> PreTrainedTokenizerFast:
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    special = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special, **limit
    )


def _texts(texts: Iterable[str] | dict[str, Dataset | IterableDataset]) -> Iterable[str]:
    if isinstance(texts, str):
        raise TypeError(
            "texts is one string, but must be a dataset or a list of strings; put the string into "
            "a list."
        )
    if isinstance(texts, dict):
        if "train" not in texts:
            raise ValueError(
                f"The DatasetDict has the splits {sorted(texts)}, but 'train' is needed: the "
                "tokenizer is trained on it alone."
            )
        texts = texts["train"]
    return documents_of(texts) if isinstance(texts, (Dataset, IterableDataset)) else texts


def _read_encoder(file: Path) -> dict[str, int]:
    try:
        vocab = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise ValueError(f"{str(file)!r} is not JSON ({error}); download it again.") from None
    if not isinstance(vocab, dict):
        raise ValueError(f"{str(file)!r} must hold one JSON object of tokens and their ids.")
    for token, index in vocab.items():
        if type(index) is not int:
            raise ValueError(
                f"{str(file)!r}: the id of token {token[:80]!r} is {index!r:.80}, but must be an "
                "integer."
            )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(
            f"{str(file)!r}: the {len(vocab)} ids must be the numbers 0 to {len(vocab) - 1}, each "
            "once."
        )
    missing = [token for token in (*_byte_symbols(), END_OF_TEXT) if token not in vocab]
    if missing:
        raise ValueError(
            f"{str(file)!r} lacks {len(missing)} token(s) that every byte-level vocabulary has, "
            f"the first is {missing[0]!r}; download it again."
        )
    return vocab


def _read_merges(file: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 ({error}); download it again.") from None
    merges: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(
                f"{str(file)!r}, line {number}: {line[:80]!r} must be two tokens and a space "
                "between them."
            )
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(
                    f"{str(file)!r}, line {number}: the token {token[:80]!r} is not in "
                    "encoder.json; the two files must come from the same tokenizer."
                )
        if (first := merges.setdefault((left, right), number)) != number:
            raise ValueError(
                f"{str(file)!r}, line {number}: the merge {line[:80]!r} is in line {first} too; "
                "download it again."
            )
    return list(merges)


def _byte_symbols() -> list[str]:
    """The printable character by which byte-level BPE writes each byte, by byte value."""
    # Bytes that print are written as themselves, the others as the code points from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_in)) for byte in range(256)]
