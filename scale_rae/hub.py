"""Finding and downloading the files of models, encoders, decoders and rewards, by name or path.

A name is looked up in this order: the bundled model, an existing folder, a folder of that name inside the model's folder, then
beside it, then the model hub. HF_HOME, HF_TOKEN and offline mode are huggingface_hub's. This module does not import torch, so a
wrong name or an unreachable hub is reported at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale_rae.errors import CheckpointError, HubError, ScaleRAEError, first_line, first_sentence
from scale_rae.files import check_name
from scale_rae.jsonio import Fields, read_json
from scale_rae.student import parse_student

BUNDLED = {name: Path(__file__).parent / "bundled" / name for name in ("shapes", "shapes-4")}
HUB_TIMEOUT = 10.0  # seconds for the hub to list a repository's files
DECODER_WEIGHTS = "model.pt"
TRAINED = "model"  # the folder in a training's folder for the checkpoint that `train --full` writes
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA in PEFT's format
_SMALL_FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
    *ADAPTER_FILES,
)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")  # each also in lower case
_log = logging.getLogger("scale_rae")


@dataclass(frozen=True)
class Source:
    """Where files came from: a local folder and, if they came from the hub, their commit."""

    name: str
    folder: Path
    revision: str | None = None
    own: bool = False  # found inside or beside the model's folder, so its name finds it after the folder moved
    what: str = "model"  # decides which files are loaded, unless `files` names them
    files: tuple[str, ...] = ()
    student: Path | None = None  # a student's folder; `folder` is its base model's then

    @property
    def address(self) -> str:
        """A name that finds the files again from any working folder; for `own` parts, given the model."""
        by_name = self.own or self.revision is not None or self.name in BUNDLED
        return self.name if by_name else str((self.student or self.folder).absolute())

    @property
    def config_folder(self) -> Path:
        """The folder whose config.json describes a model: the student's own, for a student."""
        return self.student or self.folder


def find(
    name: str,
    what: str,
    model_folder: Path | None = None,
    revision: str | None = None,
    files: tuple[str, ...] = (),
) -> Source:
    """The files of the `what` ("model", "encoder", "decoder", "reward", …) called `name`; the module says where it looks.

    From the hub, config and weights are fetched, or `files` if given; the first of `files` must exist.

    Raises:
        CheckpointError: there is no such folder, and the name cannot be a hub id; or it has what a training wrote, but no model.
        HubError: the hub cannot be reached or refuses; the message says what to do.
    """
    source = find_folder(name, what, model_folder, files)
    address = str(source.folder) if source else name
    if source is None:
        check_hub_id(name, what)
        source = _download(name, what, revision, files)
    if what == "model":
        check_is_model(address, lambda file: (source.folder / file).is_file())
    return with_base(source)


