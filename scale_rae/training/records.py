"""Training data as records, with every bad one listed. Imports no torch.

| form | what is read |
| --- | --- |
| a folder with metadata.jsonl | {"file_name": …, "text": …} a line |
| a folder with metadata.csv | a table with the columns file_name and text |
| a folder without | pictures in it and in folders below, each with a .txt beside it; hidden files are left out |
| a .jsonl or .csv file | as above; in .jsonl also {"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]} |
| a .tar file, or a folder of them | WebDataset samples: .json with "conversations" or else a .txt, and the picture, under one name |
| a .json file | the manifest of tars: {"dataset_name": …, "tars": […]} |

Names of files are relative to the file that has them, or to `image_folder`.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale_rae.errors import DataError, InputError, counted, first_line
from scale_rae.files import check_file, read_bytes
from scale_rae.images import MAX_BYTES, decode_image
from scale_rae.jsonio import parse_json, read_json
from scale_rae.training.sequences import PICTURE, Message
from scale_rae.training.settings import TrainingOptions
from scale_rae.wording import as_request

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
NOT_READ = (".heic", ".heif")  # pictures of phones, which Pillow cannot read
LISTS = ("metadata.jsonl", "metadata.csv")  # of the pictures in a folder
MOST_LIST_BYTES = 4 << 30  # per JSONL file
_MOST_TEXT_BYTES = 1 << 20
_REPORT_EVERY = 256  # records
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

Report = Callable[[str, int, int], None]
"""Called as `report(what, done, total)` while something is read or prepared."""


def no_report(what: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""


@dataclass(frozen=True)
class PictureFile:
    """A picture's bytes: a file, or `size` bytes of it from `offset` on."""

    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            InputError: naming the file, when it cannot be read.
        """
        if self.size is None:
            return read_bytes(self.file, MAX_BYTES, "picture")
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as e:
            raise InputError(f"{self.file}: cannot be read ({e.strerror or e})") from e


@dataclass(frozen=True)
class Record:
    """One conversation with its pictures, in the order of the PICTUREs in its messages.

    `where` names file and line. With `own_reply`, the assistant's words before the picture are not given: they are what the
    model says there.
    """

    where: str
    messages: tuple[Message, ...]
    pictures: tuple[PictureFile, ...]
    own_reply: bool = False

    @property
    def draws(self) -> bool:
        """Whether a picture is drawn in it."""
        return any(role == "assistant" and PICTURE in text for role, text in self.messages)

    def with_reply(self, reply: str) -> Record:
        """The record with these words before its picture."""
        *before, last = self.messages
        return replace(self, messages=(*before, Message(last.role, reply + PICTURE)), own_reply=False)


Request = Callable[[str], str]
"""From a picture's text to the message that asks for it."""


@dataclass(frozen=True)
class Data:
    """The records that can be trained on, and a line "file, line: problem" for each other one."""

    records: list[Record]
    problems: list[str]


def read_data(
    paths: Sequence[Path],
    request: Request,
    image_folder: Path | None = None,
    workers: int = 8,
    without: Path | None = None,
    report: Report = no_report,
) -> Data:
    """All records of the files and folders, in order.

    Every picture is decoded once, to see whether it can be. `without` is a folder whose files are no data, where it lies within
    a folder of data. Progress is reported where there are many records.

    Raises:
        InputError: for a path that holds no training data, or cannot be read.
    """
    items = [item for path in paths for item in _Reader(request, image_folder, without).read(path)]
    data = Data([], [])
    with ThreadPoolExecutor(workers) as pool:
        for number, (item, problem) in enumerate(zip(items, pool.map(_problem, items), strict=True), start=1):
            if isinstance(item, Record) and problem is None:
                data.records.append(item)
            elif problem is not None:
                data.problems.append(problem)
            if number % _REPORT_EVERY == 0:
                report("checking pictures", number, len(items))
    return data


