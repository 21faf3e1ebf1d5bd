"""A name or path -> verified local files -> tensors in a model, without ever holding the weights twice.

Names are looked up as: the bundled model, an existing folder, a folder of that name inside the model's folder, beside
it, and last the model hub (huggingface_hub: HF_HOME, HF_TOKEN and offline mode are its own).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_rae.config import read_json
from scale_rae.errors import CheckpointError, HubError

BUNDLED = {"shapes": Path(__file__).parent / "bundled" / "shapes"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_REOPEN_BYTES = 256 << 20  # mapped pages stay resident while a file is open, so it is closed this often


@dataclass(frozen=True)
class Source:
    """Where files came from: a local folder and, from the hub, the commit they are of."""

    name: str
    folder: Path
    revision: str | None = None

    def identity(self) -> dict[str, str]:
        """What pins these files: the hub's commit, or a SHA-256 of each file."""
        if self.revision:
            return {"revision": self.revision}
        files = sorted(p for p in self.folder.iterdir() if p.suffix in (*WEIGHT_SUFFIXES, ".json") and p.is_file())
        return {p.name: _sha256(p) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(name: str, what: str, model_folder: Path | None = None, revision: str | None = None) -> Source:
    """Files of the `what` ("model", "encoder", "decoder") called `name`; see the module docstring for the order.

    Raises:
        CheckpointError: when there is no such folder and the name cannot be a hub id.
        HubError: when the hub cannot be reached or refuses, with what to do.
    """
    if model_folder is None and name in BUNDLED:
        return Source(name, BUNDLED[name])
    places = [Path(name).expanduser()]
    if model_folder is not None:
        places += [model_folder / name, model_folder.parent / name]
    for place in places:
        if place.is_dir():
            return Source(name, place)
        if place.is_file():
            raise CheckpointError(f"{place}: is a file; the {what} must be a folder or a hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        bundled = ' (the bundled model is "shapes")' if what == "model" else ""
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id (owner/name){bundled}")
    return _download(name, what, revision)


def _download(name: str, what: str, revision: str | None) -> Source:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = f"use a local folder{', or the bundled model: --model-path shapes' if what == 'model' else ''}"
    where = f"{what} {name}" + (f" at revision {revision}" if revision else "")
    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=["*.onnx", "*.gguf", "*.msgpack", "*.h5"])
    except GatedRepoError as e:
        raise HubError(f"{where}: the hub asks for permission; accept its terms there and set HF_TOKEN") from e
    except RepositoryNotFoundError as e:
        raise HubError(
            f"{where}: no such folder here, and the hub has no such repository (or HF_TOKEN is missing)"
        ) from e
    except RevisionNotFoundError as e:
        raise HubError(f"{where}: the hub's repository has no such revision") from e
    except LocalEntryNotFoundError as e:
        raise HubError(
            f"{where}: not downloaded yet, and the hub cannot be reached; check the network, or {instead}"
        ) from e
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "no"
        raise HubError(f"{where}: the hub answered with status {status}; try again, or {instead}") from e
    except (httpx.HTTPError, OSError) as e:
        reason = str(e) or type(e).__name__
        raise HubError(
            f"{where}: the download broke off ({reason}); run again to go on from there, or {instead}"
        ) from e
    return Source(name, Path(folder), Path(folder).name)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file declares it."""

    file: Path
    shape: tuple[int, ...]
    bytes: int


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors if there are any, else .bin.

    Raises:
        CheckpointError: when there are none, or a shard that the index or the file names promise is missing.
    """
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map must map tensor names to files")
            files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        else:
            files = sorted(folder.glob(f"{stem}*{suffix}"))
        if files:
            missing = [str(f) for f in {*files, *_promised(files)} if not f.is_file()]
            if missing:
                raise CheckpointError(f"{folder}: missing shards {sorted(missing)}; copy or download them again")
            return files
    raise CheckpointError(f"{folder}: no weights (model*.safetensors or pytorch_model*.bin)")


def _promised(files: Iterable[Path]) -> Iterator[Path]:
    """The shards that names like model-00001-of-00003 say exist."""
    for file in files:
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", file.name):
            yield from (
                file.with_name(f"{match[1]}{i:05}-of-{match[3]}{match[4]}") for i in range(1, int(match[3]) + 1)
            )


class TensorReader:
    """Reads tensors one at a time from safetensors files or torch pickles (weights only, memory mapped).

    Raises:
        CheckpointError: naming the file, when it is truncated, damaged, holds other things than tensors, or is a
            pickle that would run code.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open_file: Path | None = None
        self._get: Callable[[str], Tensor] = lambda name: torch.empty(0)
        self._read_bytes = 0
        for file in files:
            self.tensors |= _declared(file)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the dtype it is stored in; valid until the next read."""
        stored = self.tensors[name]
        if stored.file != self._open_file or self._read_bytes > _REOPEN_BYTES:
            self._get = _opened(stored.file)
            self._open_file, self._read_bytes = stored.file, 0
        self._read_bytes += stored.bytes
        return self._get(name)


def _opened(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            handle: Any = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: damaged or cut short ({e}); copy or download it again") from e
        return handle.get_tensor  # type: ignore[no-any-return]
    return _load_pickle(file).__getitem__


def _declared(file: Path) -> dict[str, StoredTensor]:
    if file.suffix != ".safetensors":
        tensors = _load_pickle(file)
        return {n: StoredTensor(file, tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()}
    _opened(file)  # the library checks the whole layout against the file's length
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {
        name: StoredTensor(file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _load_pickle(file: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as e:
        raise CheckpointError(f"{file}: refused, since loading it would run code ({_first_sentence(e)})") from e
    except FileNotFoundError as e:
        raise CheckpointError(f"{file}: no such file") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{file}: damaged or not a torch file ({_first_sentence(e)})") from e
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    return value


def _first_sentence(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].split(". ", 1)[0]


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
    for name in sorted(targets, key=lambda n: (stored[n].file, n)):
        tensor = reader.read(name)
        copy = tensor.to(device, torch.float32 if keep_float32(name) else dtype, copy=True)
        parameter = nn.Parameter(copy, requires_grad=False)
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
