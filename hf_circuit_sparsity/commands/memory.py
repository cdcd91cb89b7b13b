"""How a command's process holds memory."""

import ctypes
import os
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MOST = 2**31 - 1
_PAD = 2**28


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed, in place of giving it back to the system.

    A training step frees and asks for the same large tensors again; got from the system, page by
    page, they took a quarter of a step of a small model with 2,048 tokens. The process then holds
    on to the most that it ever had. Where the C library is not glibc, or the user has set
    `GLIBC_TUNABLES`, nothing is done.

    Returns:
        Whether it was told.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, _PAD))
    return all([mallopt(*setting) == 1 for setting in settings])
