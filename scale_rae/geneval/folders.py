"""Folders in GenEval's layout: numbered folders with metadata.jsonl and samples/NNNN.png.

Nothing in them is changed. An experiment of `scale-rae scale`, a selection of `scale-rae select` and another model's
pictures all have this layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, counted
from scale_rae.jsonio import dump_json
from scale_rae.scaling.reader import (
    expected_images,
    listed,
    local_folder,
    prompt_folders,
    read_object,
    read_settings,
    why_no_record,
)

# What GenEval's own metadata have. A record of an experiment has scores and replies besides, which results do not repeat.
_OWN_FIELDS = ("tag", "include", "exclude", "prompt", "index")
_PICTURE = re.compile(r"([0-9]+)\.png")


@dataclass(frozen=True)
class Sample:
    """One picture of a prompt: its number among the prompt's pictures, by its name, and its file."""

    number: int
    path: Path


@dataclass(frozen=True)
class PromptFolder:
    """A prompt's metadata, and its pictures in the order of their numbers."""

    folder: Path
    record: dict[str, Any]
    samples: list[Sample]

    @property
    def name(self) -> str:
        """The folder's name, which is a number."""
        return self.folder.name

    @property
    def is_scaled(self) -> bool:
        """Whether the metadata have an experiment's scores."""
        return "text_responses" in self.record or "all_ir_scores" in self.record

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata: the record, without what an experiment added to it."""
        if not self.is_scaled:
            return self.record
        return {name: value for name, value in self.record.items() if name in _OWN_FIELDS}

    @property
    def text(self) -> str:
        """The prompt; empty where the metadata have none."""
        prompt = self.record.get("prompt")
        return prompt if isinstance(prompt, str) else ""


@dataclass(frozen=True)
class Missing:
    """A folder or file that cannot be evaluated: its name, the reason, and its number of pictures."""

    where: str
    reason: str
    images: int = 0

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    def record(self) -> dict[str, Any]:
        """What is missing, as JSON values."""
        return {"where": self.where, "reason": self.reason, "images": self.images}


@dataclass(frozen=True)
class GenEvalFolder:
    """The prompts of a folder that can be evaluated, and what is missing."""

    folder: Path
    prompts: list[PromptFolder]
    missing: list[Missing] = field(default_factory=list)

    @property
    def is_experiment(self) -> bool:
        """Whether every prompt has an experiment's scores, and the folder is no selection from an experiment."""
        return all(p.is_scaled and "original_indices" not in p.record for p in self.prompts)


def read_folder(folder: Path, check: Callable[[Mapping[str, Any]], None]) -> GenEvalFolder:
    """The prompts of a folder in GenEval's layout; `check` raises InputError for unusable metadata.

    Raises:
        InputError: when the folder has no numbered folders, or none of them can be evaluated.
    """
    folder = local_folder(folder)
    prompts: list[PromptFolder] = []
    missing: list[Missing] = []
    names = prompt_folders(folder, "give one with pictures in GenEval's layout, such as `scale t2i` makes")
    for path in names:
        try:
            prompt, lacking = _read_prompt(path, check)
        except ValueError as e:
            missing.append(Missing(path.name, str(e), _count(path)))
            continue
        prompts.append(prompt)
        missing += lacking
    try:
        _, expected = read_settings(folder)
    except InputError as e:
        expected = 0
        missing.append(Missing("experiment.json", str(e).removeprefix(f"{folder / 'experiment.json'}: ")))
    if expected > len(names):
        not_begun = expected - len(names)
        missing.append(
            Missing("experiment.json", f"names {counted(expected, 'prompt')}, of which {not_begun} not begun")
        )
    if not prompts:
        raise InputError(f"{folder}: no prompt can be evaluated; {missing[0]}" + _more(len(missing) - 1))
    return GenEvalFolder(folder, prompts, missing)


def metadata_text(prompt: PromptFolder) -> str:
    """GenEval's metadata of a prompt as the original writes them into results: JSON text in ASCII."""
    return dump_json(prompt.metadata, ascii_only=True)


def sample_name(prompt: PromptFolder, sample: Sample) -> str:
    """A picture's name below the evaluated folder: "00000/samples/00000.png" on every system."""
    return f"{prompt.name}/samples/{sample.path.name}"


def _more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def _read_prompt(folder: Path, check: Callable[[Mapping[str, Any]], None]) -> tuple[PromptFolder, list[Missing]]:
    """A prompt, and what of it is missing.

    Raises:
        ValueError: saying why, when it cannot be evaluated; the message does not name the folder.
    """
    try:
        record = read_object(folder / "metadata.jsonl", "metadata.jsonl")
    except FileNotFoundError:
        raise ValueError(why_no_record(folder)[0]) from None
    except ValueError as e:
        raise ValueError(f"metadata.jsonl: {e}") from e
    try:
        prompt = PromptFolder(folder, record, _samples(folder))
    except OSError as e:
        raise ValueError(f"samples: cannot be read ({e.strerror})") from e
    try:
        check(prompt.metadata)
    except InputError as e:
        raise ValueError(f"metadata.jsonl: {str(e).removeprefix('metadata: ')}") from e
    if not prompt.samples:
        raise ValueError("has no pictures samples/00000.png, …")
    expected = expected_images(record)
    numbers = {sample.number for sample in prompt.samples}
    found: list[Missing] = []
    if expected is not None and (lacking := sorted(set(range(expected)) - numbers)):
        names = listed([f"{number:05}.png" for number in lacking])
        found.append(
            Missing(f"{folder.name}/samples", f"lacks {names} of {counted(expected, 'picture')}", len(lacking))
        )
    return prompt, found


def _count(folder: Path) -> int:
    try:
        return len(_samples(folder))
    except OSError:
        return 0


def _samples(folder: Path) -> list[Sample]:
    """The pictures in a prompt's folder, by number; other files are passed over, as the original does."""
    try:
        paths = list((folder / "samples").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [Sample(int(match[1]), path) for path in paths if (match := _PICTURE.fullmatch(path.name))]
    return sorted(found, key=lambda sample: (sample.number, sample.path.name))
