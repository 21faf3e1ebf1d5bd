"""Local weight files -> tensors in a model, without ever holding the weights twice. `hub` finds the files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from scale_rae.errors import CheckpointError, first_line, first_sentence

_CHUNK_BYTES = 64 << 20  # mapped pages stay resident while a file is open, so it is closed this often


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file declares it; `offset` orders the tensors of a file as they lie in it."""

    file: Path
    shape: tuple[int, ...]
    bytes: int
    offset: int


class TensorReader:
    """Reads tensors piece by piece from safetensors files or torch pickles (weights only, memory mapped).

    Raises:
        CheckpointError: naming the file, when it is truncated, damaged, holds other things than tensors, or is a
            pickle that would run code.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open_file: Path | None = None
        self._rows: _Rows = lambda name, start, stop: torch.empty(0)
        self._read_bytes = 0
        for file in files:
            declared = _declared(file)
            if twice := sorted(declared.keys() & self.tensors.keys()):
                raise CheckpointError(f"{file}: tensors that {self.tensors[twice[0]].file.name} has too: {_few(twice)}")
            self.tensors |= declared

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies a tensor into one of its shape, of any dtype and on any device, 64 MB at a time."""
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, rows * _CHUNK_BYTES // max(stored.bytes, 1))
        for start in range(0, rows, step):
            if stored.file != self._open_file or (self._read_bytes >= _CHUNK_BYTES and _is_mapped(stored.file)):
                self._rows = lambda name, start, stop: torch.empty(0)  # lets go of the mapping before the next
                self._rows = _opened(stored.file)
                self._open_file, self._read_bytes = stored.file, 0
            part = target[start : start + step] if stored.shape else target
            part.copy_(self._rows(name, start, start + step))
            self._read_bytes += stored.bytes * min(step, rows - start) // rows

    def read(self, name: str) -> Tensor:
        """A copy of the tensor on the CPU, in float32."""
        target = torch.empty(self.tensors[name].shape)
        self.read_into(name, target)
        return target


_Rows = Callable[[str, int, int], Tensor]  # rows start … stop of a tensor, or the whole of one without dimensions


def _opened(file: Path) -> _Rows:
    if file.suffix == ".safetensors":
        handle = _open_safetensors(file)

        def rows(name: str, start: int, stop: int) -> Tensor:
            part = handle.get_slice(name)
            return part[start:stop] if part.get_shape() else handle.get_tensor(name)  # type: ignore[no-any-return]

        return rows
    tensors = _load_pickle(file)
    return lambda name, start, stop: tensors[name][start:stop] if tensors[name].dim() else tensors[name]


def _is_mapped(file: Path) -> bool:
    return file.suffix == ".safetensors" or is_zipfile(file)


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: damaged or cut short ({first_line(e)}); copy or download it again") from e


def _declared(file: Path) -> dict[str, StoredTensor]:
    if file.suffix != ".safetensors":
        tensors = _load_pickle(file)
        return {
            name: StoredTensor(file, tuple(t.shape), t.numel() * t.element_size(), t.data_ptr())
            for name, t in tensors.items()
        }
    _open_safetensors(file)  # the library checks the whole layout against the file's length
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    declared = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            declared[name] = StoredTensor(file, tuple(entry["shape"]), stop - start, start)
    return declared


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, memory mapped; of one in torch's format before 1.6, read whole."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except FileNotFoundError as e:
        raise CheckpointError(f"{file}: no such file") from e
    except UnpicklingError as e:
        if forbidden := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(e)):
            name = forbidden[1] or forbidden[2]
            raise CheckpointError(
                f"{file}: refused, since loading it could run code ({name}); get it as safetensors"
            ) from e
        raise CheckpointError(f"{file}: damaged or not a torch file") from e
    except Exception as e:  # a damaged pickle can fail inside the unpickler in any way
        raise CheckpointError(f"{file}: damaged or not a torch file ({first_sentence(e)})") from e
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    if not isinstance(value, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in value.items()):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    return value


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _few(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def fill(
    modules: dict[str, nn.Module],
    reader: TensorReader,
    dtype: torch.dtype,
    device: torch.device,
    keep_float32: Callable[[str], bool] = lambda name: False,
    ignore: Callable[[str], bool] = lambda name: False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter of `modules` (built on the meta device; keys are name prefixes) its stored tensor.

    Parameters arrive in `dtype` on `device` (float32 where `keep_float32(name)`); tied parameters share one tensor;
    buffers, which are computed, are moved. `progress(done, total)` counts bytes as stored.

    Raises:
        CheckpointError: listing every missing, unexpected and wrongly shaped tensor.
    """
    targets: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    first_name: dict[int, str] = {}
    for prefix, module in modules.items():
        for path, owner in module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                name = prefix + (f"{path}." if path else "") + leaf
                # A tied parameter is stored under the first of its names.
                name = first_name.setdefault(id(parameter), name)
                targets.setdefault(name, []).append((owner, leaf, parameter))
    tied = {prefix + n for prefix, m in modules.items() for n, _ in m.named_parameters(remove_duplicate=False)} - set(
        targets
    )
    stored = {name: t for name, t in reader.tensors.items() if not ignore(name) and name not in tied}
    _check_tensors({n: tuple(places[0][2].shape) for n, places in targets.items()}, stored)

    total, done = sum(t.bytes for t in stored.values()), 0
    for name in sorted(targets, key=lambda n: (stored[n].file, stored[n].offset)):
        kept = torch.float32 if keep_float32(name) else dtype
        tensor = torch.empty(stored[name].shape, dtype=kept, device=device)
        reader.read_into(name, tensor)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, leaf, _ in targets[name]:
            setattr(owner, leaf, parameter)
        done += stored[name].bytes
        if progress:
            progress(done, total)
    for module in modules.values():
        module.requires_grad_(False).eval()
        for owner in module.modules():
            for leaf, buffer in owner.named_buffers(recurse=False):
                owner._buffers[leaf] = buffer.to(device)


def _check_tensors(expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor]) -> None:
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    wrong = [
        f"{name} is {list(stored[name].shape)}, should be {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name].shape != shape
    ]
    if missing or unexpected or wrong:
        files = sorted({str(t.file) for t in stored.values()})
        where = files[0] if len(files) == 1 else f"{Path(files[0]).parent}" if files else "the weights"
        parts = [("missing tensors", missing), ("unexpected tensors", unexpected), ("wrong shapes", wrong)]
        raise CheckpointError(f"{where}: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names))
