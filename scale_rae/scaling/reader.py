"""An experiment on disk, read with bounds: its complete prompts, and why others are incomplete.

An experiment is a folder of prompt folders 00000, 00001, …, each with samples/00000.png … and one JSON object in
metadata.jsonl. Nothing in it is changed.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED
from scale_rae.errors import InputError, counted, first_line
from scale_rae.files import check_file, check_name, read_bytes
from scale_rae.jsonio import MOST_BYTES, parse_json
from scale_rae.ranking import Verdicts
from scale_rae.scaling.replacing import restored, short_name

FATES = (ACCEPTED, REJECTED, DROPPED)


@dataclass(frozen=True)
class Tried:
    """One candidate of an adaptive search: what became of it, and its picture, if there is one."""

    number: int
    fate: str
    image: int | None  # its number among the prompt's images, if it was drawn to the end
    dropped_at: float | None  # t
    dropped_for: str | None  # of one that was revived
    reason: str | None
    evaluations: float
    picture: Path | None


@dataclass(frozen=True)
class Searched:
    """What an adaptive search did for a prompt; `evaluations` count looks at their cost."""

    candidates: list[Tried]
    evaluations: float
    accepted: int
    filled_up: int  # kept images that were not accepted

    def count(self, fate: str) -> int:
        """How many candidates had that fate."""
        return sum(c.fate == fate for c in self.candidates)


@dataclass(frozen=True)
class Prompt:
    """A complete prompt folder: its metadata, and its images in the order in which they were drawn."""

    folder: Path
    metadata: dict[str, Any]
    images: list[Path]
    searched: Searched | None = None  # of an adaptive search

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def text(self) -> str:
        return str(self.metadata["prompt"])

    @property
    def file(self) -> Path:
        return self.folder / "metadata.jsonl"

    @property
    def verdicts(self) -> Verdicts:
        """The model's judgements and the rewards of the images."""
        return Verdicts.of(self.metadata, len(self.images), f"{self.file}: ")

    def answer(self, image: int) -> str | None:
        """yes, no or uncertain; None when the model was not asked about the image."""
        return self.verdicts.answer(image)

    def rewards_or_none(self) -> Sequence[float | None]:
        """The reward of each image, to be shown.

        It is None for every image when all_ir_scores is damaged or missing.
        """
        try:
            return self.verdicts.rewards() or [None] * len(self.images)
        except InputError:
            return [None] * len(self.images)

    def seed(self, image: int) -> Any:
        """The seed of an image's noise; None when it is not known."""
        seeds = self.metadata.get("image_seeds")
        return seeds[image] if isinstance(seeds, list) and image < len(seeds) else None


@dataclass(frozen=True)
class Incomplete:
    """A prompt folder that lacks a result, and why."""

    folder: Path
    reason: str
    text: str | None = None  # the prompt, where it is known


@dataclass(frozen=True)
class Experiment:
    """An experiment's prompts. `n_samples` is None where experiment.json is missing or has none."""

    folder: Path
    n_samples: int | None
    prompts: list[Prompt]
    incomplete: list[Incomplete] = field(default_factory=list)
    not_begun: int = 0  # prompts that experiment.json counts and that have no folder
    settings: Mapping[str, Any] = field(default_factory=dict)  # as experiment.json has them

    def keep_of(self, prompt: Prompt, keep: int | None = None) -> int:
        """How many of a prompt's images to keep: `keep`, else the experiment's n_samples.

        It is never more than the prompt has. Folders of the official code have no n_samples; there, the length of
        top_ir_indices counts.

        Raises:
            InputError: when nothing says how many.
        """
        value: Any = keep if keep is not None else self.n_samples
        if value is None:
            value = prompt.metadata.get("n_samples")
        if value is None and isinstance(prompt.metadata.get("top_ir_indices"), list):
            value = len(prompt.metadata["top_ir_indices"]) or None
        if value is None:
            raise InputError(f"{prompt.file}: has no n_samples, nor has experiment.json; say how many with --keep N")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{prompt.file}: n_samples is {value!r}, not a number of images")
        return min(value, len(prompt.images))


def local_folder(folder: Path) -> Path:
    """An experiment's folder as an absolute path.

    Raises:
        InputError: for a URL of a store, whose results are to be copied first, and a name that no folder can have.
    """
    check_name(folder, "experiment")
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):  # a Path has lost the second slash
        raise InputError(
            f"{str(folder).replace(':/', '://', 1)}: is not a folder; copy the results of a store to one first "
            "(aws s3 sync, gcloud storage rsync)"
        )
    return Path(os.path.abspath(folder))  # noqa: PTH100 - a name for `.`, without following links


