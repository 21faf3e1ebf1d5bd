"""Devices and dtypes by name; out-of-memory errors, and batches that are split in half and retried."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from scale_rae.errors import DeviceError, OptionError, ScaleRAEError, counted
from scale_rae.options import check_device_name, check_dtype_name

T = TypeVar("T")
_log = logging.getLogger("scale_rae")


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is: CUDA, then MPS, then the CPU.

    Raises:
        DeviceError: for a name that is no device's, or a device that does not exist here.
    """
    if name is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        check_device_name(name)
    except OptionError as e:
        raise DeviceError(str(e)) from e
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise DeviceError(
            f"device {name}: torch finds {counted(there, 'CUDA device') if there else 'no CUDA devices'} here; use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device {name}: torch finds no MPS here; use cpu")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`, or float32 on the CPU and bfloat16 elsewhere.

    Raises:
        OptionError: for a name that is none of `options.DTYPES`.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    check_dtype_name(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """A context in which float32 convolutions on CUDA compute in float32, not in TF32 (torch's default)."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or was caused by, a lack of memory, on any device."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error)):
            return True  # from the CPU and MPS
        error = error.__cause__
    return False


def missing_operation(error: BaseException) -> str | None:
    """The name of the operation that PyTorch does not have for MPS, if that is the error; else None."""
    found = re.search(r"operator '([^']+)' is not currently implemented for the MPS device", str(error))
    return found[1] if found and isinstance(error, NotImplementedError) else None


class MemoryErrors:
    """For a `with`: if memory runs out, raises a DeviceError that names `what` was being done, and remedies.

    It also says which operation is missing, if the device (MPS) lacks one. `savings` are the flags that the function of that
    name lists.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype | None, what: str, remedy: str, savings: Sequence[str] = ()
    ) -> None:
        self.device, self.what = device, what
        remedies = [*([remedy] if remedy else []), *savings]
        if dtype == torch.float32:
            remedies.append("--dtype bfloat16, which takes half of it")
        if device.type != "cpu":
            remedies += ["ending what else uses the device", "--device cpu"]
        self.remedies = remedies or ["ending what else uses the memory"]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and (operation := missing_operation(error)) is not None:
            raise DeviceError(
                f"{self.device}: PyTorch {torch.__version__} has no operation {operation} for MPS, needed for {self.what}; set "
                "PYTORCH_ENABLE_MPS_FALLBACK=1 to have that operation computed on the CPU, or use --device cpu"
            ) from error
        if error is None or isinstance(error, ScaleRAEError) or not out_of_memory(error):
            return
        free = ""
        if self.device.type == "cuda" and torch.cuda.is_available():
            left, total = free_memory(self.device)
            free = f" ({left / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
        *others, last = self.remedies
        listed = f"{', '.join(others)}, or {last}" if others else last
        memory = "memory" if self.device.type == "cpu" else "GPU memory"
        raise DeviceError(f"{self.device}: out of {memory}{free} while {self.what}; try {listed}") from error


def savings(device: torch.device, quantize: str | None, offload: str) -> list[str]:
    """The flags with which a model on this device takes less memory than with those it has."""
    if device.type != "cuda":
        return []
    smaller = {None: ["--quantize int8"], "nf4": []}.get(quantize, ["--quantize nf4"])
    fewer = {"none": ["--offload model"], "model": ["--offload stream"]}.get(offload, [])
    return [*smaller, *fewer, "--memory auto, which chooses"] if smaller or fewer else []


def in_batches(
    count: int,
    size: int,
    run: Callable[[int, int], list[T]],
    errors: Callable[[str, str], MemoryErrors],
    doing: str,
    noun: str,
    remedy: str = "fewer at once",
    release: Callable[[], None] | None = None,
) -> list[T]:
    """The results of `run(start, stop)` for 0 … `count`, in batches of `size`, which is halved whenever memory runs out.

    `doing` and `noun` describe a batch in messages ("drawing 3 images at once"); `errors(what, remedy)` makes the MemoryErrors.
    `release` frees memory before a smaller batch is tried; without `release`, the error is raised. A warning is logged for each
    halving.
    """
    done: list[T] = []
    while len(done) < count:
        start, stop = len(done), min(len(done) + size, count)
        what = f"{doing} {counted(stop - start, noun)} at once"
        halve = False
        try:
            with errors(what, remedy if stop - start > 1 else ""):
                done += run(start, stop)
        except DeviceError as e:
            if release is None or stop - start == 1 or not out_of_memory(e):
                raise
            halve = True
        if halve and release is not None:  # outside the handler, where the error no longer holds tensors
            size = (stop - start) // 2
            _log.warning("out of memory %s; going on with %d", what, size)
            release()
    return done


def largest_batch(
    most: int,
    attempt: Callable[[int], None],
    release: Callable[[], None],
    spare: Callable[[], float],
    least_spare: float,
) -> int:
    """The largest batch among 1, 2, 4, … and `most` for which `attempt` leaves at least `least_spare` of the memory.

    `spare` returns the share of memory that was free at the peak so far; `release` frees what a failed attempt took. The
    result is 1 even if a single image does not fit: then drawing itself fails with an error.
    """
    fits, size = 1, 1
    while True:
        failed = False
        try:
            attempt(size)
        except Exception as e:
            if not out_of_memory(e):
                raise
            failed = True
        if failed:  # outside the handler, where the error no longer holds tensors
            release()
            return fits
        if spare() < least_spare:
            return fits
        fits = size
        if size == most:
            return fits
        size = min(2 * size, most)


def cuda_index(device: torch.device) -> int:
    """The index of a CUDA device; "cuda" alone, which some of torch's functions refuse, is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def free_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that this process can still take, bytes in all) of a CUDA device, within the process's limit if it has one."""
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(cuda_index(device)) * total)
    if limit >= total:
        return free, total
    return max(0, min(free, limit - torch.cuda.memory_reserved(device))), limit


def spare_memory(device: torch.device) -> float:
    """The share of memory available to this process that was free at its peak; 1 if torch does not report it."""
    if device.type != "cuda":
        return 1.0
    free, _ = free_memory(device)
    return 1 - torch.cuda.max_memory_allocated(device) / (free + torch.cuda.memory_reserved(device))
