from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from scale_rae.allocator import _chosen

FAULTS = """
import resource, sys, torch
from scale_rae.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        large = torch.ones(6 << 20)  # 24 MiB
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc gives memory back; others are left alone")
def test_memory_that_was_freed_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 1000  # pages of 4 KiB; 24 MiB are 6144
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert faults("as it is") > 20 * 1000


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, False),
        ({"MALLOC_ARENA_MAX": "2"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=128"}, True),
        ({"GLIBC_TUNABLES": "glibc.elision.enable=1"}, False),
    ],
)
def test_what_the_environment_sets_stays(environment: dict[str, str], chosen: bool) -> None:
    assert _chosen(environment) is chosen
