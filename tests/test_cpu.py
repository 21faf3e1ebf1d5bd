from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from scale_rae.cpu import exact_batch, keep_freed_memory, one_thread

Settings = list[tuple[int, int]]
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@pytest.fixture
def mallopt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings that glibc's mallopt is called with, on any system; the environment sets none."""
    calls: Settings = []

    def call(option: int, value: int) -> int:
        calls.append((option, value))
        return 1

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=call))
    keep_freed_memory.cache_clear()
    yield calls
    keep_freed_memory.cache_clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_glibc_takes_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory.cache_clear()
    assert keep_freed_memory()


def test_up_to_256_mib_of_freed_memory_are_kept(mallopt: Settings) -> None:
    assert keep_freed_memory()
    assert keep_freed_memory()
    assert mallopt == [(-3, 32 << 20), (-1, 256 << 20)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, once for the process


def test_another_c_library_is_left_alone(mallopt: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
    assert mallopt == []


@pytest.mark.parametrize(
    ("name", "value", "is_a_threshold"),
    [
        ("MALLOC_ARENA_MAX", "2", False),
        ("MALLOC_TRIM_THRESHOLD_", "131072", True),
        ("MALLOC_MMAP_THRESHOLD_", "131072", True),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=128", True),
        ("GLIBC_TUNABLES", "glibc.elision.enable=1", False),
    ],
)
def test_thresholds_in_the_environment_stay(
    mallopt: Settings, monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_a_threshold: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() is not is_a_threshold
    assert bool(mallopt) is not is_a_threshold


def test_one_thread_of_arithmetic_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread() as threads:
            assert (threads, torch.get_num_threads()) == (2, 1)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="in between"), one_thread():
            raise RuntimeError("in between")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def draws_exactly_up_to(size: int, memory_for: int = 100) -> Callable[[int], list[Tensor]]:
    """Draws eight latents that have another last digit in batches above `size`, and none above `memory_for`."""

    def draw(batch: int) -> list[Tensor]:
        if batch > memory_for:
            raise torch.OutOfMemoryError("out of memory")
        return [torch.full((2, 3), float(i)) + (1e-3 if batch > size else 0.0) for i in range(8)]

    return draw


@pytest.mark.parametrize(("exact_up_to", "expected"), [(8, 8), (7, 4), (4, 4), (3, 2), (1, 1)])
def test_the_largest_batch_that_changes_no_bit(exact_up_to: int, expected: int) -> None:
    assert exact_batch(8, [draws_exactly_up_to(8), draws_exactly_up_to(exact_up_to)]) == expected


def test_sizes_that_run_out_of_memory_are_skipped() -> None:
    assert exact_batch(8, [draws_exactly_up_to(8, memory_for=5)]) == 4
    assert exact_batch(8, [draws_exactly_up_to(8, memory_for=0)]) == 1


def test_other_errors_of_a_batch_are_raised() -> None:
    def draw(batch: int) -> list[Tensor]:
        raise ValueError("no such option")

    with pytest.raises(ValueError, match="no such option"):
        exact_batch(4, [draw])
