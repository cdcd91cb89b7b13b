"""Files that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SAVING = ".saving"  # within a folder, what is being saved together
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is moved into place when the block ends.

    If the block raises, the temporary file is removed and what was at `path` stays as it was. The
    folder is created if needed, and the file gets the permissions of any newly created one.

    Args:
        path: the file to write or replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: str | os.PathLike) -> Path:
    """What a file is called beside its place until it is whole."""
    path = Path(path)
    return path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix may say the format


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is moved there when the block ends.

    Args:
        path: a folder that is not there yet.
    """
    path = Path(path)
    new = temporary_name(path)
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        yield new
        os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def replacing_together(folder: str | os.PathLike, *switches: str) -> Iterator[Path]:
    """Yield an empty folder, whose files are moved into `folder` when the block ends.

    If the block raises, `folder` stays as it was. The files named in `switches` are those without
    which no reader looks at the others. They are gone before the first file is moved and come last,
    so that at no moment old and new files are read as one artifact.

    Args:
        folder: made if needed; files of other names stay.
        switches: names of files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / SAVING
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        yield new
        made = sorted(new.iterdir(), key=lambda path: path.name in switches)
        for name in switches:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            path.chmod(0o666 & ~_UMASK) if path.is_file() else None
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder for temporary files, which is removed when the block ends.

    So are those of processes that were killed: whoever uses one holds a lock on it, which goes with
    the process. Where there are no such locks they stay.

    Args:
        prefix: of its name; no other folders for temporary files may have it.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        held = _lock(left, wait=False)
        if held is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    held = None
    while held is None:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        if fcntl is None:
            break
        held = _lock(folder, wait=True)
        if not folder.is_dir():  # taken for one that was left, before it was locked
            held = None if held is None else os.close(held)
        elif held is None:  # a file system without locks
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _lock(folder: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock on a folder; None if it cannot be had."""
    if fcntl is None:
        return None
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # somebody else's, or gone
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(opened)
        return None
    return opened


def check_can_write(folder: str | os.PathLike) -> None:
    """Whether a file can be made in a folder, or the folder itself: before the work for it.

    Args:
        folder: need not exist; nothing is left there.

    Raises:
        OSError: it cannot, as in one that is read-only, full or a file; says why.
    """
    folder = Path(folder).expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"0")
    except OSError as error:
        within = "it" if nearest == folder else nearest
        raise OSError(
            f"{folder} was passed to write into, but no file can be made in {within} "
            f"({error.strerror or error}): choose another folder, or change that."
        ) from error


def sha256_of(path: str | os.PathLike) -> str:
    """Hash of a file's content, 64 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file.

    Args:
        path: the file to write or replace.
        content: anything that `json` can write.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_figure(
    path: str | os.PathLike, draw: Callable[[type], Any], dpi: int = 300, **settings: Any
) -> Path:
    """Draw a matplotlib figure into a PNG, SVG or PDF file; no display is needed.

    In an SVG text stays text, and the same figure is the same file.

    Args:
        path: its suffix says the format.
        draw: called with `matplotlib.figure.Figure`, returns the figure.
        dpi: of a PNG.
        settings: matplotlib's `rcParams`, dots as double underscores (`font__size=7`).

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"matplotlib is needed to draw {Path(path).name}, but it is not installed; "
            "pip install 'hf-circuit-sparsity[viz]'."
        ) from error
    params = {"svg.fonttype": "none", "svg.hashsalt": "hf-circuit-sparsity"}
    params |= {name.replace("__", "."): value for name, value in settings.items()}
    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    with matplotlib.rc_context(params), replacing(path) as temporary:
        draw(Figure).savefig(temporary, dpi=dpi, facecolor="white", metadata=metadata)
    return Path(path)
