"""A name or path -> verified local files -> tensors in a model, without ever holding the weights twice.

Names are looked up as: the bundled model, an existing folder, a folder of that name inside the model's folder, beside
it, and last the model hub (huggingface_hub: HF_HOME, HF_TOKEN and offline mode are its own).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from scale_rae.errors import CheckpointError, HubError, first_line
from scale_rae.jsonio import read_json

BUNDLED = {"shapes": Path(__file__).parent / "bundled" / "shapes"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_CHUNK_BYTES = 64 << 20  # mapped pages stay resident while a file is open, so it is closed this often
_HUB_TIMEOUT = 10.0  # seconds for the hub to say what a repository holds
_DECODER_WEIGHTS = "model.pt"
_SMALL_FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)


@dataclass(frozen=True)
class Source:
    """Where files came from: a local folder and, from the hub, the commit they are of."""

    name: str
    folder: Path
    revision: str | None = None
    own: bool = False  # a part found inside or beside the model's folder, and so found again wherever that goes

    @property
    def address(self) -> str:
        """A name that finds the files again from any folder (a part that lies with its model: given the model)."""
        by_name = self.own or self.revision is not None or self.name in BUNDLED
        return self.name if by_name else str(self.folder.absolute())

    def identity(self) -> dict[str, str]:
        """What pins these files: the hub's commit, or a SHA-256 of each file."""
        if self.revision:
            return {"revision": self.revision}
        files = sorted(
            p for p in self.folder.iterdir() if p.suffix in (*WEIGHT_SUFFIXES, ".json", ".txt") and p.is_file()
        )
        return {p.name: _sha256(p) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(
    name: str,
    what: str,
    model_folder: Path | None = None,
    revision: str | None = None,
    files: tuple[str, ...] = (),
) -> Source:
    """Files of the `what` ("model", "encoder", "decoder", "reward", …) called `name`; see the module docstring for the order.

    `files` are the only ones to fetch from the hub, where that isn't a config and weights; the first must be there.

    Raises:
        CheckpointError: when there is no such folder and the name cannot be a hub id.
        HubError: when the hub cannot be reached or refuses, with what to do.
    """
    if model_folder is None and name in BUNDLED:
        return Source(name, BUNDLED[name])
    places = [(Path(os.path.expanduser(name)), False)]  # noqa: PTH111 - pathlib's fails where there is no such user
    if model_folder is not None:
        places += [(model_folder / name, True), (model_folder.parent / name, True)]
    for place, own in places if name else ():
        if os.path.isdir(place):  # noqa: PTH112 - pathlib's fails for names no file system takes
            return Source(name, place, own=own)
        if os.path.isfile(place):  # noqa: PTH113
            raise CheckpointError(f"{place}: is a file; the {what} must be a folder or a hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        bundled = '; the bundled model is "shapes"' if what == "model" else ""
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id like owner/name{bundled}")
    return _download(name, what, revision, files)


def _download(name: str, what: str, revision: str | None, wanted: tuple[str, ...]) -> Source:
    """The repository's files that a `what` needs, from the hub or, when it cannot be asked, from its cache.

    A cut connection is taken up where it broke, several times, by huggingface_hub itself (Range requests). When that
    fails too, the next run keeps the files that were finished and starts the others anew: the library puts
    partial files away.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """The library's progress bar, on a terminal only."""

        def __init__(self, *args: Any, **options: Any) -> None:
            if not sys.stderr.isatty():
                options["disable"] = True
            super().__init__(*args, **options)

    # httpx's in huggingface_hub 1, httpx2's in 2: their common base is found where the library's own errors show it.
    http_error = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    instead = f"use a local folder{', or the bundled model: --model-path shapes' if what == 'model' else ''}"
    where = f"{what} {name}" + (f" at revision {revision}" if revision else "")
    try:
        listed = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT).siblings or []
    except ValueError as e:
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id ({_first_sentence(e)})") from e
    except RevisionNotFoundError as e:
        raise HubError(f"{where}: the hub's repository has no such revision") from e
    except (http_error, OSError) as e:
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, local_files_only=True, allow_patterns=wanted[:1] or _config_of(what)
                )
            )
        except LocalEntryNotFoundError:
            raise HubError(f"{where}: {_hub_problem(e, instead)}") from e
        try:
            if wanted or what == "decoder":
                _existing(folder / (wanted[0] if wanted else _DECODER_WEIGHTS))
            else:
                weight_files(vae_folder(folder) if what == "VAE" else folder)
        except CheckpointError as incomplete:
            raise HubError(f"{where}: only part of it was downloaded ({incomplete}); {_hub_problem(e, instead)}") from e
        return Source(name, folder, folder.name)

    names = [file.rfilename for file in listed]
    files = [name for name in names if name in wanted] if wanted else _needed(names, what)
    if not files or (wanted and wanted[0] not in files):
        content = wanted[0] if wanted else "config.json and weights"
        raise HubError(f"{where}: the hub's repository holds no {what} ({content}); {instead}")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, tqdm_class=Bar))
    except (http_error, OSError, RuntimeError) as e:  # RuntimeError: hf_xet's
        raise HubError(f"{where}: {_hub_problem(e, instead, broke_off=True)}") from e
    return Source(name, folder, folder.name)


