"""Files of a model, in a folder or on the hub, before they are downloaded: their sizes, and parts of them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scale_rae.errors import CheckpointError, ConfigError, HubError, ScaleRAEError
from scale_rae.files import check_file, is_lfs_pointer, lfs_error
from scale_rae.hub import (
    HUB_TIMEOUT,
    Source,
    ask_hub,
    cached,
    check_hub_id,
    check_is_model,
    find_folder,
    hub_name,
    hub_problem,
)
from scale_rae.jsonio import MOST_BYTES, parse_object

_MOST_CARD = 64 << 10  # bytes of a model card that are searched for its licence


@dataclass(frozen=True)
class Listing:
    """Files by name with their sizes in bytes; `here` has the paths of those that are on this machine.

    `name` is the folder or the hub's repository as error messages name it, `commit` the repository's commit, `licence` what the
    model card says. `traffic` counts the bytes that `read` fetched from the hub.
    """

    name: str
    sizes: dict[str, int]
    here: dict[str, Path]
    commit: str | None = None
    licence: str | None = None
    folder: Path | None = None  # where all of them lie
    fetch: Callable[[str, int, int], bytes] | None = None
    traffic: list[int] = field(default_factory=list)

    def where(self, file: str) -> str:
        """A file's name in error messages."""
        return str(self.here.get(file, f"{self.name}/{file}"))

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file, fewer if it ends before.

        Raises:
            CheckpointError: for a file that is missing or cannot be read. HubError: the hub cannot be asked.
        """
        if (path := self.here.get(file)) is not None:
            try:
                with path.open("rb") as stream:
                    stream.seek(start)
                    return stream.read(stop - start)
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e
        if self.fetch is None or file not in self.sizes:
            raise CheckpointError(f"{self.where(file)}: no such file")
        data = self.fetch(file, start, min(stop, self.sizes[file]))
        self.traffic.append(len(data))
        return data

    def read_json(self, file: str, error: type[ScaleRAEError] = ConfigError) -> dict[str, Any]:
        """The JSON object in a file.

        Raises:
            `error`: naming the file: for one that is missing, too large, or not JSON. HubError: the hub cannot be asked.
        """
        where = self.where(file)
        if file not in self.sizes:
            raise error(f"{where}: no such file")
        if self.sizes[file] > MOST_BYTES:
            raise error(f"{where}: larger than {MOST_BYTES >> 20} MiB, which is no configuration")
        return parse_object(self.read(file, 0, self.sizes[file]), where, error)

    def inside(self, folder: str) -> Listing | None:
        """The files of a folder beside these, by their names there; None if there are none.

        Without a model card of its own, the folder has the licence of the whole.
        """
        if self.folder is not None:
            path = self.folder / folder
            if not path.is_dir():
                return None
            inner = list_folder(Source(folder, path))
            return replace(inner, licence=inner.licence or self.licence)
        prefix = f"{folder}/"
        sizes = {name.removeprefix(prefix): size for name, size in self.sizes.items() if name.startswith(prefix)}
        here = {name.removeprefix(prefix): path for name, path in self.here.items() if name.startswith(prefix)}
        fetch = self.fetch
        part = None if fetch is None else lambda file, start, stop: fetch(prefix + file, start, stop)
        return replace(self, name=f"{self.name}/{folder}", sizes=sizes, here=here, fetch=part) if sizes else None

    def bytes_of(self, files: list[str]) -> tuple[int, int]:
        """(bytes on this machine, bytes that would be downloaded) of files."""
        there = sum(self.sizes[name] for name in files if name not in self.here)
        return sum(self.sizes[name] for name in files) - there, there


def list_files(name: str, what: str, model_folder: Path | None = None, revision: str | None = None) -> Listing:
    """The files of the `what` called `name`, found as `hub.find` finds them, but not downloaded.

    Raises:
        CheckpointError: there is no such folder, and the name cannot be a hub id. HubError: the hub cannot be asked, and there is
            no complete earlier download.
    """
    if source := find_folder(name, what, model_folder):
        if what == "model":
            check_is_model(str(source.folder), lambda file: (source.folder / file).is_file())
        return list_folder(source)
    check_hub_id(name, what)
    listing = _list_hub(name, what, revision)
    if what == "model":
        check_is_model(name, listing.sizes.__contains__)
    return listing


def list_folder(source: Source) -> Listing:
    """The files of a folder, without those of folders in it.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        here = {path.name: path for path in sorted(source.folder.iterdir()) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in here.items()}
    except OSError as e:
        raise CheckpointError(f"{source.folder}: cannot be read ({e.strerror or e})") from e
    return Listing(
        name=str(source.folder) if source.revision is None else source.name,
        sizes=sizes,
        here=here,
        folder=source.folder,
        commit=source.revision,
        licence=_licence_of_card(here.get("README.md")),
    )


