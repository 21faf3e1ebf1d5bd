"""Keeps what a CPU's tensors leave behind for the next ones, where the C library gives it back to the system."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = 256 << 20  # bytes free at the end of the heap that stay there
_LARGE = 32 << 20  # bytes from which memory is the system's again at once; glibc takes no more


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc keep freed memory, for the whole process; whether it does.

    By default what a layer frees goes back to the system when it is large, and the next layer's comes in page by page: for
    batches of pictures a third of the time. Up to 256 MiB stay with the process instead. Nothing is done where another C
    library is in use, or where the environment sets glibc's own thresholds.
    """
    if platform.libc_ver()[0] != "glibc" or _chosen(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _KEPT))


def _chosen(environment: Mapping[str, str]) -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in environment for name in names) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