def check_hub_id(name: str, what: str) -> None:
    """Raises CheckpointError for a name of a `what` that is no folder here and cannot be a hub id either."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        bundled = '; the bundled model is "shapes"' if what == "model" else ""
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id like owner/name{bundled}")


def check_is_model(address: str, has: Callable[[str], bool]) -> None:
    """Raises CheckpointError, saying what to give instead, for what a training wrote and is no model.

    `address` is a folder or a hub id; `has(file)` says whether it has a file.
    """
    if has("config.json"):
        return
    if has(ADAPTER_FILES[0]):
        raise CheckpointError(f"{address}: is a LoRA adapter, not a model: give its model, and this adapter as --lora")
    if has(f"{TRAINED}/config.json"):
        raise CheckpointError(f"{address}: is the folder of a training; its model is {address}/{TRAINED}")


def with_base(source: Source) -> Source:
    """A student's files with those of its base model; any other source as it is.

    A student's folder has only what differs from the base model, which its config.json names: a bundled model, a hub id, or a
    folder, absolute or inside or beside the student's.

    Raises:
        CheckpointError, HubError: naming the config.json, when the base model is not found.
    """
    path = source.folder / "config.json"
    if source.what != "model" or not path.is_file():
        return source
    try:
        student = parse_student(Fields(read_json(path), path))
    except ScaleRAEError:  # `load_config` reports it
        return source
    if student is None or student.base is None:
        return source
    name, revision = student.base, student.base_revision
    try:
        base = find_folder(name, "model", None if name in BUNDLED else source.folder)
        base = replace(base, own=False) if base else find(name, "model", revision=revision)
    except ScaleRAEError as e:
        raise type(e)(f"{path}: the student's base model is not found: {e}") from e
    if base.folder.resolve() == source.folder.resolve() or with_base(base) is not base:
        raise CheckpointError(
            f"{path}: the base model {name} is a student itself; name the model that it was distilled from"
        )
    return replace(source, folder=base.folder, student=source.folder, revision=None)


def find_folder(name: str, what: str, model_folder: Path | None = None, files: tuple[str, ...] = ()) -> Source | None:
    """`find` without the hub; None if there is no such folder on this machine.

    Raises:
        CheckpointError: `name` is a file, or a folder whose name cannot be recorded.
    """
    if model_folder is None and name in BUNDLED:
        return Source(name, BUNDLED[name], what=what, files=files)
    places = [(Path(os.path.expanduser(name)), False)]  # noqa: PTH111 - pathlib's fails where there is no such user
    if model_folder is not None:
        places += [(model_folder / name, True), (model_folder.parent / name, True)]
    for place, own in places if name else ():
        if os.path.isdir(place):  # noqa: PTH112 - pathlib's fails for names no file system takes
            check_name(place, f"{what} folder", CheckpointError)
            return Source(name, place, own=own, what=what, files=files)
        if os.path.isfile(place):  # noqa: PTH113
            raise CheckpointError(f"{place}: is a file; the {what} must be a folder or a hub id")
    return None


def own_folders(model: Path, name: str) -> list[Path]:
    """The folders called `name` inside and beside a model's folder, as far as they exist: its own decoder or VAE."""
    return [folder for folder in (model / name, model.parent / name) if folder.is_dir()]


def import_hub() -> None:
    """Imports huggingface_hub, which transformers imports too, in spite of unusable environment variables.

    The library reads its variables during import, and the import fails if one holds no valid number. Such a variable is
    removed from this process's environment, and a warning names it.

    Raises:
        HubError: the library cannot be imported for another reason.
    """
    while True:
        try:
            import huggingface_hub.constants  # noqa: F401
        except Exception as e:
            lines = " ".join(frame.line or "" for frame in traceback.extract_tb(e.__traceback__))
            names = sorted(name for name in set(re.findall(r"\b[A-Z][A-Z_]{4,}\b", lines)) if name in os.environ)
            if not names:
                raise HubError(f"huggingface_hub cannot be imported ({first_line(e)}); install it again") from e
            for name in names:
                _log.warning("%s is %r: ignored (%s)", name, os.environ.pop(name), first_line(e))
        else:
            return


def _download(name: str, what: str, revision: str | None, wanted: tuple[str, ...]) -> Source:
    """The repository's files that a `what` needs, from the hub or, if the hub cannot be asked, from its cache.

    huggingface_hub itself resumes a broken download several times (Range requests). If that fails too, it discards partial
    files; the next run keeps the finished files and downloads the rest.
    """
    import_hub()
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """The library's progress bar, on a terminal only."""

        def __init__(self, *args: Any, **options: Any) -> None:
            if not sys.stderr.isatty():
                options["disable"] = True
            super().__init__(*args, **options)

    where = hub_name(name, what, revision)
    try:
        listed = ask_hub(name, what, revision).siblings or []
    except ScaleRAEError:
        raise
    except Exception as e:  # also errors from bad proxy, token or certificate variables
        return cached(name, what, revision, wanted, e)

    names = [file.rfilename for file in listed]
    files = [name for name in names if name in wanted] if wanted else needed(names, what)
    if not files or (wanted and wanted[0] not in files):
        content = wanted[0] if wanted else "config.json and weights"
        raise HubError(f"{where}: the hub's repository holds no {what} ({content}); {_instead(what)}")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, tqdm_class=Bar))
    except Exception as e:  # also hf_xet's RuntimeError
        raise HubError(f"{where}: {hub_problem(e, what, broke_off=True)}") from e
    return Source(name, folder, folder.name, what=what, files=wanted)


