"""Compiles the C code in `source/` with the machine's C compiler and keeps the result."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from transformers.utils import logging

from ..files import sha256_of

logger = logging.get_logger(__name__)

# Read when the wrappers in Python are, and not when the kernels are first needed: the package may
# be replaced by another version in between, whose kernels take other arguments.
SOURCE = {
    path.name: path.read_bytes()
    for path in sorted(Path(__file__).with_name("source").glob("*.[ch]"))
}
SWITCH = "HF_CIRCUIT_SPARSITY_KERNELS"
# The order of additions is left to the compiler, as in any other fast product of matrices; that
# needs the two flags behind it. NaN and infinity keep their meaning.
_FLAGS = (
    "-O3", "-fno-strict-aliasing", "-ffp-contract=fast", "-fno-math-errno", "-fassociative-math",
    "-fno-signed-zeros", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_NATIVE = ("-march=native", "-mprefer-vector-width=512")
_NATIVE_ELSEWHERE = ("-mcpu=native",)  # what compilers for ARM call it


def build() -> ctypes.CDLL | None:
    """The compiled library; None if there is no compiler, it fails, or the user said no.

    It is kept in the user's cache folder under a name that has a hash of its content, which is
    looked at before it is loaded: a file that was cut off would end the process. What does not
    match is compiled anew. A folder that others could write to is not used, nor one that cannot be
    had; the library is then compiled for this process alone.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None
    )
    if compiler is None:
        logger.info("No C compiler was found: the kernels are not used, torch and numpy are.")
        return None
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    flags = (*_FLAGS, *(_NATIVE if x86 else _NATIVE_ELSEWHERE))
    key = hashlib.sha256(b"".join(SOURCE.values()))
    key.update("\0".join((compiler, *flags, platform.machine(), _processor())).encode())
    name = f"kernels-{key.hexdigest()[:16]}"
    try:
        folder = _cache_folder()
        if folder is not None:
            return ctypes.CDLL(str(_kept(folder, name) or _compile(compiler, flags, folder, name)))
        with tempfile.TemporaryDirectory() as alone:  # a library that is loaded needs no file
            return ctypes.CDLL(str(_compile(compiler, flags, Path(alone), name)))
    except (OSError, subprocess.SubprocessError) as error:
        warn_that_there_are_none(f"{compiler} said: {getattr(error, 'stderr', None) or error}")
        return None


def warn_that_there_are_none(reason: str) -> None:
    """Say, once, that the kernels are done without."""
    logger.warning_once(
        "The kernels could not be compiled: slower torch and numpy code is used instead. Set "
        f"{SWITCH}=0 to silence this. {reason}"
    )


def _kept(folder: Path, name: str) -> Path | None:
    """A library that was compiled before and is what it was; others of its name are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.name == f"{name}-{sha256_of(path)}.so":
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile to a temporary name and move it into place, for others may be doing the same."""
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".so.partial")
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory() as source:
            for file, content in SOURCE.items():
                Path(source, file).write_bytes(content)
            command = [compiler, *flags, "-o", partial, *map(str, sorted(Path(source).glob("*.c")))]
            subprocess.run(
                command, check=True, capture_output=True, encoding="utf-8", errors="replace",
                timeout=120,
            )  # fmt: skip
        library = folder / f"{name}-{sha256_of(partial)}.so"
        os.replace(partial, library)
        return library
    finally:
        Path(partial).unlink(missing_ok=True)


def _cache_folder() -> Path | None:
    """Where libraries are kept: a folder that is the user's and that nobody else can write to."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "hf_circuit_sparsity"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # the latter where nobody knows a home
        return None
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        logger.warning_once(
            f"{folder} is not this user's, or others may write to it: kernels are compiled anew "
            "for every process. `chmod go-w` it, or set XDG_CACHE_HOME."
        )
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _processor() -> str:
    """What the machine code depends on: the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
