"""A folder of Python as a dataset, one row per file."""

import hashlib
import io
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict

# What the standard library folder holds besides the library: its tests, what people installed
# into it, and what the build wrote there (compiled files and this machine's build settings).
STDLIB_EXCLUDE = (
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "config-*",
    "_sysconfigdata_*",
)  # fmt: skip
# A person's own folder is taken whole, except for hidden, compiled and installed files.
FOLDER_EXCLUDE = (".*", "__pycache__", "site-packages", "node_modules")


def build_corpus(
    folder: str | os.PathLike[str] | None = None,
    *,
    validation_fraction: float = 0.05,
    seed: int = 0,
    exclude: Sequence[str] | None = None,
    on_bad_encoding: Literal["error", "skip"] = "error",
) -> DatasetDict:
    """Read every `.py` file below a folder into a `DatasetDict` with `train` and `validation`.

    One row is one file: `text` (string, line ends as `\\n`, without a byte-order mark) and `path`
    (string, relative to the folder, with forward slashes; bytes that are not UTF-8 as `\\xe9`).
    Files that hold nothing but white space are left out, as is what is no file: pipes, links to
    nothing. Rows are sorted by path, and a file is wholly in one split, chosen by a hash of seed
    and path: the same folder and seed always give the same two splits. Nothing is written to disk.

    Args:
        folder: the folder to read. Default: the running interpreter's standard library.
        validation_fraction: share of the files that goes to `validation`; each split gets at least
            one file.
        seed: another seed, another split.
        exclude: patterns (as in `fnmatch`) of file and folder names to leave out. Default:
            `STDLIB_EXCLUDE` (tests, installed packages, build output) for the standard library,
            `FOLDER_EXCLUDE` (hidden, compiled and installed files) for a folder of your own.
        on_bad_encoding: what a file that is not UTF-8 does: `"error"` raises, `"skip"` leaves it
            out, with a warning. A PEP 263 coding line is not followed. (The standard library is
            UTF-8 outside its tests, by PEP 8.)

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: it is not a folder.
        ValueError: fewer than two files with text in it, a file that is not UTF-8, or an argument
            outside its range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, but must lie between 0 and 1 "
            "(both excluded): each split needs files."
        )
    if on_bad_encoding not in ("error", "skip"):
        raise ValueError(f'on_bad_encoding is {on_bad_encoding!r}, but must be "error" or "skip".')
    if exclude is None:
        exclude = STDLIB_EXCLUDE if folder is None else FOLDER_EXCLUDE
    root = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    if not root.exists():
        raise FileNotFoundError(
            f"The corpus folder {str(root)!r} does not exist; pass a folder that holds .py files."
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"The corpus folder {str(root)!r} is a file; pass the folder that holds the .py files."
        )

    documents: dict[str, str] = {}
    skipped = []
    for path in _python_files(root, exclude):
        # No text can hold a name as the file system has it where that is not UTF-8.
        name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if on_bad_encoding == "error":
                raise ValueError(
                    f"The file {name!r} in {str(root)!r} is not UTF-8 (byte {error.start} cannot "
                    'be read); save it as UTF-8, or pass on_bad_encoding="skip" to leave such '
                    "files out."
                ) from None
            skipped.append(name)
            continue
        if text.strip():
            plain = io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)
            documents[name] = plain
    if skipped:
        message = f"Left out {len(skipped)} file(s) that are not UTF-8, the first is {skipped[0]!r}"
        warnings.warn(message, stacklevel=2)
    if len(documents) < 2:
        raise ValueError(
            f"The corpus folder {str(root)!r} holds {len(documents)} readable .py file(s) with "
            "text in them, but two are needed, one for each split; pass a folder with more Python."
        )

    # Ranking by hash (and not drawing at random) keeps a file in its split when others come and go
    # around it, and does not depend on the order in which the file system lists them.
    ranked = sorted(documents, key=lambda path: hashlib.sha256(f"{seed}:{path}".encode()).digest())
    n_validation = min(max(round(len(ranked) * validation_fraction), 1), len(ranked) - 1)
    splits = {"train": ranked[n_validation:], "validation": ranked[:n_validation]}
    corpus = DatasetDict()
    for split, paths in splits.items():
        texts = [documents[path] for path in sorted(paths)]
        corpus[split] = Dataset.from_dict({"text": texts, "path": sorted(paths)})
    return corpus


def _python_files(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    def kept(name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in exclude)

    for folder, subfolders, files in os.walk(root):
        # In place, so that os.walk does not descend: site-packages may hold gigabytes.
        subfolders[:] = [name for name in subfolders if kept(name)]
        for name in files:
            path = Path(folder, name)
            if name.endswith(".py") and kept(name) and path.is_file():
                yield path
