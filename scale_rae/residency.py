"""Which weights are on the device, and when: all of them always, each part in its turn, or blocks one after the other.

Weights that wait lie in the host's memory, page-locked, so that the device reads them at the full speed of its bus. They are
constant: what is on the device is overwritten, and nothing is copied back.

- model: all parts share one piece of device memory (the arena), as large as the largest part. Each tensor of a part has its fixed
  address there, so captured CUDA graphs stay valid, and a turn costs one copy: 2.5 GB take 0.05 s at 50 GB/s, less than a
  capture of the graphs that freed weights would need.
- stream: a block is copied on a stream of its own while the block before it computes (`Ring`).
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from scale_rae.cpu import return_freed_memory
from scale_rae.errors import DeviceError
from scale_rae.memory import MemoryErrors, savings
from scale_rae.options import Speed

_ALIGN = 256  # bytes; kernels and libraries read aligned weights faster
_PAGE = 4096
_RETURNED = 256 << 20  # bytes after which freed memory is returned to the system
T = TypeVar("T")


def tensors_of(thing: object) -> Iterator[Tensor]:
    """The tensors in a tensor, module, or tuple or list of such; one that stands in two places comes twice."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        for module in thing.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from tensors_of(item)


class BufferLayout:
    """Where tensors' bytes lie in a buffer that holds all of them. Tensors that share memory share it there, too.

    `size` is the buffer's, in bytes. Layouts with equal `places` suit the same views.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans: dict[int, list[tuple[int, int, int]]] = {}  # memory -> (first byte, end, number of the tensor)
        for number, tensor in enumerate(tensors):
            start = int(tensor.storage_offset()) * tensor.itemsize
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (last + 1) * tensor.itemsize if tensor.numel() else start
            spans.setdefault(tensor.untyped_storage().data_ptr(), []).append((start, end, number))
        # Of each piece: the number of a tensor in its memory, its first byte there, its bytes, its place in the buffer.
        self.pieces: list[tuple[int, int, int, int]] = []
        offsets = [0] * len(tensors)
        self.size = 0
        for some in spans.values():
            some.sort()
            runs: list[list[tuple[int, int, int]]] = []
            for span in some:
                # Gaps as small as those of alignment are copied, too: one copy instead of two.
                if runs and span[0] <= max(end for _, end, _ in runs[-1]) + _ALIGN:
                    runs[-1].append(span)
                else:
                    runs.append([span])
            for run in runs:
                # From a multiple of _ALIGN to another: numbers of any size stay aligned.
                place, first = -(-self.size // _ALIGN) * _ALIGN, run[0][0] // _ALIGN * _ALIGN
                length = max(end for _, end, _ in run) - first
                self.pieces.append((run[0][2], first, length, place))
                for start, _, number in run:
                    offsets[number] = place + start - first
                self.size = place + length
        self.places = tuple(
            (offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
            for offset, tensor in zip(offsets, tensors, strict=True)
        )

    def sources(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """(bytes, their place in the buffer) of all the tensors' memory."""
        found = []
        for number, first, length, place in self.pieces:
            memory = torch.empty(0, dtype=torch.uint8, device=tensors[number].device)
            found.append((memory.set_(tensors[number].untyped_storage(), first, (length,), (1,)), place))
        return found

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in a buffer [bytes] uint8."""
        return [
            torch.empty(0, dtype=dtype, device=buffer.device).set_(
                buffer.untyped_storage(), (buffer.storage_offset() + offset) // dtype.itemsize, shape, stride
            )
            for offset, dtype, shape, stride in self.places
        ]

    def bind(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        """Makes the tensors, which others hold as they are, views of a buffer; what they viewed before is freed."""
        for tensor, view in zip(tensors, self.views(buffer), strict=True):
            tensor.data = view


class HostMemory:
    """`size` bytes of the host's memory: `bytes` is uint8 [size]. `lock` page-locks them until they are freed.

    torch's own page-locked memory would take up to twice as much, since its sizes are powers of two.
    """

    def __init__(self, size: int) -> None:
        """Raises DeviceError when there is not so much memory."""
        try:
            self._memory = np.empty(size + _PAGE, np.uint8)  # numpy asks for huge pages
        except MemoryError as e:
            raise DeviceError(
                f"--offload: the host's memory has no room for {size / 2**30:.1f} GiB of weights; smaller weights need less: "
                "--quantize int8 or nf4"
            ) from e
        start = -self._memory.ctypes.data % _PAGE
        self.bytes = torch.from_numpy(self._memory)[start : start + size]

    def lock(self) -> None:
        """Page-locks the memory; called once it is filled, so that it takes pages only as they are needed.

        Raises:
            DeviceError: when the system does not let this much memory be locked.
        """
        runtime: Any = torch.cuda.cudart()
        address, size = self.bytes.data_ptr(), self.bytes.numel()
        if size and (error := int(runtime.cudaHostRegister(address, size, 0))):
            raise DeviceError(
                f"--offload: the system does not let {size / 2**30:.1f} GiB of the host's memory be page-locked (CUDA error "
                f"{error}); smaller weights need less: --quantize int8 or nf4"
            )
        weakref.finalize(self._memory, runtime.cudaHostUnregister, address).atexit = False


def to_host(tensors: Sequence[Tensor], lock: bool) -> tuple[BufferLayout, Tensor]:
    """The layout of tensors, and host memory [bytes] that they are views of from now on; page-locked if `lock`."""
    layout = BufferLayout(tensors)
    memory = HostMemory(layout.size)
    views = layout.views(memory.bytes)
    sharing: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(number)
    sources: dict[int, list[tuple[Tensor, int]]] = {}
    for source, place in layout.sources(tensors):
        sources.setdefault(source.untyped_storage().data_ptr(), []).append((source, place))
    del source
    freed = 0
    for key, numbers in sharing.items():  # the memory of some tensors is freed before that of the next is copied
        for copied, place in sources.pop(key):
            memory.bytes[place : place + copied.numel()].copy_(copied)
            freed += copied.numel()
        del copied
        for number in numbers:
            tensors[number].data = views[number]
        if freed >= _RETURNED:
            return_freed_memory()
            freed = 0
    if lock:
        memory.lock()
    return layout, memory.bytes


class Part:
    """Tensors that have their turn on the device together: their bytes on the host, and their places in the device's memory."""

    def __init__(self, tensors: Sequence[Tensor], lock: bool) -> None:
        self._tensors = tensors
        self._layout, self._host = to_host(tensors, lock)
        self.size = self._layout.size
        self.arena: Tensor | None = None

    def bind(self, arena: Tensor) -> None:
        """Makes the tensors views of device memory of at least `size` bytes, for good."""
        self.arena = arena
        self._layout.bind(self._tensors, arena)

    def fill(self) -> None:
        """Copies the weights to the device, in the order of the current stream."""
        assert self.arena is not None
        self.arena[: self.size].copy_(self._host, non_blocking=True)


