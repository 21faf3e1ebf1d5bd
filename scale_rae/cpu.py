"""Settings for CPUs: freed memory is kept, one thread of arithmetic, and the largest batch size that is bit-exact.

The last digits of sums depend on the number of threads and, on some CPUs, on the batch size. So programs that draw many images
on a CPU give each Python thread one thread of arithmetic (`one_thread`), which is as fast, and use the largest batch whose
images equal those drawn one at a time (`exact_batch`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scale_rae.memory import out_of_memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = 256 << 20  # free bytes that are kept at the end of the heap
_LARGE = 32 << 20  # larger blocks are returned to the system at once; glibc's upper limit


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory, for the whole process; returns whether it does.

    By default, glibc returns a layer's large blocks to the system, and gets memory for the next layer page by page, which takes a
    third of the time of batches of images. Instead, the process keeps up to 256 MiB. Nothing changes with another C library, or if
    the environment sets glibc's own thresholds.
    """
    if platform.libc_ver()[0] != "glibc" or _sets_thresholds(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _KEPT))


def return_freed_memory() -> bool:
    """Makes glibc return the memory that was freed to the system; returns whether there was any.

    Weights of less than 32 MiB lie in glibc's heap, which keeps what is freed between them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):
        return False


def _sets_thresholds(environment: Mapping[str, str]) -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in environment for name in names) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")


@contextmanager
def one_thread() -> Iterator[int]:
    """For a `with`: one thread of arithmetic; yields how many threads there were before, and restores them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def exact_batch(most: int, draws: Sequence[Callable[[int], Sequence[Tensor]]]) -> int:
    """The largest batch size, of `most` and its halves, whose latents equal those drawn one at a time, to the bit.

    Each of `draws` draws the same latents whenever it is called, in batches of the given size. Sizes that run out of memory
    are skipped. Call this with one thread of arithmetic, as for the later images.
    """
    alone: list[Sequence[Tensor]] = []
    size = most
    while size > 1:
        try:
            alone = alone or [draw(1) for draw in draws]
            # The last batch may be smaller, so every smaller size is compared, too.
            if all(
                torch.equal(x, y)
                for draw, expected in zip(draws, alone, strict=True)
                for smaller in range(2, size + 1)
                for x, y in zip(draw(smaller), expected, strict=True)
            ):
                return size
        except Exception as e:
            if not out_of_memory(e):
                raise
        size //= 2
    return 1