def prompt_folders(folder: Path, advice: str = "give one that `scale t2i` made") -> list[Path]:
    """The prompt folders of an experiment, by number.

    What a killed `select` left half done is mended first.

    Raises:
        InputError: when the folder has none, or cannot be read; the message ends by `advice`.
    """
    try:
        kind = restored(folder).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{folder}: no such folder; {advice}") from e
    except OSError as e:  # no permission, or a name that no file system takes
        raise InputError(f"{short_name(folder)}: cannot be read ({e.strerror}); {advice}") from e
    if not stat.S_ISDIR(kind):
        raise InputError(f"{folder}: is not a folder; {advice}")
    try:
        names = sorted((p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), key=_by_number)
        if not names:
            inner = sorted(p.parent for p in folder.glob("*/[0-9]*") if p.name.isdecimal() and p.is_dir())
            inner += sorted(p.parent for p in folder.glob("*/*/[0-9]*") if p.name.isdecimal() and p.is_dir())
            hint = f"; did you mean {inner[0]}?" if inner else ""
            raise InputError(f"{folder}: not an experiment, since it has no folders 00000, 00001, …{hint}")
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror})") from e
    return names


def read_experiment(folder: Path) -> Experiment:
    """The experiment in a folder; its incomplete prompts are listed with the reason.

    Raises:
        InputError: when the folder is no experiment, or experiment.json is damaged.
    """
    folder = local_folder(folder)
    names = prompt_folders(folder)
    prompts: list[Prompt] = []
    incomplete: list[Incomplete] = []
    for name in names:
        result = _read_prompt(name)
        if isinstance(result, Prompt):
            prompts.append(result)
        else:
            incomplete.append(result)
    settings, count = read_settings(folder)
    return Experiment(folder, settings.get("n_samples"), prompts, incomplete, max(0, count - len(names)), settings)


def _by_number(path: Path) -> tuple[int, str]:
    return int(path.name), path.name


def read_settings(folder: Path) -> tuple[dict[str, Any], int]:
    """(settings, number of prompts) as experiment.json has them; empty and 0 if it is missing.

    Raises:
        InputError: when experiment.json is damaged.
    """
    path = folder / "experiment.json"
    try:
        value = read_object(path, "experiment.json")
    except FileNotFoundError:
        return {}, 0
    except ValueError as e:
        if path.is_file() and not path.stat().st_size:  # left by a crash; each prompt's record says what is needed
            return {}, 0
        raise InputError(f"{path}: {e}") from e
    settings = value.get("settings")
    if not isinstance(settings, dict):
        settings = {}
    n_samples = settings.get("n_samples")
    prompts = value.get("prompts")
    count = prompts.get("count") if isinstance(prompts, dict) else None
    if not isinstance(count, int):
        count = 0
    if n_samples is not None and (not isinstance(n_samples, int) or isinstance(n_samples, bool) or n_samples < 1):
        raise InputError(f"{path}: settings.n_samples is {n_samples!r}, not a number of images")
    return settings, count


