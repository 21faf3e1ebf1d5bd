"""Writes a run's files: sample_<time>.png, …_latent.pt, …_manifest.json. All or none; nothing is overwritten unasked.

A run writes its files into a hidden folder beside their targets, then renames them into place, the manifest last. The folder has
the run's name and is locked while the run writes. The lock prevents two processes from using one name, and distinguishes the folder
of a killed run from that of a run that still writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError, OptionError, OutputError, shorten
from scale_rae.files import replace, write_new
from scale_rae.jsonio import dump_json, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PICTURE_FORMS = ("png", "jpeg", "webp")
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}  # PICTURE_FORMS by the ends of files' names
# The fields of name templates, with examples.
FIELDS = {"index": 0, "prompt": "a", "seed": 0, "number": 0, "time": "a", "model": "a"}
MOST_SLUG = 80  # characters of a prompt in a file's name; in UTF-8 they may take twice as many bytes
MOST_EXIF = 60_000  # bytes; a JPEG's EXIF has room for 65,533


@dataclass
class Sample:
    """One image to save: pixels with the text that goes into its file, a latent, or both; and its noise seed if it has one.

    The half-formed picture of a dropped candidate has a `mark` in its name instead of a number, and is listed apart.
    """

    image: Image.Image | None = None
    latent: Tensor | None = None
    text: Mapping[str, str] | None = None
    mark: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class FileNames:
    """How the files of runs are named: `template`, in which FIELDS stand in braces, then `suffix` for pictures.

    With `exact`, these names and no others are taken: a file of that name is replaced with `overwrite`, else it is an error.
    """

    template: str = "sample_{time}"
    suffix: str = ".png"
    exact: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raises OptionError for a template that makes no file name, or a suffix that is not one of FORMATS."""
        what = f"file name template {self.template!r:.80}"
        try:
            self.fields()
            made = self.template.format_map(FIELDS)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as e:
            raise OptionError(f"{what}: {e}; the fields are {', '.join(f'{{{name}}}' for name in FIELDS)}") from e
        if not self.exact and (not made.strip() or re.search(r'[\x00-\x1f/\\:*?"<>|]', made)):
            raise OptionError(f"{what}: must be a file's name, without folders and without any of : * ? \" < > |")
        if self.suffix.lower() not in FORMATS:
            raise OptionError(
                f"{self.template + self.suffix!r}: a picture's name must end with one of {', '.join(FORMATS)}"
            )

    def stems(
        self, manifest: Mapping[str, Any], samples: Sequence[Sample], time_of_run: str, label: str
    ) -> tuple[str, list[str]]:
        """The beginning of the manifest's name, and that of each sample's names without its mark.

        `label` is appended to names that tell neither prompt nor index, and to those of latents from several files.
        """
        seeds = manifest.get("seed", 0)
        fields = {
            "index": manifest.get("prompt_index", 0),
            "prompt": slug(manifest.get("prompt") or ""),
            "seed": seeds[0] if isinstance(seeds, list) else seeds,
            "number": 0,
            "time": time_of_run,
            "model": slug(Path(manifest.get("model_path") or "").name),
        }
        tail = "" if "prompt_index" in manifest and self.fields() & {"index", "prompt"} else label
        own = [{"number": i} | ({} if s.seed is None else {"seed": s.seed}) for i, s in enumerate(samples)]
        made = [self.template.format_map(fields | some) + tail for some in own]
        return made[0] if made else self.template.format_map(fields) + tail, made

    def fields(self) -> set[str]:
        """The names of the fields in the template. Raises ValueError for what is no plain field."""
        used: set[str] = set()
        for _, name, form, conversion in string.Formatter().parse(self.template):
            if name is not None:
                if name not in FIELDS or conversion or "{" in (form or ""):
                    raise ValueError(f"{{{name}}} is no field")
                used.add(name)
        return used


def slug(text: str) -> str:
    """A text as part of a file's name: letters and digits, dashes between words, at most MOST_SLUG characters."""
    words = re.sub(r"[\W_]+", "-", text)[:MOST_SLUG]
    return words.encode()[: 2 * MOST_SLUG].decode(errors="ignore").strip("-") or "image"


def timestamp() -> str:
    """The local time, to the second, in the form used in file names."""
    return time.strftime("%Y%m%d-%H%M%S")


