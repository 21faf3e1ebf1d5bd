"""The demo's limits on what visitors send, and checks whose errors are sentences. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from scale_rae.errors import InputError, counted
from scale_rae.options import PROMPT_PREFIX, Sampling, SearchOptions

MOST_IMAGES = 16
MOST_CANDIDATES = SearchOptions().max_candidates  # of a search
MOST_STEPS = 250
ANSWER_TOKENS = 128
LARGEST_FILE = 64 << 20  # bytes of a picture or latent
MOST_CHARACTERS = 4000  # of a prompt or question


def check_sampling(sampling: Sampling) -> None:
    """Raises InputError for values that a visitor may not ask for."""
    if not 1 <= sampling.num_images <= MOST_IMAGES:
        raise InputError(f"{sampling.num_images} images: the page draws 1 to {MOST_IMAGES} at a time.")
    if sampling.options.steps > MOST_STEPS:
        raise InputError(f"{sampling.options.steps} steps: the page takes at most {MOST_STEPS}.")
    sampling.check()


def check_search(keep: int, most: int) -> None:
    """Raises InputError for numbers of images to keep and of candidates that a visitor may not ask for."""
    if not 1 <= most <= MOST_CANDIDATES:
        raise InputError(f"{most} candidates: the page begins 1 to {MOST_CANDIDATES}.")
    if not 1 <= keep <= min(most, MOST_IMAGES):
        raise InputError(
            f"Of at most {counted(most, 'candidate')}, {keep} cannot be kept: keep 1 to {min(most, MOST_IMAGES)}."
        )


def check_length(text: str, what: str) -> None:
    """Raises InputError for a text that is longer than the page's fields."""
    if len(text) > MOST_CHARACTERS + len(PROMPT_PREFIX):
        raise InputError(f"The {what} has {len(text):,} characters: the page takes at most {MOST_CHARACTERS:,}.")


def without_folder(text: str, file: Path) -> str:
    """An error's text with the file's name in place of its path, which only the server's user may see."""
    return text.replace(str(file), file.name)
