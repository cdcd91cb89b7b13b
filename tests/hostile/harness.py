"""Load many damaged copies of an artifact, and see that each is refused properly or read truly."""

import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hostile.mutations import mutated_file

MEMORY = 1 << 30  # what reading a damaged file may take on top, in bytes


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
    names: list[str],
    load: Callable[[Path], Any],
    check: Callable[[Any, Path], None],
    refusal: type[Exception],
    work: Path,
    mutations: int = 200,
    seed: int = 0,
) -> Counter:
    """Damage one file at a time and load the whole.

    Args:
        artifact: an undamaged folder.
        names: of the files in it that are damaged.
        load: reads a folder.
        check: raises unless what was loaded is what the folder's files say.
        refusal: the only exception that `load` may raise; its text must name a file.
        work: an empty folder.

    Returns:
        How many were `loaded` and how many `refused`.
    """
    outcome: Counter = Counter()
    place = work / "repo"
    shutil.copytree(artifact, place)
    check(load(place), place)
    for number in range(seed, seed + mutations):
        name, data = mutated_file(artifact, names, number)
        (place / name).write_bytes(data)
        before = listing(work)
        try:
            with limited_memory():
                loaded = load(place)
        except refusal as error:
            # Where two files do not fit each other, either is named.
            named = any(file in str(error) for file in listing(artifact))
            assert named, f"mutation {number} of {name} is refused without a file's name"
            assert len(str(error)) < 2000, f"mutation {number} of {name} is refused at length"
            outcome["refused"] += 1
        except Exception as error:
            raise AssertionError(
                f"mutation {number} of {name} ends in {type(error).__name__}: {error}"[:1000]
            ) from error
        else:
            try:
                check(loaded, place)
            except Exception as error:
                raise AssertionError(
                    f"mutation {number} of {name} is read as something else: {error}"[:1000]
                ) from error
            outcome["loaded"] += 1
        assert listing(work) == before, f"mutation {number} of {name} made files"
        shutil.copyfile(artifact / name, place / name)
    return outcome
