"""Reading files that torch.save wrote (.pt, .bin) without pickle or torch.load, so no code in them can run.

The pickle in such a file is interpreted only as a description of tensors: it may name the functions that rebuild plain
tensors, and nothing else. Before values are read, what the pickle declares is compared with the file: records must be stored
uncompressed, and no tensor may be larger than its record. So a small file cannot fill the memory. Both of torch's formats are
supported: the zip archive, and the format before torch 1.6.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scale_rae.errors import first_line
from scale_rae.files import size_text

_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # begin a file before torch 1.6
_MOST_DIMENSIONS = 64  # torch's own limit
_LONGEST_NAME = 200  # characters of a function's or class's full name
_LARGEST_KEY = 1 << 31  # for integer keys of dicts; larger ones can be chosen so that their hashes collide


@dataclass(frozen=True)
class Limits:
    """The largest sizes in bytes that are accepted: of the file, of its pickle, and of the archive's directory."""

    file: int
    pickle: int
    directory: int


# Enough for 20,000 tensors; the largest checkpoint has 2,000.
WEIGHTS = Limits(file=1 << 62, pickle=4 << 20, directory=8 << 20)
LATENT = Limits(file=64 << 20, pickle=1 << 20, directory=64 << 10)


class ForbiddenError(Exception):
    """The file names something that is not part of a plain tensor; loading it could run code."""


class DamagedError(Exception):
    """The file is cut short, contradicts itself, or is not one that torch.save wrote."""


class UnusableError(Exception):
    """The file holds a kind of tensor without plain values: sparse, nested, on the meta device."""


