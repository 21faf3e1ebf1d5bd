"""A name or path -> local files, without torch: so a wrong name or a hub that does not answer is reported at once.

Names are looked up as: the bundled model, an existing folder, a folder of that name inside the model's folder, beside
it, and last the model hub (huggingface_hub: HF_HOME, HF_TOKEN and offline mode are its own).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.errors import CheckpointError, HubError, first_line, first_sentence
from scale_rae.jsonio import read_json

BUNDLED = {"shapes": Path(__file__).parent / "bundled" / "shapes"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
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
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id ({first_sentence(e)})") from e
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