def hub_name(name: str, what: str, revision: str | None) -> str:
    """A repository of the hub for error messages: what it is for, its name, and its revision if one is chosen."""
    return f"{what} {name}" + (f" at revision {revision}" if revision else "")


def ask_hub(name: str, what: str, revision: str | None, sizes: bool = False) -> Any:
    """The hub's account of a repository (huggingface_hub's ModelInfo): its commit and files, with `sizes` also their bytes.

    Raises:
        CheckpointError: the name cannot be a hub id. HubError: there is no such revision. Other errors of the library, for
        `hub_problem`: the hub refuses or cannot be asked.
    """
    import_hub()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise CheckpointError(f"{name}: no such {what} folder, and not a hub id ({first_sentence(e)})") from e
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("")  # before a client is created, which a bad proxy variable would prevent
    try:
        return HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT, files_metadata=sizes)
    except RevisionNotFoundError as e:
        raise HubError(f"{hub_name(name, what, revision)}: the hub's repository has no such revision") from e


def cached(name: str, what: str, revision: str | None, wanted: tuple[str, ...], error: Exception) -> Source:
    """The files of an earlier download. Used if the hub could not be asked, for the reason `error`.

    Raises:
        HubError: there are none, or not all; the message says why the hub could not be asked.
    """
    from huggingface_hub import snapshot_download

    where = hub_name(name, what, revision)
    patterns = wanted[:1] or ("*config.json" if what == "VAE" else "config.json")
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
    except Exception:  # not in the cache, or the cache cannot be read
        raise HubError(f"{where}: {hub_problem(error, what)}") from error
    try:
        if wanted or what == "decoder":
            _existing(folder / (wanted[0] if wanted else DECODER_WEIGHTS))
        elif what == "model" and (folder / ADAPTER_FILES[0]).is_file():
            _existing(folder / ADAPTER_FILES[1])  # of a student, whose base model has the other weights
        else:
            weight_files(vae_folder(folder) if what == "VAE" else folder)
    except CheckpointError as incomplete:
        problem = hub_problem(error, what)
        raise HubError(f"{where}: only part of it was downloaded ({incomplete}); {problem}") from error
    return Source(name, folder, folder.name, what=what, files=wanted)


def vae_folder(folder: Path) -> Path:
    """The folder of a VAE: `folder` itself, or its subfolder `vae`, as in repositories of whole image models."""
    return folder / "vae" if not (folder / "config.json").is_file() and (folder / "vae").is_dir() else folder


def _instead(what: str) -> str:
    return f"use a local folder{', or shapes, the bundled model' if what == 'model' else ''}"


