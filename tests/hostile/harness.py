"""Load many damaged copies of an artifact, and see that each is refused properly or read truly."""

import json
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.hostile.mutations import mutated_file

MEMORY = 1 << 30  # what reading a damaged file may take on top, in bytes
DTYPES = {"F32": "<f4", "U8": "u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I8": "i1"}


def plain_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plain_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file, read with nothing but struct and NumPy."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = np.frombuffer(body[start:end], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within the block, an allocation that a lie in a file asks for fails at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def fuzz(
    artifact: Path,
    file: str,
    load: Callable[[Path], Any],
    check: Callable[[Any, Path], None],
    work: Path,
    *,
    refusal: type[Exception] = ArtifactError,
    mutations: int = 110,
) -> Counter:
    """Damage one file of a folder again and again, and load the whole each time.

    Args:
        artifact: an undamaged folder.
        file: the name of the file that is damaged.
        load: reads a folder.
        check: raises unless what was loaded is what the folder's files say.
        work: a folder that is made for the damaged copy.
        refusal: the only exception that `load` may raise; its text must name a file.

    Returns:
        How many were `loaded` and how many `refused`.
    """
    outcome: Counter = Counter()
    copy = work / "repo"
    shutil.copytree(artifact, copy)
    check(load(copy), copy)
    for number in range(mutations):
        what = f"mutation {number} of {file}"
        (copy / file).write_bytes(mutated_file(artifact / file, number))
        before = listing(work)
        try:
            with limited_memory():
                loaded = load(copy)
        except refusal as error:
            # Where two files do not fit each other, either is named.
            named = any(name in str(error) for name in listing(artifact))
            assert named, f"{what} is refused without a file's name"
            assert len(str(error)) < 2000, f"{what} is refused at length"
            outcome["refused"] += 1
        except Exception as error:
            raise AssertionError(
                f"{what} ends in {type(error).__name__}: {error}"[:1000]
            ) from error
        else:
            try:
                check(loaded, copy)
            except Exception as error:
                raise AssertionError(f"{what} is read as something else: {error}"[:1000]) from error
            outcome["loaded"] += 1
        assert listing(work) == before, f"{what} made files"
    return outcome
