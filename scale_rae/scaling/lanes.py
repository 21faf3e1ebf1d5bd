"""Lanes: two halves of a group of prompts on one GPU; one half is drawn while the other is scored.

Drawing runs a few large CUDA graphs, which fill the GPU. Scoring runs many small kernels, between which the GPU waits for the host.
Each of the two stages has its own CUDA stream, so that they overlap.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from scale_rae.pipeline import ScaleRAE

LEAST_PROMPTS = 8  # per lane; fewer do not fill batches
LANES = 2
T = TypeVar("T")


def split(prompts: Sequence[T]) -> list[Sequence[T]]:
    """The prompts of each lane: one lane with all, or LANES lanes of equal size.

    The split depends only on the number of prompts, since rounding depends on the split."""
    if len(prompts) < LANES * LEAST_PROMPTS:
        return [prompts]
    size = -(-len(prompts) // LANES)
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


class Lanes:
    """Runs functions side by side, on a CUDA device with memory for it, else one after the other.

    Each stage of the work is done by one function at a time, on the stage's own stream.
    """

    def __init__(self, model: ScaleRAE, stop: Callable[[], None]) -> None:
        self._device = model.device
        # Offloaded parts cannot be used at the same time, and a memory limit has no room for two batches.
        self._at_once = 1 if model.residency.offloads or model.memory_plan is not None else LANES
        self._stop = stop
        self._guard = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, torch.cuda.Stream]] = {}

    @contextlib.contextmanager
    def turn(self, stage: str) -> Iterator[None]:
        """A context in which no other function is in this stage; at its end, the stage's work is complete."""
        import torch

        with self._guard:
            if stage not in self._turns:
                self._turns[stage] = threading.Lock(), torch.cuda.Stream(self._device)
            lock, stream = self._turns[stage]
        with lock, torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """Calls all functions. If some raise, raises the first one's exception once all have ended.

        On Ctrl-C it calls `stop`, which ends the drawing.
        """
        import torch

        torch.cuda.synchronize(self._device)  # what the functions use was computed on the current stream
        with ThreadPoolExecutor(self._at_once) as threads:
            running = [threads.submit(function) for function in functions]
            try:
                failed = [error for one in running if (error := one.exception()) is not None]
            except BaseException:
                self._stop()
                raise
        if failed:
            raise failed[0]