@dataclass
class _Storage:
    """A record of the file: the values of one or more tensors."""

    dtype: torch.dtype
    key: str
    count: int  # of elements
    start: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: elements of `storage`, beginning with element `offset`."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def start(self) -> int:
        """The place in the file of the first value, in bytes."""
        return self.storage.start + self.offset * self.dtype.itemsize

    def read(self, file: BinaryIO, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` - 1 as a tensor; a scalar tensor is read whole."""
        shape, place = self.shape, self.start
        if shape:
            rows = range(shape[0])[first:last]
            shape = (len(rows), *shape[1:])
            place += rows.start * self.stride[0] * self.dtype.itemsize
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=self.dtype)
        data = bytearray(_part(file, place, _span(shape, self.stride) * self.dtype.itemsize))
        return torch.frombuffer(data, dtype=self.dtype).as_strided(shape, self.stride)


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """The number of elements from the first to the last of a tensor that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def read_torch_file(path: Path, limits: Limits) -> Any:
    """The object in the file, with a FileTensor in place of each tensor.

    Raises:
        ForbiddenError, DamagedError, UnusableError: the file cannot be used; the message says why.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size > limits.file:
            raise DamagedError(f"larger than {size_text(limits.file)}")
        file.seek(0)
        is_zip = file.read(4) == _ZIP
        try:
            value, tensors = (_read_zip if is_zip else _read_old)(file, size, limits)
            for tensor in tensors:
                _check(tensor)
        except (ForbiddenError, DamagedError, UnusableError):
            raise
        except Exception as e:  # damaged numbers and texts can raise any error
            raise DamagedError(first_line(e)[:200]) from e
    return value


def _check(tensor: FileTensor) -> None:
    """Raises DamagedError if a tensor exceeds its record, UnusableError if it is expanded."""
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise DamagedError("a tensor's sizes are not whole numbers")
    if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride, strict=True)):
        raise UnusableError("an expanded tensor, which is larger than its values (save tensor.contiguous())")
    if math.prod(tensor.shape):
        end = tensor.offset + max(_span(tensor.shape, tensor.stride), math.prod(tensor.shape))
        if end * tensor.dtype.itemsize > tensor.storage.bytes:
            raise DamagedError("a tensor is larger than its record")


# --- the zip archive --------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, size: int, limits: Limits) -> tuple[Any, list[FileTensor]]:
    records = _records(file, size, limits.directory)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedError("no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    start, length = records[pickles[0]]
    if length > limits.pickle:
        raise DamagedError(f"data.pkl is larger than {size_text(limits.pickle)}")
    order = records.get(f"{root}byteorder")
    if order is not None and _part(file, order[0], min(order[1], 8)) != b"little":
        raise DamagedError("written by a big-endian machine")
    reader = _Pickle(_part(file, start, length))
    value = reader.read()
    for storage in reader.storages.values():
        storage.start, storage.bytes = records[f"{root}data/{storage.key}"]
    return value, reader.tensors


def _records(file: BinaryIO, size: int, most: int) -> dict[str, tuple[int, int]]:
    """Name -> (start, length) in bytes of each record."""
    if _directory_bytes(file, size) > most:
        raise DamagedError(f"the archive's directory is larger than {size_text(most)}")
    records: dict[str, tuple[int, int]] = {}
    total = 0
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise DamagedError(f"{info.filename[:100]!r} is compressed, which torch.save does not do")
        header = _part(file, info.header_offset, 30)
        name, extra = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name + extra
        total += info.file_size
        if not header.startswith(_ZIP) or start + info.file_size > size or total > size or info.filename in records:
            raise DamagedError(f"record {info.filename[:100]!r} does not lie in the file")
        records[info.filename] = (start, info.file_size)
    return records


def _directory_bytes(file: BinaryIO, size: int) -> int:
    """The length in bytes that the archive declares for its directory. zipfile would read that many at once."""
    tail_start = max(0, size - (1 << 16) - 22)
    tail = _part(file, tail_start, size - tail_start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise DamagedError("cut short, or not a torch file")
    length: int = struct.unpack("<L", tail[end + 12 : end + 16])[0]
    if end >= 20 and tail[end - 20 : end].startswith(b"PK\x06\x07"):  # an archive of more than 4 GiB
        place = tail_start + end - 20 - 56
        if struct.unpack("<Q", tail[end - 12 : end - 4])[0] != place:
            raise DamagedError("the archive's directory is not where it says")
        (length,) = struct.unpack("<Q", _part(file, place + 40, 8))
    return length


def _part(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise DamagedError("cut short")
    return data


# --- the format before torch 1.6 --------------------------------------------------------------------------------------


def _read_old(file: BinaryIO, size: int, limits: Limits) -> tuple[Any, list[FileTensor]]:
    """As `_read_zip`. Such a file has five pickles (magic, version, machine, value, keys of storages), then the storages."""
    file.seek(0)
    reader = _Pickle(file.read(limits.pickle))
    if reader.read() != _MAGIC or reader.read() != _PROTOCOL:
        raise DamagedError("not a torch file")
    machine = reader.read()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise DamagedError("written by a big-endian machine")
    value, keys = reader.read(), reader.read()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DamagedError("no list of storages")
    place = reader.place
    for key in keys:
        storage = reader.storages[key]
        (count,) = struct.unpack("<q", _part(file, place, 8))
        storage.start, storage.bytes = place + 8, count * storage.dtype.itemsize
        place = storage.start + storage.bytes
        if count != storage.count or count < 0 or place > size:
            raise DamagedError("cut short")
    return value, reader.tensors


# --- pickles ----------------------------------------------------------------------------------------------------------

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_UNTYPED = "torch.storage.UntypedStorage"
_NAMED_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", *("float32", "float16", "bfloat16"))
}
_UNUSABLE = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
}


@dataclass(frozen=True)
class _Global:
    """A function, class or dtype that the pickle names."""

    name: str


class _Pickle:
    """Interprets the operations that torch.save writes. Makes only numbers, text, lists, tuples, dicts and FileTensors."""

    def __init__(self, data: bytes) -> None:
        self.place = 0  # of the next byte to read
        self.storages: dict[str, _Storage] = {}
        self.tensors: list[FileTensor] = []
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The next value."""
        self._stack, self._marks, self._memo = [], [], {}
        while True:
            code = self._take(1)
            if code == b".":
                return self._stack.pop()
            run = _OPERATIONS.get(code)
            if run is None:
                raise DamagedError(f"operation {code!r} in its pickle")
            run(self)

    def _take(self, count: int) -> bytes:
        data = self._data[self.place : self.place + count]
        if len(data) != count:
            raise DamagedError("its pickle is cut short or too large")
        self.place += count
        return data

    def _number(self, kind: str) -> int:
        value: int = struct.unpack(kind, self._take(struct.calcsize(kind)))[0]
        return value

    def _line(self) -> str:
        end = self._data.index(b"\n", self.place)
        text = self._data[self.place : end].decode()
        self.place = end + 1
        return text

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        """Pops all that was pushed since the last mark."""
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _tuple(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
            raise DamagedError("a name in its pickle")
        full = f"{module}.{name}"
        if full in _UNUSABLE:
            raise UnusableError(_UNUSABLE[full])
        is_storage = module == "torch" and name in _DTYPES
        if not (is_storage or full in _NAMED_DTYPES or full in _FUNCTIONS or full == _UNTYPED):
            raise ForbiddenError(full)
        self._push(_Global(name if is_storage else full))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or function.name not in _FUNCTIONS or not isinstance(arguments, tuple):
            raise DamagedError("a call in its pickle")
        self._push(_FUNCTIONS[function.name](self, *arguments))

    def _state(self) -> None:
        """Drops the attributes of a dict of weights (the versions of its modules)."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise DamagedError("an attribute in its pickle")

    def _storage(self) -> None:
        kind, type_, key, _, count, *view = self._stack.pop()
        dtype = torch.uint8 if type_.name == _UNTYPED else _DTYPES[type_.name]
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or any(v is not None for v in view):
            raise DamagedError("a storage in its pickle")
        storage = self.storages.setdefault(key, _Storage(dtype, key, count))
        self._push(storage)

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise DamagedError("items in its pickle")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _LARGEST_KEY):
                raise DamagedError("a key in its pickle that is neither text nor a small number")
            target[key] = value

    def _set_one(self) -> None:
        pair = self._stack[-2:]
        del self._stack[-2:]
        self._set(pair)

    def _append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise DamagedError("items in its pickle")
        self._stack[-1].extend(values)

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
        dtype: torch.dtype | None = None,
    ) -> FileTensor:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise DamagedError("a tensor in its pickle")
        if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
            raise DamagedError("a tensor's sizes and strides")
        if metadata:
            raise UnusableError(
                "a tensor with its negative or conjugate bit set (save tensor.resolve_neg().resolve_conj())"
            )
        tensor = FileTensor(storage, dtype or storage.dtype, offset, size, stride)
        self.tensors.append(tensor)
        return tensor

    def _tensor_of_dtype(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> FileTensor:
        return self._tensor(storage, offset, size, stride, metadata=metadata, dtype=_NAMED_DTYPES[dtype.name])

    def _parameter(self, tensor: Any, *rest: Any) -> Any:
        if not isinstance(tensor, FileTensor):
            raise DamagedError("a parameter in its pickle")
        return tensor

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        if not isinstance(pairs, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
            raise DamagedError("a dict in its pickle")
        value: dict[Any, Any] = {}
        self._push(value)
        self._set([part for pair in pairs for part in pair])
        self._stack.pop()
        return value

    def _size(self, size: Any) -> Any:
        return size


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _Pickle._tensor,
    "torch._utils._rebuild_tensor_v2": _Pickle._tensor,
    "torch._utils._rebuild_tensor_v3": _Pickle._tensor_of_dtype,
    "torch._utils._rebuild_parameter": _Pickle._parameter,
    "torch._utils._rebuild_parameter_with_state": _Pickle._parameter,
    "torch.Size": _Pickle._size,
    "collections.OrderedDict": _Pickle._dict,
}

_OPERATIONS: dict[bytes, Callable[[_Pickle], Any]] = {
    b"\x80": lambda p: p._take(1),  # PROTO
    b"\x95": lambda p: p._take(8),  # FRAME
    b"}": lambda p: p._push({}),
    b"]": lambda p: p._push([]),
    b")": lambda p: p._push(()),
    b"(": lambda p: p._marks.append(len(p._stack)),
    b"t": lambda p: p._push(tuple(p._marked())),
    b"\x85": lambda p: p._tuple(1),
    b"\x86": lambda p: p._tuple(2),
    b"\x87": lambda p: p._tuple(3),
    b"N": lambda p: p._push(None),
    b"\x88": lambda p: p._push(True),
    b"\x89": lambda p: p._push(False),
    b"K": lambda p: p._push(p._number("<B")),
    b"M": lambda p: p._push(p._number("<H")),
    b"J": lambda p: p._push(p._number("<i")),
    b"\x8a": lambda p: p._push(int.from_bytes(p._take(p._number("<B")), "little", signed=True)),
    b"G": lambda p: p._push(struct.unpack(">d", p._take(8))[0]),
    b"X": lambda p: p._push(p._take(p._number("<I")).decode()),
    b"\x8c": lambda p: p._push(p._take(p._number("<B")).decode()),
    b"U": lambda p: p._push(p._take(p._number("<B")).decode()),  # a str of Python 2
    b"T": lambda p: p._push(p._take(p._number("<I")).decode()),
    b"q": lambda p: p._remember(p._number("<B")),
    b"r": lambda p: p._remember(p._number("<I")),
    b"\x94": lambda p: p._remember(len(p._memo)),
    b"h": lambda p: p._push(p._memo[p._number("<B")]),
    b"j": lambda p: p._push(p._memo[p._number("<I")]),
    b"c": lambda p: p._name(p._line(), p._line()),
    b"\x93": lambda p: p._name(p._stack.pop(-2), p._stack.pop()),
    b"R": _Pickle._call,
    b"b": _Pickle._state,
    b"Q": _Pickle._storage,
    b"s": _Pickle._set_one,
    b"u": lambda p: p._set(p._marked()),
    b"a": lambda p: p._append([p._stack.pop()]),
    b"e": lambda p: p._append(p._marked()),
}
"""The operations in torch.save's pickles. Any other operation is refused."""
