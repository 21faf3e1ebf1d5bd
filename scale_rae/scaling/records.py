"""The record of a batch of a prompt's samples, or of an adaptive search's wave; with a checksum.

Nothing is believed because it is in the folder: a record is read only as far as it is what this program writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale_rae import acceptance
from scale_rae.acceptance import Candidate
from scale_rae.errors import first_line
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.scaling.experiment import candidate_of
from scale_rae.scaling.settings import Settings

# What version 0.1.0 wrote into every metadata.jsonl. Fields that came later may be missing in its experiments.
FIRST_FIELDS = {"index", "prompt", "request", "output_text", "n_samples", "scaling_rounds", "qa_mode", "reward"}
FIRST_FIELDS |= {"image_seeds", "all_ir_scores", "top_ir_indices", "text_responses"}


@dataclass(frozen=True)
class Batch:
    """What is known of samples `start` … `start + len(judged) - 1` of a prompt."""

    start: int
    output_text: str
    seeds: list[int]
    judged: list[dict[str, Any]]  # entries of text_responses
    rewards: list[float] | None
    files: dict[str, str]  # name in samples/, or below the prompt's folder -> SHA-256
    candidates: list[dict[str, Any]] | None = None  # of an adaptive search's wave, as metadata.jsonl has them

    @property
    def samples(self) -> range:
        return range(self.start, self.start + len(self.judged))

    @property
    def name(self) -> str:
        """The name of its record: by its samples, or by the candidates of its wave."""
        numbers = [c["candidate"] for c in self.candidates] if self.candidates else self.samples
        return f"{numbers[0]:05}-{numbers[-1]:05}{'-revived' if self.revives else ''}.json"

    @property
    def revives(self) -> bool:
        """Whether its candidates had been dropped in earlier waves."""
        return bool(self.candidates and self.candidates[0]["dropped_for"] is not None)

    def record(self) -> dict[str, Any]:
        """Its fields as they are stored."""
        return {name: value for name, value in self.__dict__.items() if name != "candidates" or value is not None}

    def searched(self) -> list[Candidate]:
        """The candidates of its wave.

        Raises:
            ValueError, KeyError, TypeError: when they are not as `candidate_record` makes them.
        """
        found = []
        for record in self.candidates or ():
            image = record["image"]
            place = None if image is None else image - self.start
            reward = None if place is None or self.rewards is None else self.rewards[place]
            found.append(candidate_of(record, None if place is None else self.judged[place], reward))
        return found


def seal(value: Mapping[str, Any]) -> bytes:
    """An object as JSON, with the SHA-256 of that JSON as its last field."""
    digest = hashlib.sha256(dump_json(value).encode()).hexdigest()
    return dump_json({**value, "sha256": digest}).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The object that `seal` made to bytes, without the checksum.

    Raises:
        ValueError: when not every byte is as it was.
    """
    value = object_in(data)
    value.pop("sha256", None)
    if not _writes(lambda: seal(value), data):
        raise ValueError("its checksum does not fit")
    return value


