"""Results as the demo page shows them: images with their files, previews, rankings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)  # two are equal only if they are the same object
class SavedImage:
    """One drawn image and its files; `command` is the command line that draws it again."""

    image: Image.Image
    latent: Tensor
    seed: int
    request: str
    command: str
    png: Path
    latent_file: Path
    manifest: Path


@dataclass(frozen=True)
class Preview:
    """A moment of sampling: `done` is the share of all network evaluations, `pictures` are the images as they form."""

    done: float
    text: str
    pictures: list[Image.Image]


@dataclass(frozen=True)
class DrawResult:
    """The model's answer to a message: text, and images if the text asked for some. `command` draws all of them again."""

    text: str
    images: list[SavedImage]
    command: str
    seconds: float


@dataclass(frozen=True)
class RankedImage:
    """One image of a best of N: `place` in the ranking from 0, scores and, for a dropped one, the reason `why`."""

    image: Image.Image
    latent: Tensor
    seed: int
    place: int
    kept: bool
    answer: str
    scores: dict[str, float | None]
    why: str | None


@dataclass(frozen=True)
class RankingState:
    """A best of N at some moment: the images so far, best first. `saved`, in that order, is filled at the end."""

    images: list[RankedImage]
    total: int
    progress: str
    saved: list[SavedImage]


@dataclass(frozen=True)
class CandidateCard:
    """One candidate of a search at some moment.

    `fate` is "" while it forms, then accepted, rejected or dropped; `why` is the reason unless it was accepted. `place` is
    its rank from 0 if it is kept. `answer` and `scores` are those of the last look, at time `t` (None for a finished image).
    """

    picture: Image.Image | None
    number: int
    seed: int
    fate: str
    place: int | None
    answer: str | None
    t: float | None
    scores: dict[str, float | None]
    why: str | None
    evaluations: float


@dataclass(frozen=True)
class SearchState:
    """A search at some moment: `done` is a share of the work. `saved`, the kept images best first, is filled at the end."""

    cards: list[CandidateCard]
    done: float
    progress: str
    saved: list[SavedImage]