def hub_problem(error: BaseException, what: str, broke_off: bool = False) -> str:
    """Why the hub could not be used to find a `what`, and what to do, in one line."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    instead = _instead(what)
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
    reason, variables = first_line(error), _in_the_way()
    if broke_off:
        check = f"check {variables}, " if variables else ""
        return f"the download broke off ({reason}); {check}run again to go on from there, or {instead}"
    check = variables or "the network"
    return f"not downloaded yet, and the hub cannot be reached ({reason}); check {check}, or {instead}"


def _in_the_way() -> str:
    """The environment variables that may prevent reaching the hub, as text; "" if none is set.

    Their values are not shown, because proxies and tokens contain passwords.
    """
    from huggingface_hub import get_token

    if not _fits_a_header(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""):
        names = [name for name in _TOKENS if os.environ.get(name)]
        return f"{' and '.join(names)} (the token holds characters that no token has)"
    if not _fits_a_header(get_token() or ""):
        return "the saved token (HF_TOKEN_PATH), which holds characters that no token has"
    proxies = {n: os.environ[n] for p in _PROXIES for n in (p, p.lower()) if os.environ.get(n)}
    if socks := [n for n, value in proxies.items() if value.lower().startswith("socks")]:
        return f"{' and '.join(socks)} (a SOCKS proxy needs the scheme socks5 and the package socksio)"
    remaining = [n for n in ("SSL_CERT_FILE", "SSL_CERT_DIR", "HF_ENDPOINT") if os.environ.get(n)]
    return f"the network and {', '.join((*proxies, *remaining))}" if proxies or remaining else ""


def _fits_a_header(token: str) -> bool:
    return all(" " < letter <= "~" for letter in token.strip())


def needed(names: list[str], what: str) -> list[str]:
    """The files among `names` that a `what` needs, with weights in one format only.

    An encoder with its preprocessor and a decoder inside a model's repository are included.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    own = folders.pop("", [])
    if what == "decoder":
        return [n for n in own if n in ("config.json", DECODER_WEIGHTS)]
    if what == "VAE" and "vae" in folders:  # a repository of a whole image model
        return [f"vae/{n}" for n in ("config.json", *choose_weights(folders["vae"])) if n in folders["vae"]]
    needed = [n for n in own if n in _SMALL_FILES] + choose_weights(own)
    if what == "model":
        for folder, files in folders.items():
            wanted = [n for n in files if n in _SMALL_FILES]
            if folder.rpartition("/")[2] == "decoder":
                wanted += [n for n in files if n == DECODER_WEIGHTS]
            elif "config.json" in files and "preprocessor_config.json" in files:
                wanted += choose_weights(files)
            else:
                continue
            needed += [f"{folder}/{n}" for n in wanted]
    return needed


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before .bin, and a single file before shards.

    Raises:
        CheckpointError: there are none, or a shard that the index or the shards' names announce is missing.
    """
    names = [p.name for p in folder.iterdir() if p.exists()] if folder.is_dir() else []
    chosen = weight_names(names, str(folder), lambda index: read_json(folder / index))
    return [folder / name for name in chosen]


def weight_names(names: Iterable[str], where: str, read: Callable[[str], dict[str, Any]]) -> list[str]:
    """`weight_files` among the `names` of a place that errors call `where`; `read` returns the JSON object in a file of it."""
    present = set(names)
    chosen = choose_weights(present)
    if not chosen:
        raise CheckpointError(f"{where}: no weights (model*.safetensors or pytorch_model*.bin)")
    announced: set[str] = set()
    for name in chosen:
        if name.endswith(".index.json"):
            announced |= set(weight_map(read(name), f"{where}/{name}").values())
        else:
            announced |= {name, *_numbered(name)}
    missing = sorted(name for name in announced if name not in present)
    if missing:
        raise CheckpointError(f"{where}: missing shards {', '.join(missing)}; copy or download them again")
    return sorted(announced)


def choose_weights(names: Iterable[str]) -> list[str]:
    """The names among `names` that make one set of weights: a single file, else an index and shards."""
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


def weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """Tensor name -> shard, from the JSON object in an index file. Shards must lie beside the index.

    Raises:
        CheckpointError: naming the file and the field.
    """
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{where}: weight_map must map tensor names to files")
    for name in sorted(set(found.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
            raise CheckpointError(f"{where}: weight_map names {name!r}; shards must be .safetensors or .bin beside it")
    return found


def _numbered(name: str) -> Iterator[str]:
    """All shards that a name like model-00001-of-00003 implies."""
    if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", name):
        yield from (f"{match[1]}{i:05}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return file