def object_in(data: bytes) -> dict[str, Any]:
    """The JSON object in bytes.

    Raises:
        ValueError: when they are something else.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _writes(write: Callable[[], bytes], data: bytes) -> bool:
    """Whether a value that was read from somewhere is written as those bytes."""
    try:
        return write() == data
    except (ValueError, RecursionError):  # half surrogates, infinite numbers, brackets in brackets in …
        return False


def read_batch(data: bytes, settings: Settings) -> tuple[bool, Batch]:
    """The batch of a record, and whether the record has a checksum.

    Raises:
        ValueError: when it is not a record of this experiment, or not as it was written.
    """
    value = object_in(data)
    is_sealed = "sha256" in value
    if is_sealed:
        value = unseal(data)
    elif not _writes(lambda: dump_json(value).encode(), data):
        raise ValueError("not as it was written")
    expected = {f.name for f in dataclasses.fields(Batch)}
    if value.keys() != (expected if settings.is_adaptive else expected - {"candidates"}):
        raise ValueError("other fields than a record's")
    start, seeds, judged, rewards, files = (value[n] for n in ("start", "seeds", "judged", "rewards", "files"))
    if not (_is_whole(start, settings.total + settings.is_adaptive) and isinstance(value["output_text"], str)):
        raise ValueError("start or output_text is of another type or too large")
    least = 0 if settings.is_adaptive else 1
    if not (isinstance(judged, list) and least <= len(judged) <= settings.total - start):
        raise ValueError("judged is not a list of the experiment's size")
    if not all(isinstance(entry, dict) and isinstance(entry.get("answer"), str) for entry in judged):
        raise ValueError("judged has an entry without an answer")
    if not (isinstance(seeds, list) and len(seeds) == len(judged) and all(_is_whole(n, 1 << 63) for n in seeds)):
        raise ValueError("seeds are not one whole number for each image")
    if settings.reward is None and rewards is not None:
        raise ValueError("rewards, of which the experiment has none")
    if settings.reward is not None and not (
        isinstance(rewards, list) and len(rewards) == len(judged) and all(_is_number(x) for x in rewards)
    ):
        raise ValueError("rewards are not one number for each image")
    batch = Batch(**value)
    names = {f"{i:05}.png" for i in batch.samples}
    if settings.save_latents:
        names |= {f"{i:05}_latent.pt" for i in batch.samples}
    if settings.is_adaptive:
        candidates = _searched(batch)
        if settings.adaptive.save_dropped:
            names |= {dropped_name(c) for c in candidates if c.fate == acceptance.DROPPED}
    if not (isinstance(files, dict) and files.keys() == names and all(isinstance(sha, str) for sha in files.values())):
        raise ValueError("files are not those of its samples")
    return is_sealed, batch


def dropped_name(candidate: Candidate) -> str:
    """The file of a dropped candidate's picture, below the prompt's folder."""
    return f"dropped/{candidate.number:05}.png"


def _searched(batch: Batch) -> list[Candidate]:
    """The candidates of a wave's record.

    They are numbered one by one; revived ones are in the order of their numbers.

    Raises:
        ValueError: when they are not what such a record holds.
    """
    try:
        candidates = batch.searched()
        images = [c["image"] for c in batch.candidates or () if c["image"] is not None]
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"candidates are not those of a wave ({first_line(e)})") from e
    numbers = [c.number for c in candidates]
    revived = {c.is_revived for c in candidates}
    if len(revived) != 1 or (revived == {True} and any(c.fate == acceptance.DROPPED for c in candidates)):
        raise ValueError("candidates are none, or only some of them are revived, or a revived one is dropped again")
    expected = sorted(set(numbers)) if revived == {True} else list(range(numbers[0], numbers[0] + len(numbers)))
    if numbers != expected or images != list(batch.samples):
        raise ValueError("candidates or their images are not numbered one by one")
    return candidates


def consecutive(batches: Sequence[Batch]) -> list[Batch]:
    """The waves, in order, up to the first that does not follow on those before.

    A wave of revived candidates is the last.
    """
    waves: list[Batch] = []
    begun: dict[int, str] = {}  # fate by candidate
    for batch in sorted(batches, key=lambda b: (b.revives, b.name)):
        numbers = [c["candidate"] for c in batch.candidates or ()]
        follows = (
            all(begun.get(n) == acceptance.DROPPED for n in numbers) if batch.revives else numbers[:1] == [len(begun)]
        )
        if not follows or batch.start != sum(len(wave.judged) for wave in waves):
            break
        waves.append(batch)
        begun |= {c["candidate"]: c["fate"] for c in batch.candidates or ()}
    return waves


def _is_whole(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def says_the_same(metadata: Mapping[str, Any], batch: Batch) -> bool:
    """Whether a prompt's metadata.jsonl agrees with all that a batch's record puts into it."""
    try:
        entries, seeds, rewards = (metadata[n] for n in ("text_responses", "image_seeds", "all_ir_scores"))
        return (
            metadata["output_text"] == batch.output_text
            and all(
                dump_json(entries[str(i)]) == dump_json(entry)
                for i, entry in zip(batch.samples, batch.judged, strict=True)
            )
            and seeds[batch.start : batch.samples.stop] == batch.seeds
            and (
                rewards is None if batch.rewards is None else rewards[batch.start : batch.samples.stop] == batch.rewards
            )
        )
    except (ValueError, RecursionError, LookupError, TypeError):
        return False


def is_record(found: bytes, expected: bytes) -> bool:
    """Whether a metadata.jsonl is the expected one, also as version 0.1.0 wrote it: with fewer fields."""
    if found == expected:
        return True
    try:
        there, now = object_in(found), object_in(expected)
    except ValueError:
        return False
    older = {name: value for name, value in now.items() if name in there}
    return older.keys() >= FIRST_FIELDS and found == (dump_json(older) + "\n").encode()
