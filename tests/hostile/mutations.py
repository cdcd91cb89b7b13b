"""Seeded damage to the files of an artifact, from a flipped bit to a planted lie."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Each stands in for whatever value is found at some place of a JSON file.
HOSTILE_VALUES = (
    None, True, False, 0, -1, 1, 2, 7, 3.5, -0.0, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400),
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "-1", "1e5", "nan",
    "../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "~/.ssh/id_rsa", "C:\\x", "a\x00b",
    "a\nb", "---\nlicense: x", "<script>alert(1)</script>", "`${x}` | [a](javascript:b)",
    "{{ 7 * 7 }}", "\ud800", "\u202e", "x" * 100_000, [], {}, [[]], [None], [1, 1], [-1], [2**70],
    [1.5], [True], ["0"], [[1]], {"": 1}, {"a": None}, {"../x": [0]}, [0] * 3000,
    {"__class__": "os.system"},
)  # fmt: skip
RAW_LINES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000,
    b"1" * 10_000, b'"' + b"a" * 1000, b"\x00" * 64,
)  # fmt: skip


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, as the keys that lead to it."""
    places = [place] if place else []
    if isinstance(value, dict):
        for key, inner in value.items():
            places += _places(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:5]):
            places += _places(inner, (*place, index))
    return places


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One or two edits of a JSON object: a value, a name, or the text itself."""
    if rng.random() < 0.15:
        return rng.choice(RAW_LINES)
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        places = _places(content)
        if not places:
            break
        # Fields near the root are as likely as the many numbers below them.
        depth = rng.choice(sorted({len(place) for place in places}))
        *path, last = rng.choice([place for place in places if len(place) == depth])
        owner = content
        for key in path:
            owner = owner[key]
        kind = rng.randrange(8)
        if kind == 0:
            del owner[last]
        elif kind == 1 and isinstance(owner, dict):
            new = rng.choice([v for v in HOSTILE_VALUES if isinstance(v, str)])
            owner[new] = owner.pop(last)
        elif kind == 2 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        else:
            owner[last] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    text = json.dumps(content)
    if rng.random() < 0.05:  # one field twice
        text = text.replace("{", '{"' + rng.choice(list(content) or ["a"]) + '": 1, ', 1)
    if rng.random() < 0.03:
        text = text.replace("0", "1e999", 1)
    return text.encode()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert, repeat or blank some bytes."""
    data = bytearray(data)
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        data[at : at + rng.randrange(1, 64)] = b""
    elif kind == 4:
        data += data[at:]
    else:
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data)


DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "C64", "F8_E4M3", "F8_E5M2", "F4", "X9", "", "../x",
)  # fmt: skip


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage to a safetensors file: its bytes, its header's length, or what the header says."""
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    if kind < 0.3:
        lie = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + data[8:]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(10)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        # As many bytes, of another kind: the reader alone can tell.
        like = {"F32": ("I32", "U32"), "U8": ("I8", "BOOL")}
        entry["dtype"] = rng.choice(like.get(entry["dtype"], DTYPES))
    elif kind == 2:
        shape = entry["shape"]
        lies = ([], [0], [1, *shape], shape[::-1], [2**40], [2**62, 4], [-1], "x")
        entry["shape"] = rng.choice(lies)
    elif kind == 3:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        total = len(body)
        lies = ([0, size], [0, total], [total, 2 * total], [5, 1], [0, 2**60], [-4, 0], "x")
        entry["data_offsets"] = rng.choice(lies)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        strings = [v for v in HOSTILE_VALUES if isinstance(v, str) and v.isprintable()]
        header[rng.choice((name + "x", name.replace(".", "/"), *strings))] = header.pop(name)
    elif kind == 6:  # two swap names, so that values are where others belong
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == 7:  # a value that is no number, or a bit of an index
        start, end = entry["data_offsets"]
        body = bytearray(body)
        if end - start >= 4:
            at = start + 4 * rng.randrange((end - start) // 4)
            value = rng.choice((float("nan"), float("inf"), -1.0, 1e30, 0.0))
            body[at : at + 4] = struct.pack("<f", value)
        body = bytes(body)
    elif kind == 8:
        header["__metadata__"] = rng.choice(({}, None, {"format": "tf"}, {"format": 1}, [], "pt"))
    else:
        end = len(body)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        huge = {"dtype": "F32", "shape": [2**60], "data_offsets": [0, end]}
        header["surplus.weight"] = rng.choice((empty, huge, {}, None))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Damage to a text file: its bytes or its lines."""
    if rng.random() < 0.3:
        return rng.choice(RAW_LINES) if rng.random() < 0.3 else mutate_bytes(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at] = rng.choice((b"a b c", b"ab", b" ", b"\xff \xfe", b"x" * 10_000, b"\r", b"a  b"))
    else:
        lines[at] += rng.choice((b" ", b" x", b"\r", b"\x00"))
    return b"\n".join(lines)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".bpe": mutate_lines,
    ".csv": mutate_lines,
    ".pt": mutate_bytes,
    ".bin": mutate_bytes,
}


def mutated_file(path: Path, seed: int) -> bytes:
    """The damaged content of a file; the same for the same seed."""
    rng = random.Random(seed)
    rng.choice([path.name])  # as when one of several files was chosen: keeps the seeds' damages
    return MUTATIONS[path.suffix](path.read_bytes(), rng)
