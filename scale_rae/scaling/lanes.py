"""Two halves of a group of prompts, side by side on one GPU: while images of one are drawn, those of the other are read.

Drawing is a few large CUDA graphs, which fill the GPU; reading is many small kernels, which leave it waiting for the host. So each
has a stream of its own.
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
LANES_AT_ONCE = LANES  # on a device with memory for it
T = TypeVar("T")


def split(prompts: Sequence[T]) -> list[Sequence[T]]:
    """The prompts of each lane: all in one, or as many in each of LANES. It depends on their number alone, as rounding does."""
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
        # Parts of the model that take turns on the device cannot be used at once, and a limit has no room for two batches.
        self._at_once = 1 if model.residency.offloads or model.memory_plan is not None else LANES_AT_ONCE
        self._stop = stop
        self._guard = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, torch.cuda.Stream]] = {}

    @contextlib.contextmanager
    def turn(self, stage: str) -> Iterator[None]:
        """For a `with`: waits until no other function is in this stage. What was computed is there when the `with` ends."""
        import torch

        with self._guard:
            if stage not in self._turns:
                self._turns[stage] = threading.Lock(), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            lock, stream = self._turns[stage]
        with lock, torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """Calls all functions. If some raise, raises the first one's exception once all have ended.

        On Ctrl-C it has `stop` end what the functions draw.
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
