"""Weight files and latent files: reading tensors from safetensors or torch files, and loading them into networks.

The host never holds the weights twice. `hub` finds the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scale_rae.errors import CheckpointError, ConfigError, InputError, OutputError, ScaleRAEError, first_line
from scale_rae.files import check_file, is_lfs_pointer, lfs_error
from scale_rae.headers import read_header
from scale_rae.layout import compare, few
from scale_rae.torch_file import (
    LATENT,
    WEIGHTS,
    DamagedError,
    FileTensor,
    ForbiddenError,
    UnusableError,
    read_torch_file,
)

_MOST_SHARED = 4  # tensors of a torch file may together be this many times its size, since tied weights share values
# A file is opened anew after this many bytes, because mapped pages stay resident until it is closed.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file declares it; a file's tensors lie in the order of their `offset`."""

    file: Path
    shape: tuple[int, ...]
    bytes: int
    offset: int
    dtype: torch.dtype | None  # None: torch has no such dtype
    place: FileTensor | None = None  # only for torch files


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """A context in which a failure to write, safetensors' own error too, is an OutputError that names `target`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as e:
        raise OutputError(f"{target}: cannot be written ({e.strerror or e})") from e
    except SafetensorError as e:  # of save_file, for example on a full disk
        raise OutputError(f"{target}: cannot be written ({first_line(e)})") from e


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors, contiguous and on the CPU, as a safetensors file that other users may read as they may read new files."""
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    file.chmod(mode)  # safetensors makes files that only their owner may read


class TensorReader:
    """Reads tensors piece by piece from safetensors files or files that torch.save wrote.

    Raises:
        CheckpointError: the file is truncated or damaged, holds anything but tensors, or is a pickle that would run code.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open_file: Path | None = None
        self._rows: _Rows = lambda name, start, stop: torch.empty(0)
        self._read_bytes = 0
        for file in files:
            declared = _declared(file)
            if twice := sorted(declared.keys() & self.tensors.keys()):
                raise CheckpointError(f"{file}: tensors that {self.tensors[twice[0]].file.name} has too: {few(twice)}")
            self.tensors |= declared

    def check_depth(self, layers: int, field: str, config: Path) -> None:
        """Raises ConfigError if `layers` is more than the number of tensors: each layer has at least one of its own.

        Without this check, a wrong number costs minutes: thousands of layers are built before missing tensors are noticed.
        """
        if layers > len(self.tensors):
            raise ConfigError(f"{config}: {field} is {layers}, but the weights hold only {len(self.tensors)} tensors")

    def check_floats(self, names: Iterable[str]) -> None:
        """Raises CheckpointError unless the tensors called `names` hold floating-point numbers."""
        for name in names:
            stored = self.tensors[name]
            if stored.dtype is None or not stored.dtype.is_floating_point:
                kind = "numbers of a type that torch does not have" if stored.dtype is None else stored.dtype
                raise CheckpointError(f"{stored.file}: {name} holds {kind}; weights must be floating-point numbers")

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies a tensor into `target`, 64 MiB at a time. `target` has its shape, any dtype, and is on any device."""

        def copy(start: int, part: Tensor) -> None:
            place = target[start : start + len(part)] if part.dim() else target
            place.copy_(part)

        self.read_rows(name, copy)

    def read_rows(self, name: str, take: Callable[[int, Tensor], None]) -> None:
        """Calls `take(start, rows from there)` with a tensor on the CPU as it is stored, 64 MiB at a time.

        A scalar comes in one piece. A piece is valid during the call: if it were kept, its file's pages would stay in memory.
        """
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, rows * _CHUNK_BYTES // max(stored.bytes, 1))
        for start in range(0, rows, step):
            if stored.place is not None:
                take(start, _file_rows(stored.file, stored.place, start, start + step))
            else:
                if stored.file != self._open_file or self._read_bytes >= _CHUNK_BYTES:
                    self._rows = lambda name, start, stop: torch.empty(0)  # frees the old mapping before the next
                    self._rows = _safetensors_rows(stored.file)
                    self._open_file, self._read_bytes = stored.file, 0
                self._read_bytes += stored.bytes * min(step, rows - start) // rows
                take(start, self._rows(name, start, start + step))

    def read(self, name: str) -> Tensor:
        """A copy of the tensor on the CPU, in float32."""
        target = torch.empty(self.tensors[name].shape)
        self.read_into(name, target)
        return target