def check_folder(folder: Path) -> None:
    """Makes sure, before any work and without leaving anything, that results can be written to `folder`.

    Raises:
        OutputError: when it is a file, or it or the folder it would be made in cannot be written to.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise OutputError(f"{folder}: cannot be an output folder ({e.strerror})") from e
        if not place.is_dir():
            raise OutputError(f"{folder}: cannot be an output folder, since {place} is not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(
                f"{folder}: not writable (no permission to write in {place}); choose another --output-dir"
            )
        try:  # some file systems, as /proc, take no files whatever the permissions say
            tempfile.TemporaryFile(dir=place).close()
        except OSError as e:
            raise OutputError(
                f"{folder}: nothing can be written in {place} ({e.strerror}); choose another --output-dir"
            ) from e
        return


def check_free(folder: Path, names: FileNames) -> None:
    """Raises OutputError, before any work, for exact names that are taken and not to be overwritten."""
    if names.exact and not names.overwrite:
        stem = names.template.format_map(FIELDS)
        for name in (stem + names.suffix, f"{stem}_00{names.suffix}", f"{stem}_manifest.json"):
            if os.path.lexists(folder / name):
                raise _taken(folder / name)


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path}: exists already; choose another name, or replace it: --overwrite")


def save_run(
    folder: Path,
    manifest: dict[str, Any],
    samples: Sequence[Sample],
    time_of_run: str,
    label: str = "",
    names: FileNames = FileNames(),
) -> dict[str, Any]:
    """Writes one run and returns its manifest, completed by the paths and the seconds that writing took.

    Names begin `sample_<time_of_run><label>`, or as `names` says. Several samples of one name get _00, _01, …, and samples
    with a mark, which come last, get that. If a file of that name exists, -2, -3, … is appended, unless names are `exact`.

    Raises:
        OutputError: when a file cannot be written; then no file of the run is left.
    """
    start = time.perf_counter()
    first, stems = names.stems(manifest, samples, time_of_run, label)
    unmarked = [stem for stem, sample in zip(stems, samples, strict=True) if not sample.mark]
    several = len(set(unmarked)) < len(unmarked)
    marks = [sample.mark or (f"_{i:02}" if several else "") for i, sample in enumerate(samples)]

    def picture(i: int, more: str) -> str:
        return f"{stems[i]}{more}{marks[i]}{names.suffix}"

    def latent(i: int, more: str) -> str:
        return f"{stems[i]}{more}{marks[i]}_latent.pt"

    def all_names(more: str) -> list[str]:
        """The names of the run's files, with `more` behind their beginnings."""
        return [
            *(picture(i, more) for i, sample in enumerate(samples) if sample.image is not None),
            *(latent(i, more) for i, sample in enumerate(samples) if sample.latent is not None),
            f"{first}{more}_manifest.json",
        ]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _reserved(folder, first, all_names, names) as (more, staging):
            images: list[str] = []
            latents: list[str] = []
            marked: list[str] = []
            for i, (sample, data) in enumerate(zip(samples, _pictures(samples, names.suffix), strict=True)):
                if data is not None:
                    (marked if sample.mark else images).append(picture(i, more))
                    write_new(staging / picture(i, more), data)
                if sample.latent is not None:
                    latents.append(latent(i, more))
                    write_new(staging / latents[-1], latent_bytes(sample.latent))
            paths = [str(folder / name) for name in latents]
            complete = manifest | {
                "output_images": [str(folder / name) for name in images],
                "latent_path": paths[0] if paths else None,
                "latent_paths": paths,
                **({"dropped_images": [str(folder / name) for name in marked]} if marked else {}),
                "seconds": manifest.get("seconds", {}) | {"writing": round(time.perf_counter() - start, 3)},
            }
            last = f"{first}{more}_manifest.json"
            write_new(staging / last, (dump_json(complete, indent=2) + "\n").encode())
            _move(staging, folder, (*images, *latents, *marked, last), names.overwrite)
    except OSError as e:
        raise OutputError(
            f"{folder}: the results cannot be written ({e.strerror or e}); "
            "make room or permission there, or choose another --output-dir"
        ) from e
    return complete