class Ring:
    """Two device buffers for blocks: one is computed with while the next block is copied into the other.

    Copies run on a stream of their own. They wait until the block that was in the buffer has computed; the current stream
    waits until its block is there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.size = device, 0
        self.buffers: list[Tensor] = []
        self._holds: list[tuple[int, int] | None] = [None, None]  # (Streamed, number of the block)
        self._last = 1  # the buffer that was computed with last
        self._stream: torch.cuda.Stream | None = None
        self._filled: list[torch.cuda.Event | None] = [None, None]
        self._used: list[torch.cuda.Event | None] = [None, None]

    def reserve(self, size: int) -> None:
        """Makes room for blocks of `size` bytes: called for all blocks before the first one is taken."""
        assert not self.buffers, "blocks are added after others were used"
        self.size = max(self.size, size)

    def begin(self) -> None:
        """Allocates the buffers, once."""
        if self.buffers:
            return
        with torch.inference_mode(False):
            self.buffers = [torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._filled = [torch.cuda.Event() for _ in range(2)]
            self._used = [torch.cuda.Event() for _ in range(2)]
            for event in self._used:
                assert event is not None
                event.record(torch.cuda.current_stream(self.device))

    def take(self, block: tuple[int, int], sources: Sequence[tuple[Tensor, int]]) -> int:
        """The number of the buffer that holds a block; the current stream waits for it."""
        if block not in self._holds:
            self._fill(1 - self._last, block, sources)
        place = self._holds.index(block)
        self._last = place
        if (event := self._filled[place]) is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return place

    def prefetch(self, block: tuple[int, int], sources: Sequence[tuple[Tensor, int]]) -> None:
        """Begins to copy a block into the buffer that is not being computed with."""
        if block not in self._holds:
            self._fill(1 - self._last, block, sources)

    def done(self, place: int) -> None:
        """Says that all that uses the buffer has been launched on the current stream."""
        if (event := self._used[place]) is not None:
            event.record(torch.cuda.current_stream(self.device))

    def _fill(self, place: int, block: tuple[int, int], sources: Sequence[tuple[Tensor, int]]) -> None:
        self._holds[place] = None
        if self._stream is None:
            self._copy(place, sources)
        else:
            used, filled = self._used[place], self._filled[place]
            assert used is not None
            assert filled is not None
            self._stream.wait_event(used)
            with torch.cuda.stream(self._stream):
                self._copy(place, sources)
            filled.record(self._stream)
        self._holds[place] = block

    def _copy(self, place: int, sources: Sequence[tuple[Tensor, int]]) -> None:
        for source, offset in sources:
            self.buffers[place][offset : offset + source.numel()].copy_(source, non_blocking=True)


class Streamed(Sequence[T], Generic[T]):
    """A sequence of blocks in the host's memory; iterating yields each as it lies in a device buffer, until the next one.

    A block is whatever `tensors_of` knows. Blocks of the same sizes share one object per buffer, whose tensors are views of
    the buffer. The block that follows the last one is the first, since networks are evaluated again and again.
    """

    def __init__(self, ring: Ring, blocks: Sequence[T], number: int) -> None:
        self._ring, self._blocks, self._number = ring, blocks, number
        self._layouts = [BufferLayout(list(tensors_of(block))) for block in blocks]
        self._sources = [
            layout.sources(list(tensors_of(block))) for layout, block in zip(self._layouts, blocks, strict=True)
        ]
        self._in_buffer: dict[tuple[int, Any], T] = {}
        for layout in self._layouts:
            ring.reserve(layout.size)

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """A block as it lies on the host, or a sequence of some, which are streamed, too."""
        return StreamedSlice(self, range(len(self))[index]) if isinstance(index, slice) else self._blocks[index]

    def __iter__(self) -> Iterator[T]:
        return self.iterate(range(len(self)))

    def iterate(self, numbers: Iterable[int]) -> Iterator[T]:
        """The blocks with these numbers, each on the device until the next one is asked for."""
        ring = self._ring
        ring.begin()
        for number in numbers:
            place = ring.take((self._number, number), self._sources[number])
            following = (number + 1) % len(self)
            ring.prefetch((self._number, following), self._sources[following])
            try:
                yield self._view(number, place)
            finally:
                ring.done(place)

    def _view(self, number: int, place: int) -> T:
        key = (place, (type(self._blocks[number]), self._layouts[number].places))
        if key not in self._in_buffer:
            with torch.inference_mode(False), torch.no_grad():
                made = copy.deepcopy(self._blocks[number])
                self._layouts[number].bind(list(tensors_of(made)), self._ring.buffers[place])
            self._in_buffer[key] = made
        return self._in_buffer[key]


class StreamedSlice(Sequence[T], Generic[T]):
    """Some consecutive blocks of a `Streamed`."""

    def __init__(self, whole: Streamed[T], numbers: range) -> None:
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return StreamedSlice(self._whole, self._numbers[index])
        return self._whole[self._numbers[index]]

    def __iter__(self) -> Iterator[T]:
        return self._whole.iterate(self._numbers)


class Residency:
    """Where the weights of a model's parts wait, and what brings a part to the device for its turn.

    `mode` is one of `options.OFFLOAD`:

    - none: all weights are on the device.
    - model: weights wait in the host's memory; a part's weights are on the device while it has its turn.
    - stream: the same, but the blocks of the two large networks are copied to the device one after the other.

    A part computes only inside of `use(part)`. `copies` counts, per part, how often it was copied to the device. `lock` is held
    while a part has its turn; hold it while parts are loaded, too.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.copies: Counter[str] = Counter()
        self._parts: dict[str, Part] = {}
        self._arenas: list[Tensor] = []  # one, unless a part that came later did not fit
        self._present: dict[int, str] = {}  # address of an arena -> the part whose weights are there
        self._turns: list[str] = []  # innermost last
        self.lock = threading.RLock()
        self._ring = Ring(device)
        self._streamed = 0

    @property
    def offloads(self) -> bool:
        """Whether weights wait on the host."""
        return self.mode != "none"

    @property
    def streams(self) -> bool:
        """Whether blocks are streamed."""
        return self.mode == "stream"

    @property
    def home(self) -> torch.device:
        """Where the weights of parts are loaded to."""
        return torch.device("cpu") if self.offloads else self.device

    def speed(self, speed: Speed) -> Speed:
        """The speed options that go with the mode: streamed blocks change while they compute, so nothing captures or groups them."""
        return replace(speed, graph=False, group=False, ahead=False) if self.streams else speed

    def settle(self, network: nn.Module, waiting: Sequence[nn.Module]) -> None:
        """Moves all of a network to the device except the modules that wait, which `keep` or `keep_blocks` takes."""
        if not self.offloads:
            return
        left = {id(tensor) for tensor in tensors_of(list(waiting))}
        with torch.inference_mode(False), torch.no_grad():
            for tensor in tensors_of(network):
                if id(tensor) not in left:
                    tensor.data = tensor.data.to(self.device)

    def keep(self, part: str, weights: object, entries: Sequence[nn.Module] = ()) -> str:
        """Takes a part's weights, all that `tensors_of` finds: they wait on the host, and `use` brings them to the device.

        The result is the name for `use`: `part`, or another if there is a part of that name. Single numbers stay on the device.
        `entries` are modules through which the part is entered: outside of its turn they raise RuntimeError, since the device's
        memory then holds another part's weights.

        Raises:
            DeviceError: when the host's memory cannot be page-locked.
        """
        if not self.offloads:
            return part
        with self.lock, self._current(), torch.inference_mode(False), torch.no_grad():
            if part in self._parts:
                part = f"{part} {len(self._parts)}"
            found = _unique(weights)
            for tensor in found:
                if tensor.numel() == 1:
                    tensor.data = tensor.data.to(self.device)
            self._parts[part] = Part([tensor for tensor in found if tensor.numel() > 1], self.device.type == "cuda")
            if self._turns[-1:] == [part]:
                self._bring(part)
        self._guard(part, entries)
        return part

    def keep_blocks(
        self, part: str, blocks: Sequence[T], weights: object, entries: Sequence[nn.Module] = ()
    ) -> Sequence[T]:
        """The blocks of a network, to iterate over: those given or, in mode "stream", a `Streamed`.

        `weights` are other weights that wait with the blocks, and modules that share memory with them; `entries` as in `keep`.
        """
        if not self.streams:
            self.keep(part, [list(blocks), weights], entries)
            return blocks
        with self.lock, self._current(), torch.inference_mode(False), torch.no_grad():
            to_host(_unique([list(blocks), weights]), self.device.type == "cuda")
            self._streamed += 1
            streamed = Streamed(self._ring, blocks, self._streamed)
        self._guard(part, entries)
        return streamed

    @contextmanager
    def use(self, part: str) -> Iterator[None]:
        """For a `with`: `part` has its turn on the device. In an inner `with`, another part may have one in between.

        Only one thread at a time has a part in use.
        """
        if not self.offloads:
            yield
            return
        with self.lock:
            self._turns.append(part)
            try:
                self._bring(part)
                yield
            finally:
                self._turns.pop()
                if self._turns:
                    self._bring(self._turns[-1])

    def _bring(self, part: str) -> None:
        """Has a part's weights on the device; it stays there until another part needs the same memory."""
        if part not in self._parts:  # streamed, or not loaded yet
            return
        kept = self._parts[part]
        if kept.arena is None:
            with torch.inference_mode(False), torch.no_grad():
                kept.bind(self._arena(part, kept.size))
        assert kept.arena is not None
        address = kept.arena.data_ptr()
        if self._present.get(address) != part:
            kept.fill()
            self._present[address] = part
            self.copies[part] += 1

    def _arena(self, part: str, size: int) -> Tensor:
        """Device memory for a part of this size; the first one is made for the largest part so far."""
        for arena in self._arenas:
            if arena.numel() >= size:
                return arena
        most = max(kept.size for kept in self._parts.values())
        what = f"making room for the weights of the {part}, {most / 2**30:.1f} GiB"
        with MemoryErrors(self.device, None, what, "", savings(self.device, "nf4", self.mode)):
            self._arenas.append(torch.empty(most, dtype=torch.uint8, device=self.device))
        return self._arenas[-1]

    def _current(self) -> AbstractContextManager[object]:
        """For a `with`: page-locking makes no context on another GPU than the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _guard(self, part: str, entries: Sequence[nn.Module]) -> None:
        def check(*_: object) -> None:
            if self._turns[-1:] != [part]:
                raise RuntimeError(
                    f"the {part} is used outside of its turn; compute inside of `residency.use({part!r})`"
                )

        for module in entries:
            module.register_forward_pre_hook(check)


def _unique(weights: object) -> list[Tensor]:
    """The tensors in `weights`, each once."""
    return list({id(tensor): tensor for tensor in tensors_of(weights)}.values())


class HostEmbedding(nn.Module):
    """An embedding whose table stays on the host; only the rows that are looked up go to the device."""

    def __init__(self, table: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.table, self.device = table, device

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., H], on the device, of token ids [...]."""
        rows: Tensor = self.table(ids.cpu())
        return rows.to(self.device)


class RowsOneByOne(nn.Module):
    """A linear without bias as a sequence of linears for some of its outputs each, which are computed one after the other."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts = parts if isinstance(parts, Streamed | StreamedSlice) else list(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., N] of x [..., K]."""
        return torch.cat([part(x) for part in self._parts], dim=-1)