_Rows = Callable[[str, int, int], Tensor]  # (name, start, stop) -> rows of a tensor, or a whole scalar tensor


def _file_rows(file: Path, tensor: FileTensor, start: int, stop: int) -> Tensor:
    with _weight_errors(file), file.open("rb") as stream:
        return tensor.read(stream, start, stop)


def _safetensors_rows(file: Path) -> _Rows:
    handle = _open_safetensors(file)

    def rows(name: str, start: int, stop: int) -> Tensor:
        part = handle.get_slice(name)
        return part[start:stop] if part.get_shape() else handle.get_tensor(name)

    return rows


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: damaged or cut short ({first_line(e)}); copy or download it again") from e


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}


def _declared(file: Path) -> dict[str, StoredTensor]:
    _check_stored(file, "file", CheckpointError)
    if file.suffix != ".safetensors":
        return _declared_by_torch(file)
    with file.open("rb") as stream:

        def read(start: int, stop: int) -> bytes:
            stream.seek(start)
            return stream.read(stop - start)

        header = read_header(read, file.stat().st_size, str(file))
    _open_safetensors(file)  # what the library finds wrong is reported here, too
    return {
        name: StoredTensor(file, t.shape, t.stop - t.start, t.start, _SAFETENSORS_DTYPES.get(t.dtype))
        for name, t in header.items()
    }


def _check_stored(file: Path, what: str, error: type[ScaleRAEError]) -> None:
    """Raises `error` unless `file` is a regular, readable file and no git-LFS pointer."""
    check_file(file, what, error)
    try:
        with file.open("rb") as stream:
            if is_lfs_pointer(stream.read(200)):
                raise lfs_error(file, error)
    except OSError as e:
        raise error(f"{file}: cannot be read ({e.strerror or e})") from e


@contextmanager
def _errors(file: Path, error: type[ScaleRAEError], damaged: str, code: str, kind: str) -> Iterator[None]:
    """Turns the errors of reading a torch file into `error`, with the file's name and these words."""
    try:
        yield
    except ForbiddenError as e:
        raise error(f"{file}: refused, since loading it could run code ({e}); {code}") from e
    except DamagedError as e:
        raise error(f"{file}: {damaged} ({e})") from e
    except UnusableError as e:
        raise error(f"{file}: holds {e}; {kind}") from e
    except OSError as e:
        raise error(f"{file}: cannot be read ({e.strerror or e})") from e


def _weight_errors(file: Path) -> AbstractContextManager[None]:
    damaged, code, kind = "damaged or not a torch file", "get it as safetensors", "weights must be plain tensors"
    return _errors(file, CheckpointError, damaged, code, kind)


def _declared_by_torch(file: Path) -> dict[str, StoredTensor]:
    with _weight_errors(file):
        value = read_torch_file(file, WEIGHTS)
    for key in ("model", "state_dict"):  # as training scripts save them, beside what they need to go on
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(
        isinstance(n, str) and isinstance(t, FileTensor) for n, t in value.items()
    ):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    if sum(t.bytes for t in value.values()) > _MOST_SHARED * file.stat().st_size:
        raise CheckpointError(f"{file}: damaged (its tensors are more than {_MOST_SHARED} times larger than the file)")
    return {name: StoredTensor(file, t.shape, t.bytes, t.start, t.dtype, t) for name, t in value.items()}


def load_latent(path: Path) -> Tensor:
    """The tensor in a file saved by `torch.save`. `check_latent` checks whether it is a latent of a model.

    Raises:
        InputError: the file is missing, larger than any latent, no torch file, would run code when loaded, or holds no
            plain tensor.
    """
    _check_stored(path, "latent file", InputError)
    damaged, plain = "damaged, or not a file that torch.save wrote", "a latent is a plain tensor"
    with _errors(path, InputError, damaged, plain, plain):
        value = read_torch_file(path, LATENT)
        if isinstance(value, FileTensor):
            with path.open("rb") as file:
                return value.read(file)
    raise InputError(f"{path}: holds a {type(value).__name__}, not a tensor")


