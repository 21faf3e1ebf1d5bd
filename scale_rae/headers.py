"""Headers of safetensors files: which tensors a file holds, of what dtype and shape, and where. Imports no torch.

A header is JSON after its length in 8 bytes, and says all about the file but the values, so a file on a hub can be judged by its first
100 kB. A header that contradicts itself or the file's size is refused by the name of the tensor and the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from scale_rae.errors import CheckpointError, first_line
from scale_rae.files import size_text
from scale_rae.jsonio import parse_json, shortened

MOST_HEADER = 16 << 20  # bytes of a header; one with 2,000 tensors has 200 kB
BITS = {  # per value, by the format's name of the dtype
    name: bits
    for bits, names in (
        (64, "F64 I64 U64 C64"),
        (32, "F32 I32 U32"),
        (16, "F16 BF16 I16 U16"),
        (8, "F8_E4M3 F8_E5M2 F8_E8M0 BOOL I8 U8"),
        (6, "F6_E2M3 F6_E3M2"),
        (4, "F4"),
    )
    for name in names.split()
}
NAMES = {  # torch's names of dtypes
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
_FIRST = 4096  # bytes that are read at once with the length
_MOST_DIMENSIONS, _LARGEST = 64, 1 << 62

Read = Callable[[int, int], bytes]
"""`read(start, stop)` returns these bytes of a file, fewer only if it ends before."""


class HeaderTensor(NamedTuple):
    """A tensor as a header declares it: `dtype` in the format's names, and its bytes `start` to `stop` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return "F" in self.dtype


def read_header(read: Read, size: int, where: str) -> dict[str, HeaderTensor]:
    """The tensors that a file of `size` bytes declares; `where` names it in errors. Reads the header and at most 4 kB more.

    Raises:
        CheckpointError: naming the file, the tensor and the field: for a header that is cut short, too large or not JSON, for
            unknown dtypes, for tensors that overlap, leave gaps or do not end with the file, and for tensors whose bytes
            are not those of their shape and dtype.
    """
    first = read(0, min(size, _FIRST))
    if len(first) < 8:
        raise _cut(where, f"{len(first)} bytes")
    length = int.from_bytes(first[:8], "little")
    if length > size - 8:
        raise _cut(where, f"its header says that it has {length:,} bytes, but the file has {size:,}")
    if length > MOST_HEADER:
        raise CheckpointError(f"{where}: its header is larger than {size_text(MOST_HEADER)}; copy or download it again")
    data = first[8 : 8 + length]
    if len(data) < length:
        data += read(8 + len(data), 8 + length)
    if len(data) < length:
        raise _cut(where, "it ends in its header")
    try:
        value = parse_json(data, constants=True)
    except ValueError as e:
        raise _wrong(where, f"not valid JSON: {first_line(e)}") from e
    if not isinstance(value, dict):
        raise _wrong(where, "not a JSON object")
    tensors = {name: _tensor(name, entry, where) for name, entry in value.items() if name != "__metadata__"}
    _check_places(tensors, size - 8 - length, where)
    return tensors


def _cut(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged or cut short ({problem}); copy or download it again")


def _wrong(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: its header is wrong: {problem}; copy or download it again")


def _tensor(name: str, entry: Any, where: str) -> HeaderTensor:
    if not isinstance(entry, dict):
        raise _wrong(where, f"{name} is declared as {shortened(entry)}")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _wrong(where, f"{name}: dtype is {shortened(dtype)}, which safetensors does not have")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _wrong(where, f"{name}: shape is {shortened(shape)}, not a list of whole numbers")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise _wrong(where, f"{name}: data_offsets is {shortened(place)}, not [start, end]")
    values = math.prod(shape)
    if values >= _LARGEST or values * BITS[dtype] != 8 * (place[1] - place[0]):
        needed = (values * BITS[dtype] + 7) // 8
        has = f"data_offsets is {place}, which is {place[1] - place[0]:,} bytes"
        raise _wrong(where, f"{name}: {has}, but shape {shape} of {dtype} takes {needed:,}")
    return HeaderTensor(dtype, tuple(shape), *place)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _LARGEST for n in value)


def _check_places(tensors: dict[str, HeaderTensor], size: int, where: str) -> None:
    """Raises CheckpointError unless the tensors lie one after another in the `size` bytes that follow the header."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        place = f"{name}: data_offsets is [{tensor.start}, {tensor.stop}]"
        if tensor.start < end:
            raise _wrong(where, f"{place}, which overlaps {before}")
        if tensor.start > end:
            raise _wrong(where, f"{place}, which leaves {tensor.start - end:,} bytes before it unused")
        if tensor.stop > size:
            raise _cut(where, f"{place}, but there are only {size:,} bytes after the header")
        end, before = tensor.stop, name
    if end != size:
        raise _wrong(where, f"{size - end:,} bytes at its end belong to no tensor")
