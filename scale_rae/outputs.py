"""Writes a run's files: sample_<time>.png, …_latent.pt, …_manifest.json. All or none; nothing is overwritten.

A run writes its files into a hidden folder beside their targets, then renames them into place, the manifest last. The folder has
the run's name and is locked while the run writes. The lock prevents two processes from using one name, and distinguishes the folder
of a killed run from that of a run that still writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError, OutputError
from scale_rae.files import write_new
from scale_rae.jsonio import dump_json, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PICTURE_FORMS = ("png", "jpeg", "webp")


@dataclass
class Sample:
    """One image to save: pixels with the text that goes into the PNG, a latent, or both.

    The half-formed picture of a dropped candidate has a `mark` in its name instead of a number, and is listed apart.
    """

    image: Image.Image | None = None
    latent: Tensor | None = None
    text: Mapping[str, str] | None = None
    mark: str = ""


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


def save_run(
    folder: Path, manifest: dict[str, Any], samples: Sequence[Sample], time_of_run: str, label: str = ""
) -> dict[str, Any]:
    """Writes one run and returns its manifest, completed by the paths and the seconds that writing took.

    Names begin `sample_<time_of_run><label>`; several samples get _00, _01, …, and samples with a mark, which come last, get
    that. If a file of that name exists, -2, -3, … is
    appended.

    Raises:
        OutputError: when a file cannot be written; then no file of the run is left.
    """
    start = time.perf_counter()
    several = sum(not sample.mark for sample in samples) > 1
    marks = [sample.mark or (f"_{i:02}" if several else "") for i, sample in enumerate(samples)]
    suffixes = [m + ".png" for m, s in zip(marks, samples, strict=True) if s.image is not None]
    suffixes += [m + "_latent.pt" for m, s in zip(marks, samples, strict=True) if s.latent is not None]
    suffixes.append("_manifest.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _reserved(folder, f"sample_{time_of_run}{label}", suffixes) as (stem, staging):
            placed: list[Path] = []
            try:
                images: list[str] = []
                latents: list[str] = []
                marked: list[str] = []
                for mark, sample, png in zip(marks, samples, _pngs(samples), strict=True):
                    if png is not None:
                        (marked if sample.mark else images).append(stem + mark + ".png")
                        write_new(staging / (stem + mark + ".png"), png)
                    if sample.latent is not None:
                        latents.append(stem + mark + "_latent.pt")
                        write_new(staging / latents[-1], latent_bytes(sample.latent))
                paths = [str(folder / name) for name in latents]
                complete = manifest | {
                    "output_images": [str(folder / name) for name in images],
                    "latent_path": paths[0] if paths else None,
                    "latent_paths": paths,
                    **({"dropped_images": [str(folder / name) for name in marked]} if marked else {}),
                    "seconds": manifest.get("seconds", {}) | {"writing": round(time.perf_counter() - start, 3)},
                }
                last = f"{stem}_manifest.json"
                write_new(staging / last, (dump_json(complete, indent=2) + "\n").encode())
                for name in (*images, *latents, *marked, last):
                    placed.append(folder / name)
                    (staging / name).rename(folder / name)
            except BaseException:  # Ctrl-C too
                for path in placed:
                    path.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise OutputError(
            f"{folder}: the results cannot be written ({e.strerror or e}); "
            "make room or permission there, or choose another --output-dir"
        ) from e
    return complete


def _pngs(samples: Sequence[Sample]) -> Iterator[bytes | None]:
    """The PNG of each sample, None if it has no image; up to four are encoded at once."""

    def png(sample: Sample) -> bytes | None:
        return None if sample.image is None else png_bytes(sample.image, sample.text or {})

    if len(samples) < 2:
        yield from map(png, samples)
        return
    with ThreadPoolExecutor(min(len(samples), 4)) as pool:
        yield from pool.map(png, samples)


@contextlib.contextmanager
def _reserved(folder: Path, stem: str, suffixes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """For a `with`: the first of stem, stem-2, … that is free, and a folder that reserves it and is removed at the end."""
    attempt, count = stem, 1
    while True:
        staging = folder / f".{attempt}.tmp"
        with held(staging) as mine:
            if mine and not any(os.path.lexists(folder / (attempt + suffix)) for suffix in suffixes):
                yield attempt, staging
                return
        count += 1
        attempt = f"{stem}-{count}"


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

    `quality` is that of JPEG and WebP, 0 to 100. WebP is lossless at 100.
    """
    from PIL import ExifTags
    from PIL.Image import Exif

    if form == "png":
        return png_bytes(image, text)
    exif = Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(dict(text))  # ASCII, as EXIF wants it
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
