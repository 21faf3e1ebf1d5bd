"""CUDA graphs: captures passes once and replays them, because launching their kernels takes longer than running them."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor


class GraphMemory:
    """The stream and the memory that CUDA graphs of a device share, all that are captured from one stream.

    A graph holds the `turn` from filling its inputs until its output is copied, since the next graph may overwrite both.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._lock = device, threading.RLock()
        self._stream: torch.cuda.Stream | None = None  # where graphs are captured
        self._last: torch.cuda.Stream | None = None  # where the last turn was
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A context without turns of other threads; the last turn's work on another stream comes first."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `function`, and the tensor that each replay writes; `function` is called three times."""
        with self.turn():
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, loads kernels, makes the libraries' workspaces
                    function()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            pool = next((graph.pool() for graph in self._graphs), None)  # a new one once the last graph is gone
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = function()
            except RuntimeError as e:  # if memory runs out in a capture, ending it fails too, which hides the cause
                if isinstance(e.__context__, torch.OutOfMemoryError):
                    raise e.__context__ from None
                raise
            self._graphs.add(graph)
            return graph, output


def graph_memory(device: torch.device) -> GraphMemory:
    """The GraphMemory of a device for graphs that are captured from the current stream.

    Work on two streams overlaps, so that graphs that run on either need memory of their own.
    """
    return _memory_of(device, torch.cuda.current_stream(device).stream_id)


@functools.cache
def _memory_of(device: torch.device, stream: int) -> GraphMemory:
    return GraphMemory(device)


class Captured:
    """A function of tensors as a CUDA graph, for inputs of the same shapes as `inputs`."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._memory = graph_memory(inputs[0].device)
        self.inputs = [x.clone() for x in inputs]
        self.graph, self.output = self._memory.capture(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self._memory.turn():
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self.graph.replay()
            return self.output.clone()


class Captures:
    """Runs functions of tensors as CUDA graphs, one per `key`: a name for the function and its shapes.

    Without `enabled`, functions run as they are. Beyond `most` graphs, the least recently used one is freed.
    """

    def __init__(self, enabled: bool, most: int) -> None:
        self.enabled, self.most = enabled, most
        self._graphs: dict[Hashable, Captured] = {}  # in the order of their last run
        self._seen: set[Hashable] = set()

    def run(
        self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor, when_it_comes_again: bool = True
    ) -> Tensor:
        """`function(*inputs)`. Capturing takes three runs, so by default a key is captured at its second run."""
        if not self.enabled:
            return function(*inputs)
        captured = self._graphs.pop(key, None)
        if captured is None:
            if when_it_comes_again and key not in self._seen:
                self._seen.add(key)
                return function(*inputs)
            if len(self._graphs) >= self.most:
                del self._graphs[next(iter(self._graphs))]
            captured = Captured(function, inputs)
        self._graphs[key] = captured
        return captured(*inputs)

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the captured graphs, least recently used first."""
        return list(self._graphs)

    def forget(self) -> None:
        """Frees the graphs and, with the last graph of the device, their memory."""
        self._graphs.clear()