def read_object(path: Path, what: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes; `what` names the file in messages.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not such an object; the message does not name the file.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        raise
    except OSError:
        pass  # the file may be there, and reading it says what is wrong
    try:
        value = parse_json(read_bytes(path, most, what))
    except InputError as e:
        raise ValueError(str(e).removeprefix(f"{path}: ")) from e
    except ValueError as e:
        raise ValueError(f"is not valid JSON ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def _read_prompt(folder: Path) -> Prompt | Incomplete:
    """The prompt in a folder, every image of it decoded once; or why it is incomplete."""
    try:
        metadata = read_object(folder / "metadata.jsonl", "metadata.jsonl")
    except FileNotFoundError:
        return Incomplete(folder, *why_no_record(folder))
    except ValueError as e:
        return Incomplete(folder, f"metadata.jsonl {e}")
    text = metadata.get("prompt")
    if not isinstance(text, str):
        return Incomplete(folder, "metadata.jsonl has no prompt")
    samples = folder / "samples"
    try:
        found = {
            int(m[1]): p for p in samples.iterdir() if (m := re.fullmatch(r"([0-9]+)\.png", p.name)) and len(m[1]) >= 5
        }
    except OSError:
        return Incomplete(folder, "has no samples folder", text)
    count = expected_images(metadata)
    if count is None:
        count = max(found, default=-1) + 1
    if not count:
        return Incomplete(folder, "has no images", text)
    missing = [f"{i:05}.png" for i in range(count) if i not in found]
    if missing:
        return Incomplete(folder, f"samples lacks {listed(missing)}", text)
    if len(found) > count:
        return Incomplete(folder, f"samples holds {counted(len(found), 'image')}, metadata.jsonl has {count}", text)
    images = [found[i] for i in range(count)]
    for image in images:
        if reason := _unreadable(image):
            return Incomplete(folder, f"samples/{image.name} {reason}", text)
    try:
        searched = _searched(folder, metadata, images)
    except ValueError as e:
        return Incomplete(folder, str(e), text)
    return Prompt(folder, metadata, images, searched)


def _searched(folder: Path, metadata: dict[str, Any], images: Sequence[Path]) -> Searched | None:
    """What the metadata say of an adaptive search; None if there was none.

    Raises:
        ValueError: when the record or a dropped candidate's picture is damaged; the message names the field or file.
    """
    if metadata.get("search") != "adaptive":
        return None
    records = metadata.get("candidates")
    if not isinstance(records, list):
        raise ValueError("metadata.jsonl: candidates is not a list")
    tried = [_tried(record, place, folder, images) for place, record in enumerate(records)]
    evaluations = _number(metadata, "evaluations", "metadata.jsonl: ")
    accepted, filled_up = metadata.get("n_accepted"), metadata.get("filled_up")
    if type(accepted) is not int or not 0 <= accepted <= len(tried):
        raise ValueError(f"metadata.jsonl: n_accepted is {accepted!r:.40}, not a number of candidates")
    if not isinstance(filled_up, list):
        raise ValueError("metadata.jsonl: filled_up is not a list")
    return Searched(tried, evaluations, accepted, len(filled_up))


def _tried(record: Any, place: int, folder: Path, images: Sequence[Path]) -> Tried:
    """The candidate of the record at a place in `candidates`.

    Raises:
        ValueError: as `_searched`.
    """
    where = f"metadata.jsonl: candidates[{place}]"
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object")
    number, image, fate = (record.get(name) for name in ("candidate", "image", "fate"))
    if type(number) is not int or number != place:
        raise ValueError(f"{where}.candidate is {number!r:.40}, not {place}")
    if image is not None and (type(image) is not int or not 0 <= image < len(images)):
        raise ValueError(f"{where}.image is {image!r:.40}, not one of {counted(len(images), 'image')}")
    if fate not in FATES:
        raise ValueError(f"{where}.fate is {fate!r:.40}, not one of {', '.join(FATES)}")
    dropped_at = None if record.get("dropped_at") is None else _number(record, "dropped_at", f"{where}.")
    dropped = folder / "dropped" / f"{number:05}.png"
    picture = images[image] if image is not None else dropped if os.path.lexists(dropped) else None
    if picture is dropped and (problem := _unreadable(dropped)):
        raise ValueError(f"dropped/{dropped.name} {problem}")
    evaluations = _number(record, "evaluations", f"{where}.")
    why, reason = (text if isinstance(text := record.get(name), str) else None for name in ("dropped_for", "reason"))
    return Tried(number, fate, image, dropped_at, why, reason, evaluations, picture)


def _number(record: dict[str, Any], name: str, where: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}{name} is {value!r:.40}, not a number from 0 up")
    return float(value)


def why_no_record(folder: Path) -> tuple[str, str | None]:
    """Why a prompt folder has no metadata.jsonl, and the prompt's text if its error.json has it."""
    path = folder / "error.json"
    if not os.path.lexists(path):
        return "has no metadata.jsonl", None
    try:
        value = read_object(path, "error.json")
    except (OSError, ValueError):
        return "failed (error.json)", None
    message = next((value[key] for key in ("error", "message", "reason") if isinstance(value.get(key), str)), None)
    prompt = value.get("prompt")
    reason = f"failed: {' '.join(message.split())}" if message else "failed (error.json)"
    return reason, prompt if isinstance(prompt, str) else None


def expected_images(metadata: dict[str, Any]) -> int | None:
    """How many images a prompt has by its metadata; None when the metadata does not say."""
    for name in ("original_indices", "image_seeds"):
        if isinstance(metadata.get(name), list):
            return len(metadata[name])
    n_samples, rounds = metadata.get("n_samples"), metadata.get("scaling_rounds")
    if isinstance(n_samples, int) and isinstance(rounds, int):
        return n_samples * rounds
    return None


def listed(names: Sequence[str]) -> str:
    """The names, or the first three of them and how many more there are."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _unreadable(path: Path) -> str | None:
    """Why an image cannot be read; None if it can."""
    from PIL import Image

    try:
        check_file(path, "image")  # opening a pipe would wait for ever
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
    except OSError as e:
        return f"cannot be read ({e.strerror})" if e.strerror else "is damaged or not an image"
    except Exception:  # Pillow's decoders raise SyntaxError, ValueError, struct.error, DecompressionBombError, …
        return "is damaged or not an image"
    return None