def _problem(item: Record | str) -> str | None:
    """What a reader said of a bad record, or what is wrong with a record's pictures."""
    if isinstance(item, str):
        return item
    for picture in item.pictures:
        try:
            decode_image(picture.read(), item.where)
        except InputError as e:
            text = first_line(e)
            return text if text.startswith(item.where) else f"{item.where}: {text}"
    return None


@dataclass(frozen=True)
class _Reader:
    """Yields the records of a path, and a text for each bad one."""

    request: Request
    image_folder: Path | None
    without: Path | None

    def read(self, path: Path) -> Iterator[Record | str]:
        """The records of a file or folder, by its kind."""
        if path.is_dir():
            yield from self._folder(path)
        elif path.suffix.lower() in (".jsonl", ".ndjson"):
            yield from self._lines(path)
        elif path.suffix.lower() == ".csv":
            yield from self._table(path)
        elif path.suffix.lower() == ".tar":
            check_file(path, "tar")
            yield from self._tar(path)
        elif path.suffix.lower() == ".json":
            yield from self._manifest(path)
        else:
            check_file(path, "data file")
            raise InputError(
                f"{path}: not training data: give a folder, a .jsonl, .csv or .tar file, or a manifest of tars (.json)"
            )

    # --- folders ---------------------------------------------------------------------------------------------------

    def _folder(self, folder: Path) -> Iterator[Record | str]:
        """The records of a folder with a list (one of LISTS), with tars, or with a .txt beside each picture."""
        if lists := [folder / name for name in LISTS if (folder / name).is_file()]:
            yield from self.read(lists[0])
            return
        if self.without is not None and folder.resolve() == self.without.resolve():
            raise InputError(f"{folder}: is the folder of --out, too, which gets pictures; give another --out")
        files = sorted(file for file in folder.rglob("*") if file.is_file() and self._is_data(file, folder))
        if lists := [file for file in files if file.name in LISTS]:
            raise InputError(f"{folder}: has no {lists[0].name}, but {lists[0].parent} has one; give that folder")
        pictures = [file for file in files if file.suffix.lower() in (*PICTURE_SUFFIXES, *NOT_READ)]
        tars = [file for file in files if file.suffix.lower() == ".tar"]
        texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
        if not pictures and not tars:
            raise InputError(f"{folder}: holds no training data: no {' or '.join(LISTS)}, no pictures, no .tar files")
        if not texts and not tars:
            raise InputError(
                f"{folder}: holds {counted(len(pictures), 'picture')} and no texts; put a .txt beside each, or write a "
                f"{' or '.join(LISTS)} with file_name and text"
            )
        for tar in tars:
            yield from self._tar(tar)
        beside = {file.with_suffix("") for file in pictures}
        for name, text_file in texts.items() if pictures else ():
            if name not in beside:
                yield f"{text_file}: no picture beside it ({', '.join(PICTURE_SUFFIXES)})"
        for file in pictures:
            found = texts.get(file.with_suffix(""))
            if file.suffix.lower() in NOT_READ:
                yield f"{file}: pictures in this format are not read; save it as JPEG or PNG"
            elif found is None:
                yield f"{file}: no text beside it ({file.with_suffix('.txt').name})"
            else:
                try:
                    yield self._captioned(str(file), _one_line(_text_of(found)), PictureFile(file))
                except InputError as e:
                    yield first_line(e)

    def _is_data(self, file: Path, folder: Path) -> bool:
        """False for hidden files and for files of the folder that is no data."""
        if _is_hidden(file.relative_to(folder).parts):
            return False
        without = self.without.resolve() if self.without is not None else None
        return without is None or folder.resolve() not in without.parents or without not in file.resolve().parents

    # --- JSONL -----------------------------------------------------------------------------------------------------

    def _lines(self, path: Path) -> Iterator[Record | str]:
        """The records of a JSONL file."""
        content = read_bytes(path, MOST_LIST_BYTES, "data file").removeprefix(b"\xef\xbb\xbf")
        for number, raw in enumerate(content.split(b"\n"), start=1):
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield self._from_object(_object(raw, where), where, path.parent)
            except InputError as e:
                yield first_line(e)

    def _table(self, path: Path) -> Iterator[Record | str]:
        """The records of a table's lines, of which the first names the columns."""
        content = _utf8(read_bytes(path, MOST_LIST_BYTES, "data file"), str(path))
        head = content.partition("\n")[0]
        # Spreadsheet programs separate columns by what their country does not use in numbers.
        table = csv.DictReader(io.StringIO(content, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
        try:
            if missing := {"file_name", "text"} - set(table.fieldnames or ()):
                raise InputError(f"{path}: its first line names no column {' and no column '.join(sorted(missing))}")
            for row in table:
                where = f"{path}, line {table.line_num}"
                if None in row:
                    yield f"{where}: has more columns than the first line; put a text with commas into quotes"
                    continue
                fields = {name: row[name] for name in ("file_name", "text")}
                try:
                    yield self._from_object(fields, where, path.parent)
                except InputError as e:
                    yield first_line(e)
        except csv.Error as e:
            raise InputError(f"{path}, after line {table.line_num}: not a table of comma-separated values ({e})") from e

    def _from_object(self, fields: dict[str, Any], where: str, folder: Path) -> Record:
        """The record of a line; names of pictures are relative to `folder`, unless an image folder is given."""
        if "conversations" in fields:
            names = fields.get("image", [])
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
                raise InputError(f'{where}: "image" must be the name of a file')
            return _conversation(fields, where, [self._picture(name, where, folder) for name in names])
        name, text = fields.get("file_name"), fields.get("text")
        if not isinstance(name, str) or not name:
            raise InputError(f'{where}: has neither "conversations" nor a "file_name"')
        if not isinstance(text, str):
            raise InputError(f'{where}: has no "text"')
        return self._captioned(where, text, self._picture(name, where, folder))

    def _picture(self, name: str, where: str, folder: Path) -> PictureFile:
        file = (self.image_folder or folder) / name
        try:
            check_file(file, "picture")
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        return PictureFile(file)

    def _captioned(self, where: str, text: str, picture: PictureFile) -> Record:
        """The record of a picture and its text: the text is asked for, the picture drawn."""
        text = _unicode(text.strip(), where)
        if not text:
            raise InputError(f"{where}: its text is empty")
        if PICTURE in text:
            raise InputError(f"{where}: its text holds {PICTURE}, which stands for a picture")
        return Record(
            where, (Message("user", self.request(text)), Message("assistant", PICTURE)), (picture,), own_reply=True
        )

    # --- tars ------------------------------------------------------------------------------------------------------

    def _manifest(self, path: Path) -> Iterator[Record | str]:
        """The records of the tars that a manifest lists."""
        tars = read_json(path, "manifest", InputError).get("tars")
        if not isinstance(tars, list) or not tars or not all(isinstance(name, str) and name for name in tars):
            raise InputError(f'{path}: "tars" must be a list of file names')
        for name in tars:
            file = path.parent / name
            if file.is_file():
                yield from self._tar(file)
            else:
                yield f"{path}: {file}: no such tar"

    def _tar(self, path: Path) -> Iterator[Record | str]:
        """The records of a tar: one per sample, which is all files of one name but for the suffix."""
        samples: dict[str, dict[str, PictureFile]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isreg() and not _is_hidden(member.name.split("/")):
                        folder, _, name = member.name.rpartition("/")
                        key, _, suffix = name.partition(".")
                        parts = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                        parts[suffix.lower()] = PictureFile(path, member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError) as e:
            yield f"{path}: not a readable tar ({first_line(e)}); the samples after this point are left out"
        for key, parts in samples.items():
            where = f"{path}, {key}"
            try:
                yield self._sample(parts, where)
            except InputError as e:
                yield first_line(e)

    def _sample(self, parts: dict[str, PictureFile], where: str) -> Record:
        """The record of a tar's sample, whose files are `parts` by suffix."""
        pictures = [part for suffix, part in sorted(parts.items()) if f".{suffix}" in PICTURE_SUFFIXES]
        texts = {suffix: parts[suffix] for suffix in ("json", "txt") if suffix in parts}
        if not texts:
            raise InputError(f"{where}: has no .json and no .txt")
        if any((part.size or 0) > _MOST_TEXT_BYTES for part in texts.values()):
            raise InputError(f"{where}: its text is longer than {_MOST_TEXT_BYTES} bytes")
        if "json" in texts:
            fields = _object(texts["json"].read(), where)
            if "conversations" in fields or "txt" not in texts:  # img2dataset's .json describes the file of the .txt
                return _conversation(fields, where, pictures)
        if len(pictures) != 1:
            raise InputError(f"{where}: has {len(pictures)} pictures; a .txt describes one")
        return self._captioned(where, _one_line(_utf8(texts["txt"].read(), where)), pictures[0])


def _conversation(fields: dict[str, Any], where: str, pictures: Sequence[PictureFile]) -> Record:
    """A record of the official form."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f'{where}: "conversations" must be a list of turns')
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(text, str) or not text.strip():
            raise InputError(f'{where}: turn {number} must be {{"from": "human" or "gpt", "value": text}}')
        if role != ("user", "assistant")[(number - 1) % 2]:
            raise InputError(f"{where}: turn {number} is by {speaker!r}; human and gpt take turns, human first")
        messages.append(Message(role, _unicode(text, where)))
    if messages[-1].role != "assistant":
        raise InputError(f"{where}: ends without a reply of gpt, so there is nothing to learn")
    places = sum(message.text.count(PICTURE) for message in messages)
    if places != len(pictures):
        raise InputError(
            f"{where}: has {counted(len(pictures), 'picture')}, but {counted(places, 'place')} for pictures ({PICTURE})"
        )
    return Record(where, tuple(messages), tuple(pictures))


def _object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in bytes; an InputError names `where`."""
    text = _utf8(data, where)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not valid JSON ({e.msg} at column {e.colno})") from e
    except ValueError as e:
        raise InputError(f"{where}: not valid JSON ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def _one_line(text: str) -> str:
    """The lines of a text file as one: where they break says nothing about the picture."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _text_of(file: Path) -> str:
    return _utf8(read_bytes(file, _MOST_TEXT_BYTES, "text"), str(file))


def _unicode(text: str, where: str) -> str:
    """The text, unless JSON's escapes spelt half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where}: its text is not valid Unicode (character {e.start + 1})") from e
    return text


def _is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file or a folder around it is hidden, as the copies that file managers make."""
    return any(part.startswith(".") and part != "." for part in parts)


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not valid UTF-8 (byte {e.start + 1}); save it as UTF-8") from e


def read_records(options: TrainingOptions, report: Report = no_report) -> tuple[list[Record], list[str]]:
    """The records of the data that the options name, and the bad ones' problems.

    Raises:
        DataError: for bad records, unless they are to be left out, or when no record is left. InputError: see `read_data`.
    """

    def request(text: str) -> str:
        return as_request(text, options.prompt_prefix)

    # A resumed run must not read its own validation pictures.
    data = read_data(options.data, request, options.image_folder, without=options.out, report=report)
    return usable(data.records, data.problems, options), data.problems


def usable(records: list[Record], problems: list[str], options: TrainingOptions) -> list[Record]:
    """The records, if there are some and no bad ones, or if those are to be left out.

    Raises:
        DataError: with the problems of the bad ones.
    """
    if problems and not options.skip_bad:
        total = len(records) + len(problems)
        raise DataError(
            f"{len(problems)} of {counted(total, 'record')} cannot be used (listed above); correct them, or leave them out with --skip-bad",
            problems,
        )
    if not records:
        raise DataError("no record of the data can be used", problems)
    return records