def _config_of(what: str) -> str:
    return "*config.json" if what == "VAE" else "config.json"


def vae_folder(folder: Path) -> Path:
    """Where in a folder a VAE is: there, or in `vae`, as whole image models have it."""
    return folder / "vae" if not (folder / "config.json").is_file() and (folder / "vae").is_dir() else folder


def _hub_problem(error: BaseException, instead: str, broke_off: bool = False) -> str:
    """What went wrong between us and the hub, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error.__cause__, (HfHubHTTPError, OfflineModeIsEnabled)) and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # the library's "not in the cache either" hides what the hub said
    if isinstance(error, GatedRepoError):
        return "the hub asks for permission; accept its terms there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here, and the hub has no such repository (or it is private: set HF_TOKEN)"
    if isinstance(error, OfflineModeIsEnabled):
        return f"not downloaded yet, and HF_HUB_OFFLINE forbids it; unset that, or {instead}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refused with status {status}; check HF_TOKEN, or {instead}"
        return f"the hub answered with status {status}; try again later, or {instead}"
    reason = first_line(error)
    if broke_off:
        return f"the download broke off ({reason}); run again to go on from there, or {instead}"
    return f"not downloaded yet, and the hub cannot be reached ({reason}); check the network, or {instead}"


def _needed(names: list[str], what: str) -> list[str]:
    """Which of a repository's files a `what` needs: one format of weights, not every one that is there.

    Parts that live inside a model's repository (an encoder with its preprocessor, a decoder) come along.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    own = folders.pop("", [])
    if what == "decoder":
        return [n for n in own if n in ("config.json", _DECODER_WEIGHTS)]
    if what == "VAE" and "vae" in folders:  # of a whole image model
        return [f"vae/{n}" for n in ("config.json", *_choose_weights(folders["vae"])) if n in folders["vae"]]
    needed = [n for n in own if n in _SMALL_FILES] + _choose_weights(own)
    if what == "model":
        for folder, files in folders.items():
            wanted = [n for n in files if n in _SMALL_FILES]
            if folder.rpartition("/")[2] == "decoder":
                wanted += [n for n in files if n == _DECODER_WEIGHTS]
            elif "config.json" in files and "preprocessor_config.json" in files:
                wanted += _choose_weights(files)
            else:
                continue
            needed += [f"{folder}/{n}" for n in wanted]
    return needed


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file declares it; `offset` orders the tensors of a file as they lie in it."""

    file: Path
    shape: tuple[int, ...]
    bytes: int
    offset: int


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors if there are any, else .bin; one file if there is one, else its shards.

    Raises:
        CheckpointError: when there are none, or a shard that the index or the file names promise is missing.
    """
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    chosen = _choose_weights(names)
    if not chosen:
        raise CheckpointError(f"{folder}: no weights (model*.safetensors or pytorch_model*.bin)")
    promised = set()
    for name in chosen:
        if name.endswith(".index.json"):
            promised |= _indexed(folder / name)
        else:
            promised |= {name, *_numbered(name)}
    missing = sorted(name for name in promised if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{folder}: missing shards {', '.join(missing)}; copy or download them again")
    return [folder / name for name in sorted(promised)]


def _choose_weights(names: Iterable[str]) -> list[str]:
    """The files of one set of weights among file names: a whole file, else an index and shards."""
    present = sorted(names)
    for stem, suffix in (
        ("model", "safetensors"),
        ("pytorch_model", "bin"),
        ("diffusion_pytorch_model", "safetensors"),
    ):
        if f"{stem}.{suffix}" in present:
            return [f"{stem}.{suffix}"]
        shards = [n for n in present if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{suffix}", n)]
        index = f"{stem}.{suffix}.index.json"
        if index in present or shards:
            return [index, *shards] if index in present else shards
    return []


def _indexed(index: Path) -> set[str]:
    """The shards that an index names, each beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files")
    files: set[str] = set(weight_map.values())
    for name in sorted(files):
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
            raise CheckpointError(f"{index}: weight_map names {name!r}; shards must be .safetensors or .bin beside it")
    return files


def _numbered(name: str) -> Iterator[str]:
    """The shards that a name like model-00001-of-00003 says exist."""
    if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", name):
        yield from (f"{match[1]}{i:05}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return file


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
        raise CheckpointError(f"{file}: damaged or not a torch file ({_first_sentence(e)})") from e
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    if not isinstance(value, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in value.items()):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    return value


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _first_sentence(error: BaseException) -> str:
    return first_line(error).split(". ", 1)[0]


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
