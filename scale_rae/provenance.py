"""Identifies a model's files by hash or commit, and compares them with those that a manifest records."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from scale_rae.files import sha256
from scale_rae.hub import DECODER_WEIGHTS, needed

if TYPE_CHECKING:
    from scale_rae.hub import Source

PARTS = ("model", "encoder", "decoder")
_STUDENT = "student/"  # before the names of a student's own files


def file_record(source: Source) -> dict[str, Any]:
    """{"name", "revision"} for files of the hub, else {"name", "files": {file: SHA-256}}."""
    if source.revision and source.student is None:
        return {"name": source.name, "revision": source.revision}
    return {"name": source.address, "files": file_hashes(source)}


def file_hashes(source: Source) -> dict[str, str]:
    """The SHA-256 of each file of a folder that is loaded; names of a student's own begin with "student/"."""
    found: dict[str, str] = {}
    for folder, prefix in ((source.folder, ""), (source.student, _STUDENT)):
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder is not None else []
        loaded = [name for name in names if name in source.files] if source.files else needed(names, source.what)
        found |= {prefix + name: sha256(folder / name) for name in sorted(loaded) if folder is not None}
    return found


class PartRecords:
    """The file records of a model's parts. Each part is hashed on a thread of its own, while weights are read."""

    def __init__(self) -> None:
        self._records: dict[str, _Hashing] = {}

    def add(self, part: str, source: Source | None) -> None:
        """Starts to hash the files of one of PARTS; does nothing for a part that is known or not loaded."""
        if source is not None and part not in self._records:
            self._records[part] = _Hashing(source)

    def results(self) -> dict[str, dict[str, Any] | None]:
        """The `file_record` of each of PARTS, or None. Waits for the hashes.

        A part found inside or beside the model's folder also has "with_model": true.
        """
        return {part: self._records[part].result() if part in self._records else None for part in PARTS}


class _Hashing:
    """A `file_record` that a thread computes: hashing gigabytes takes as long as reading them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._result: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)  # a daemon, so that Ctrl-C needn't wait for it
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = file_record(self._source)
        except Exception as e:  # raised again by `result`
            self._error = e

    def result(self) -> dict[str, Any]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result | ({"with_model": True} if self._source.own and "files" in self._result else {})


def changed_files(recorded: dict[str, str], now: dict[str, str], what: str) -> list[str]:
    """Names of files whose hashes differ between two records of a `what`.

    Earlier versions also recorded files that are not loaded; those do not count.
    """
    names = {*now, *needed(list(recorded), what), *(name for name in recorded if name.startswith(_STUDENT))}
    return sorted(name for name in names if recorded.get(name) != now.get(name))


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the model files that a manifest records and the files loaded now, in words."""
    found = []
    for part in PARTS:
        old, new = recorded.get(part), now.get(part)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue  # not used in that run, or not in this one
        if "revision" in old and "revision" in new:
            if old["revision"] != new["revision"]:
                found.append(f"{part}: revision {new['revision']} here, {old['revision']} then")
        elif isinstance(old.get("files"), dict) and "files" in new:
            what = "VAE" if part == "decoder" and DECODER_WEIGHTS not in new["files"] else part
            if names := changed_files(old["files"], new["files"], what):
                found.append(f"{part}: {', '.join(names)} in {new['name']}")
        else:
            found.append(f"{part}: {_kind(new)} here, {_kind(old)} then")
    if "model" in now and _adapters(recorded) != _adapters(now):
        count = f"{len(_adapters(now))} here, {len(_adapters(recorded))} then"
        found.append(f"lora: other adapters or weights ({count})")
    return found


def _adapters(record: dict[str, Any]) -> list[Any]:
    """The adapters of a record by their content and weight, whatever their folders are called."""
    listed = [entry for entry in record.get("lora") or [] if isinstance(entry, dict)]
    return [(entry.get("revision") or entry.get("files"), entry.get("weight")) for entry in listed]


def reward_differs(recorded: Any, now: Any) -> bool:
    """Whether two records of rewards (`Reward.identity`) differ in their files; folders may have other names."""
    if not isinstance(recorded, dict) or not isinstance(now, dict) or recorded.keys() != now.keys():
        return bool(recorded != now)
    return any(_part_differs(recorded[part], now[part]) for part in now)


def _part_differs(old: Any, new: Any) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return bool(old != new)
    if isinstance(old.get("files"), dict) and "files" in new:
        return bool(changed_files(old["files"], new["files"], "reward"))
    return any(old.get(key) != new.get(key) for key in {*old, *new} - {"name"})


def _kind(source: dict[str, Any]) -> str:
    return f"hub revision {source['revision']}" if "revision" in source else f"folder {source.get('name')}"
