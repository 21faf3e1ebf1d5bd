"""Several processes, started by `torchrun`: each computes a part of every batch; gradients are summed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # the first process may encode pictures for hours while the others wait


class Group:
    """The processes of one training; this one is number `index` of `size`, from 0. Alone, nothing is sent."""

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index, self.size = index, size

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.index == 0

    def sum(self, tensor: Tensor) -> None:
        """Replaces the tensor by its sum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def send(self, tensor: Tensor, source: int) -> None:
        """Replaces the tensor by that of process number `source`."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, source)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def first_then_others(self, function: Callable[[], T]) -> T:
        """What a function returns, which the first process calls before the others.

        So the others find what the first has cached.
        """
        if self.is_first:
            result = function()
        self.wait()
        return result if self.is_first else function()

    def leave(self) -> None:
        """Ends the group."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def local_device(device: str | None) -> str | None:
    """The name of this process's device: under torchrun, GPU number LOCAL_RANK, unless one is given."""
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def started_processes() -> int:
    """How many processes torchrun started, this one included; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> Group:
    """The group of the processes that torchrun started with this one, or of this process alone."""
    size = started_processes()
    if size == 1:
        return Group()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return Group(torch.distributed.get_rank(), size)