def _pictures(samples: Sequence[Sample], suffix: str) -> Iterator[bytes | None]:
    """The file of each sample's picture, None if it has none; up to four are encoded at once."""

    def encoded(sample: Sample) -> bytes | None:
        if sample.image is None:
            return None
        return picture_bytes(sample.image, sample.text or {}, FORMATS[suffix.lower()])

    if len(samples) < 2:
        yield from map(encoded, samples)
        return
    with ThreadPoolExecutor(min(len(samples), 4)) as pool:
        yield from pool.map(encoded, samples)


def _move(staging: Path, folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Moves a run's files from one folder to another, in order; if one cannot be moved, none is left there."""
    placed: list[Path] = []
    try:
        for name in names:
            placed.append(folder / name)
            if overwrite:
                replace(staging / name, folder / name)
            else:
                (staging / name).rename(folder / name)
    except BaseException:  # Ctrl-C too
        for path in placed:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _reserved(
    folder: Path, stem: str, all_names: Callable[[str], list[str]], names: FileNames
) -> Iterator[tuple[str, Path]]:
    """For a `with`: the first of "", "-2", … with which all names are free, and a folder that reserves them.

    The folder is removed at the end.

    Raises:
        OutputError: for exact names that are taken.
    """
    more, count = "", 1
    while True:
        staging = folder / f".{stem}{more}.tmp"
        with held(staging) as mine:
            taken = [] if names.overwrite else [n for n in all_names(more) if os.path.lexists(folder / n)]
            if mine and not taken:
                yield more, staging
                return
            if names.exact:
                raise _taken(folder / taken[0]) if taken else OutputError(f"{folder / stem}: another process writes it")
        count += 1
        more = f"-{count}"


@contextlib.contextmanager
def held(staging: Path) -> Iterator[bool]:
    """For a `with`: whether this process has the folder to itself; if so, it is removed at the end.

    The folder is new, or was left by a run that was killed: the lock of a run ends with its process. On file systems
    without such locks, a folder that exists already belongs to another process.
    """
    try:
        staging.mkdir()
        made = True
    except FileExistsError:
        made = False
    lock, taken = _lock(staging)
    mine = lock is not None or (made and not taken)
    try:
        if mine and not made:
            try:
                for left in staging.iterdir():
                    left.unlink()
            except OSError:  # not what a run leaves
                mine = False
        yield mine
    finally:
        if mine:
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> tuple[int | None, bool]:
    """A descriptor that locks a folder, or None; and whether another process has the lock."""
    if fcntl is None:
        return None, False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, or gone again
        return None, True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.lstat()):
            return descriptor, False
        taken = True
    except (BlockingIOError, FileNotFoundError):
        taken = True
    except OSError:  # no locks on this file system
        taken = False
    os.close(descriptor)
    return None, taken


def png_bytes(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG with text chunks; texts beyond Latin-1 are iTXt chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    # Saves a copy: Pillow stores options on the image while it saves, so two threads must not share one.
    image.copy().save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def picture_bytes(image: Image.Image, text: Mapping[str, str], form: str, quality: int = 100) -> bytes:
    """The file of a picture in one of PICTURE_FORMS, with `text`: chunks of a PNG, or JSON as EXIF's ImageDescription.

    `quality` is that of JPEG and WebP, 0 to 100. WebP is lossless at 100. Texts too long for a JPEG's EXIF are cut.
    """
    from PIL import ExifTags
    from PIL.Image import Exif

    if form == "png":
        return png_bytes(image, text)
    exif = Exif()
    described = json.dumps(dict(text))  # ASCII, as EXIF wants it
    if len(described) > MOST_EXIF:
        described = json.dumps({key: shorten(value, MOST_EXIF // 20) for key, value in text.items()})
    exif[ExifTags.Base.ImageDescription] = described
    buffer = io.BytesIO()
    lossless = form == "webp" and quality == 100
    image.copy().save(buffer, form, quality=quality, exif=exif, lossless=lossless)
    return buffer.getvalue()


def latent_bytes(latent: Tensor) -> bytes:
    """A latent [L, C] float32 as bytes of `torch.save`; copied first, since a view would be saved with its base."""
    import torch

    buffer = io.BytesIO()
    torch.save(latent.detach().to("cpu", torch.float32, copy=True).contiguous(), buffer)
    return buffer.getvalue()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an earlier run.

    Raises:
        InputError: naming the file, when it is missing or not a JSON object.
    """
    return read_json(path, "manifest", InputError)
