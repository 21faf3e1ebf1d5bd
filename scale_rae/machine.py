"""What a device is and what it does per second, measured in about a second, for estimates and for `--memory`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_rae.config import DecoderConfig, ScaleRAEConfig, load_decoder_config
from scale_rae.errors import DeviceError
from scale_rae.footprint import CONTEXT, Footprint, Rates, published_decoder
from scale_rae.hub import Source, find_folder, own_folders
from scale_rae.memory import cuda_index
from scale_rae.memory_plan import Plan, choose
from scale_rae.options import ModelChoice, memory_bytes
from scale_rae.quantization import own_kernels

_log = logging.getLogger("scale_rae")
_STACK_SIZE = 0  # CUlimit: CU_LIMIT_STACK_SIZE
_SECONDS = 0.05  # that each rate is measured for, at least
_SPARE = 0.05  # the share of what is free that `auto` leaves


@dataclass(frozen=True)
class Machine:
    """A device: its name, kind ("cuda", "cpu", "mps"), memory in bytes, and whether our kernels for quantised products run on it."""

    name: str
    kind: str
    total: int
    free: int
    kernels: bool

    @property
    def usable(self) -> int:
        """Bytes of memory that `--memory auto` stays below: what is free now, less a margin."""
        return int(self.free * (1 - _SPARE))


def describe(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device and its memory now; `dtype` is the model's.

    On the CPU the memory is the host's, or the container's limit where that is lower.

    Raises:
        DeviceError: where the system does not say how much memory is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)  # what this process holds is its own
        kernels = own_kernels("int8", device, dtype)
        return Machine(torch.cuda.get_device_name(device), "cuda", total, free + CONTEXT["cuda"], kernels)
    if device.type == "mps":
        total = int(torch.mps.recommended_max_memory())
        return Machine("MPS", "mps", total, total - int(torch.mps.driver_allocated_memory()), False)
    total, free = _host_memory()
    return Machine(f"CPU, {torch.get_num_threads()} threads", "cpu", total, free, False)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured rates of a device: products of two square matrices, a copy within its memory, a copy from page-locked host memory.

    Takes about half a second and 0.3 GB of the device's memory.
    """
    side = 1024 if device.type == "cpu" else 4096
    generator = torch.Generator(device).manual_seed(0)  # not torch's own, which others may have seeded
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    products = 2.0 * side**3 / _time(device, lambda: a @ a)
    words = (32 << 20) if device.type == "cpu" else (128 << 20)
    source = torch.empty(words, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2.0 * words / _time(device, lambda: target.copy_(source))
    bus = memory
    if device.type == "cuda":
        host = torch.empty(words, dtype=torch.uint8, pin_memory=True)
        bus = words / _time(device, lambda: target.copy_(host, non_blocking=True))
    return Rates(products, memory, bus)


def plan(choice: ModelChoice, source: Source, config: ScaleRAEConfig, device: torch.device, dtype: torch.dtype) -> Plan:
    """What `choice.memory` chooses on a device for the model in `source`'s folder.

    A decoder that is not on this machine yet counts as one of the published size.

    Raises:
        OptionError: for a memory that is no size. DeviceError: when nothing fits, or the free memory is not known.
    """
    assert choice.memory is not None
    machine = describe(device, dtype)
    size = memory_bytes(choice.memory)
    limit = machine.usable if size is None else size
    name = str(dtype).removeprefix("torch.")
    footprint = Footprint(config, _decoder(choice.decoder_repo, source, config), machine.kind, name, machine.kernels)
    return choose(choice.memory, limit, footprint, lambda: measure(device, dtype), choice.quantize, choice.offload)


def _decoder(name: str | None, model: Source, config: ScaleRAEConfig) -> DecoderConfig | None:
    """The sizes of the decoder that will be loaded; None for a VAE, whose sizes are not known here."""
    if config.vae is not None:
        return None
    if name is not None:
        found = find_folder(name, "decoder", model.folder)
        folders = [] if found is None else [found.folder]
    else:
        folders = own_folders(model.folder, "decoder")
    for folder in folders:
        if (folder / "config.json").is_file():
            return load_decoder_config(folder, config.channels)
    return published_decoder(config.channels)


def limit_process(device: torch.device, limit: int) -> None:
    """Keeps the process below a limit of bytes of a GPU: allocations beyond it fail as if the memory were full.

    The context of CUDA, which torch does not count, is part of the limit. On the CPU nothing is enforced. On Linux with an NVIDIA
    GPU, torch and the driver then keep less memory that nothing uses.
    """
    if device.type == "cuda":
        if sys.platform == "linux" and torch.version.hip is None:
            _grow_segments()
            _free_stacks(device)
        _, total = torch.cuda.mem_get_info(device)
        share = max(limit - CONTEXT["cuda"], 0) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), cuda_index(device))
    elif device.type == "mps":
        torch.mps.set_per_process_memory_fraction(min(2.0, limit / torch.mps.recommended_max_memory()))


def _grow_segments() -> None:
    """Has torch's allocator grow and shrink its pieces of memory page by page, which leaves no gaps between fixed pieces.

    What the user set through the environment stays.
    """
    given = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
    if "expandable_segments" in given:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name, since torch 2.9, has no effect on CUDA in 2.9
        torch.cuda.memory._set_allocator_settings(f"{given},expandable_segments:True".lstrip(","))


def _free_stacks(device: torch.device) -> None:
    """Frees the stacks that the driver keeps for as many threads as the GPU can run: 1 KiB each, 0.26 GiB on an H200.

    The driver makes them as large as a kernel needs when it is launched.
    """
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes the context that the limit is of
        try:
            error: object = ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(0))
        except OSError as e:
            error = e
        if error:
            _log.warning("the stacks of the GPU's threads keep their size (CUDA: %s)", error)


def _time(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of one call, from as many calls as take _SECONDS, after a first one."""
    synchronise: Callable[[], object] = lambda: None  # noqa: E731
    if device.type == "cuda":
        synchronise = lambda: torch.cuda.synchronize(device)  # noqa: E731
    elif device.type == "mps":
        synchronise = torch.mps.synchronize
    run()
    synchronise()
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise()
        seconds = time.perf_counter() - start
        if seconds >= _SECONDS:
            return seconds / calls
        calls *= 4


def _host_memory() -> tuple[int, int]:
    """(bytes in all, bytes that are free) of the host's memory, within the limit of the process's container."""
    total = free = None
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if ":" in line}
        total, free = fields["MemTotal"], fields["MemAvailable"]
    if total is None or free is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            free = total * 3 // 4  # macOS does not say what is free
    if total is None or free is None:
        raise DeviceError(
            "--memory auto: this system does not say how much memory is free; give a size, as in --memory 8G"
        )
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free
