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

logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("source")
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
    """The compiled library; None if there is no compiler, it fails, or the user said no."""
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
    key = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SOURCE.glob("*.[ch]"))))
    key.update("\0".join((compiler, *flags, platform.machine(), _processor())).encode())
    name = f"kernels-{key.hexdigest()[:16]}.so"
    try:
        library = _cache_folder() / name
        if not library.is_file():
            _compile(compiler, flags, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning_once(
            f"The kernels could not be compiled with {compiler}: slower torch and numpy code is "
            f"used instead. Set {SWITCH}=0 to silence this. The compiler said: {detail}"
        )
        return None


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile to a temporary name and move it into place, for others may be doing the same."""
    handle, partial = tempfile.mkstemp(dir=library.parent, suffix=".so.partial")
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", partial, *map(str, sorted(SOURCE.glob("*.c")))]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "hf_circuit_sparsity"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> str:
    """What the machine code depends on: the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
