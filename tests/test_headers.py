"""Headers of safetensors files: what they declare, and every lie that they can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scale_rae.errors import CheckpointError
from scale_rae.headers import HeaderTensor, read_header

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def header_of(data: bytes) -> dict[str, HeaderTensor]:
    return read_header(lambda start, stop: data[start:stop], len(data), "x.safetensors")


def file_of(header: Any, values: int = 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(values)


def test_what_a_file_declares(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "scalar": torch.zeros(()),
        "codes": torch.zeros(0, 7).int(),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    header = header_of((tmp_path / "model.safetensors").read_bytes())
    assert {name: t.shape for name, t in header.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {name: t.dtype for name, t in header.items()} == {"weight": "BF16", "scalar": "F32", "codes": "I32"}
    assert [name for name, t in header.items() if not t.is_float] == ["codes"]


def test_only_the_header_is_read() -> None:
    names = {f"tensor.{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(1000)}
    data = file_of(names, 4000)
    size, read = 8 + int.from_bytes(data[:8], "little"), []

    def part(start: int, stop: int) -> bytes:
        read.append(range(start, stop))
        return data[start:stop]

    assert len(read_header(part, len(data), "x")) == 1000
    assert [(r.start, r.stop) for r in read] == [(0, 4096), (4096, size)]


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


LIES = {
    "beyond the end": (file_of(GOOD, 30), r"b: data_offsets is \[24, 32\], but there are only 30 bytes"),
    "unused at the end": (file_of(GOOD, 40), "8 bytes at its end belong to no tensor"),
    "overlap": (file_of(changed("b", data_offsets=[16, 24]), 24), r"b: data_offsets is \[16, 24\], which overlaps a"),
    "gap": (file_of(changed("b", data_offsets=[28, 36]), 36), "which leaves 4 bytes before it unused"),
    "too few bytes": (
        file_of(changed("a", shape=[3, 3])),
        r"a: data_offsets is \[0, 24\], which is 24 bytes, .* takes 36",
    ),
    "another dtype": (file_of(changed("a", dtype="F64")), r"a: data_offsets .* shape \[2, 3\] of F64 takes 48"),
    "huge": (file_of(changed("a", shape=[2**61, 2**61])), "a: data_offsets is"),
    "negative": (file_of(changed("a", shape=[-2, -3])), r"a: shape is \[-2, -3\]"),
    "true": (file_of(changed("a", shape=[True, 6])), r"a: shape is \[True, 6\]"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 32]}}), "a: shape is None"),
    "dtype unknown": (file_of(changed("a", dtype="F31")), "a: dtype is 'F31'"),
    "dtype of another kind": (file_of(changed("a", dtype=[])), r"a: dtype is \[\]"),
    "offsets backwards": (file_of(changed("a", data_offsets=[24, 0])), r"a: data_offsets is \[24, 0\], not"),
    "offsets of one": (file_of(changed("a", data_offsets=[0])), r"a: data_offsets is \[0\], not"),
    "entry of another kind": (file_of({"a": 3}), "a is declared as 3"),
    "not JSON": (file_of(b"{]"), "not valid JSON"),
    "not an object": (file_of([1]), "not a JSON object"),
    "header beyond the file": (
        (10**9).to_bytes(8, "little") + b"{}",
        "says that it has 1,000,000,000 bytes, but the file has 10",
    ),
    "cut short": (b"\1\2\3", r"3 bytes\)"),
    "empty": (b"", r"0 bytes\)"),
}
MAY_BE_CUT = ("beyond the end", "header beyond the file", "cut short", "empty")


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str) -> None:
    data, message = LIES[lie]
    damage = r"damaged or cut short \(" if lie in MAY_BE_CUT else "its header is wrong: "
    with pytest.raises(
        CheckpointError, match=rf"^x\.safetensors: {damage}.*{message}.*; copy or download it again$"
    ) as caught:
        header_of(data)
    assert "\n" not in str(caught.value)


def test_a_header_larger_than_any() -> None:
    with pytest.raises(CheckpointError, match="its header is larger than 16 MiB"):
        read_header(lambda start, stop: (20 << 20).to_bytes(8, "little"), 1 << 30, "x")


def test_a_hub_that_ends_in_the_header() -> None:
    data = file_of(
        {f"tensor.{i}": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]} for i in range(99)}, 396
    )
    with pytest.raises(CheckpointError, match="ends in its header"):
        read_header(lambda start, stop: data[start : min(stop, 4096)], len(data), "x")