def check_weights(listing: Listing, file: str) -> None:
    """Raises CheckpointError for a weight file on this machine that is unreadable, or a git-LFS pointer."""
    path = listing.here.get(file)
    if path is not None:
        check_file(path, "file", CheckpointError)
    if is_lfs_pointer(listing.read(file, 0, 200)):
        raise lfs_error(Path(listing.where(file)), CheckpointError)


def _licence_of_card(card: Path | None) -> str | None:
    """The licence in the front matter of a model card; None if there is no card, or no licence in it."""
    if card is None:
        return None
    try:
        with card.open("rb") as file:
            text = file.read(_MOST_CARD).decode("utf-8-sig", "replace")
    except OSError:
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.search(r"^licen[sc]e:[ \t]*([^\s#][^\r\n#]*)", front[1], re.MULTILINE) if front else None
    return found[1].strip().strip("'\"")[:100] or None if found else None


def _list_hub(name: str, what: str, revision: str | None) -> Listing:
    try:
        info = ask_hub(name, what, revision, sizes=True)
    except ScaleRAEError:
        raise
    except Exception as e:  # as in `hub.find`: what was downloaded before is used
        return list_folder(cached(name, what, revision, (), e))
    from huggingface_hub import try_to_load_from_cache

    where = hub_name(name, what, revision)
    sizes: dict[str, int] = {}
    for file in info.siblings or []:
        if type(file.size) is not int or file.size < 0:
            raise HubError(
                f"{where}: the hub does not say how large {file.rfilename} is, so the model cannot be inspected there"
            )
        sizes[file.rfilename] = file.size
    here = {}
    for stored in sizes:
        path = try_to_load_from_cache(name, stored, revision=info.sha)
        if isinstance(path, str):
            here[stored] = Path(path)

    def fetch(file: str, start: int, stop: int) -> bytes:
        return _fetch(name, info.sha, where, what, file, start, stop)

    return Listing(name, sizes, here, info.sha, _licence_of_info(info), fetch=fetch)


def _licence_of_info(info: Any) -> str | None:
    """The licence in the hub's account of a repository: of its card, else of its tags."""
    card = getattr(info, "card_data", None)
    found = getattr(card, "license", None)
    if found in (None, "other"):  # a licence of its own, by its name
        found = getattr(card, "license_name", None) or found
    tags = [t.removeprefix("license:") for t in info.tags or [] if t.startswith("license:")]
    return str(found)[:100] if found else tags[0] if tags else None


def _fetch(name: str, commit: str, where: str, what: str, file: str, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of a file on the hub, by one range request."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if stop <= start:
        return b""
    try:
        # The encoding is "identity" because a range of a compressed file would be another range.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(name, file, revision=commit)
        with get_session().stream("GET", url, headers=headers, timeout=HUB_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code == 206:
                return _taken(response, 0, stop - start)
            return _taken(response, start, stop)  # a server that knows no ranges sends the file from its start
    except Exception as e:
        raise HubError(f"{where}: {file}: {hub_problem(e, what)}") from e


def _taken(response: Any, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of a response, of which no more is read."""
    data = b""
    for part in response.iter_bytes():
        data += part
        if len(data) >= stop:
            break
    return data[start:stop]