def check_latent(latent: Tensor, tokens: int, channels: int) -> Tensor:
    """The latent as [L, C] float32 on the CPU: L = `tokens`, C = `channels`. A leading batch dimension of 1 is removed.

    Raises:
        InputError: wrong type or shape, or values that are not finite.
    """
    expected = [tokens, channels]
    if not isinstance(latent, Tensor):
        raise InputError(f"a latent must be a tensor {expected}, not {type(latent).__name__}")
    if latent.is_nested or latent.layout is not torch.strided or latent.device.type == "meta":
        kind = "nested" if latent.is_nested else "meta" if latent.device.type == "meta" else "sparse"
        raise InputError(f"the latent is a {kind} tensor; a latent is a plain one, with values")
    if latent.dim() == 3 and latent.shape[0] == 1:
        latent = latent[0]
    if list(latent.shape) != expected or not latent.is_floating_point():
        raise InputError(
            f"the latent is {list(latent.shape)} {latent.dtype}; this model's latents are {expected} floats"
        )
    latent = latent.detach().resolve_neg().float().cpu()
    # numpy works on one thread; torch would wake one per core, which takes longer than the check itself after sampling.
    if not np.isfinite(latent.numpy()).all():
        raise InputError("the latent holds values that are not finite (NaN or infinity)")
    return latent


@dataclass(frozen=True)
class RowSink:
    """Where `fill` puts a stored tensor of this shape: `store(start, rows)` takes rows from `start` on, in order.

    Rows are on the CPU, in the dtype in which they are stored, and only valid during the call.
    """

    shape: tuple[int, ...]
    store: Callable[[int, Tensor], None]


def fill(
    modules: dict[str, nn.Module],
    reader: TensorReader,
    dtype: torch.dtype,
    device: torch.device,
    keep_float32: Callable[[str], bool] = lambda name: False,
    ignore: Callable[[str], bool] = lambda name: False,
    progress: Callable[[int, int], None] | None = None,
    sinks: Mapping[str, RowSink] | None = None,
) -> None:
    """Loads the stored tensors into `modules`, which are built on the meta device; keys are prefixes of tensor names.

    Parameters are created in `dtype` on `device`, in float32 if `keep_float32(name)`. Tied parameters share one tensor.
    Buffers are not stored but computed, and only moved. `progress(done, total)` counts bytes as stored. `sinks` take tensors by
    their names instead of parameters.

    Raises:
        CheckpointError: tensors are missing, unexpected or have a wrong shape; lists the first 20 of each kind.
    """
    sinks = sinks or {}
    targets: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    first_name: dict[int, str] = {}
    for prefix, module in modules.items():
        for path, owner in module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                name = prefix + (f"{path}." if path else "") + leaf
                if name in sinks:
                    continue
                # A tied parameter is stored under the first of its names.
                name = first_name.setdefault(id(parameter), name)
                targets.setdefault(name, []).append((owner, leaf, parameter))
    names = {prefix + n for prefix, m in modules.items() for n, _ in m.named_parameters(remove_duplicate=False)}
    tied = names - targets.keys() - sinks.keys()
    stored = {name: t for name, t in reader.tensors.items() if not ignore(name) and name not in tied}
    shapes = {name: tuple(places[0][2].shape) for name, places in targets.items()}
    _check_tensors(shapes | {name: sink.shape for name, sink in sinks.items()}, stored)
    reader.check_floats([*targets, *sinks])

    total, done = sum(t.bytes for t in stored.values()), 0
    for name in sorted([*targets, *sinks], key=lambda n: (stored[n].file, stored[n].offset)):
        if name in sinks:
            reader.read_rows(name, sinks[name].store)
        else:
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
    if text := str(compare(expected, {name: tensor.shape for name, tensor in stored.items()})):
        files = sorted({str(t.file) for t in stored.values()})
        where = files[0] if len(files) == 1 else f"{Path(files[0]).parent}" if files else "the weights"
        raise CheckpointError(f"{where}: {text}")
