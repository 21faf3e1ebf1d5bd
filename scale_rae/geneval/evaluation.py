"""`evaluate` judges every picture of a folder and writes results.jsonl.

An interrupted evaluation is resumed. Pictures are judged in batches that depend on the folder alone, so verdicts do not
depend on devices or interruptions.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from scale_rae.errors import InputError
from scale_rae.geneval.folders import GenEvalFolder, Missing, metadata_text, read_folder, sample_name
from scale_rae.geneval.journal import Journal, Judged, Key
from scale_rae.geneval.judges import Judge, JudgeChoice, metadata_check
from scale_rae.geneval.results import Result, beside, default_out, to_lines
from scale_rae.images import decode_image, read_image
from scale_rae.jsonio import dump_json
from scale_rae.scaling.replacing import check_outside, write_file

if TYPE_CHECKING:
    from PIL import Image

AHEAD = 2  # batches whose files are decoded while another is judged
_READERS = 8  # threads
FORMATS = ("PNG", "JPEG", "WEBP")  # some programs write JPEGs under names that end by .png


@dataclass(frozen=True)
class Task:
    """One picture to judge: its file, and its prompt's metadata."""

    path: str
    metadata: dict[str, Any]


Batch: TypeAlias = list[Task]
Judging: TypeAlias = Callable[[Sequence[Batch]], Iterable[tuple[int, list[Judged]]]]
"""Has batches judged: yields the number of each batch, in any order, with the verdict on each of its pictures."""
Watch: TypeAlias = Callable[[int, int], None]  # (pictures judged so far, pictures to judge)


@dataclass(frozen=True)
class Evaluation:
    """An evaluated folder: its results in order, verdicts by picture name, and what is missing."""

    folder: GenEvalFolder
    judge: dict[str, Any]
    out: Path
    results: list[Result]
    judged: dict[str, Judged]
    missing: list[Missing]
    new: int  # pictures judged in this run
    seconds: float

    @property
    def by_name(self) -> dict[str, Result]:
        """The results by the pictures' names."""
        return {result.filename: result for result in self.results}

    @property
    def missing_images(self) -> int:
        """How many pictures are known to be missing or damaged."""
        return sum(item.images for item in self.missing)


def open_folder(folder: Path, choice: JudgeChoice) -> GenEvalFolder:
    """The prompts of a folder that the judge can compare pictures with, and what is missing.

    Raises:
        InputError: when nothing in the folder can be evaluated. MissingExtraError: when the judge needs packages.
    """
    return read_folder(folder, metadata_check(choice))


def evaluate(
    read: GenEvalFolder,
    choice: JudgeChoice,
    identity: dict[str, Any],
    judging: Judging,
    batch_size: int,
    out: Path | None = None,
    watch: Watch = lambda done, total: None,
) -> Evaluation:
    """The evaluation of a folder, once its results file is written.

    Args:
        read: of `open_folder`; the folder is only read.
        identity: what the verdicts depend on (`judges.identity_of`); a journal of other verdicts is refused.
        judging: has batches judged, here or elsewhere.
        batch_size: pictures per batch.
        out: the results file; default: `default_out`. Its journal lies beside it.
        watch: called whenever a batch is judged.

    Raises:
        InputError: when the journal is another judge's.
        OutputError: when something cannot be written, or another evaluation writes to the same files.
        ScaleRAEError: when the judge's models cannot be loaded or run.
    """
    start = time.perf_counter()
    target = out or default_out(read.folder, choice.judge)
    check_outside(target, read.folder, "--out")
    texts = [metadata_text(prompt) for prompt in read.prompts]
    listed = [(p, sample, text) for p, text in zip(read.prompts, texts, strict=True) for sample in p.samples]
    names = [sample_name(p, sample) for p, sample, _ in listed]
    tasks = [Task(str(sample.path), p.metadata) for p, sample, _ in listed]
    with ThreadPoolExecutor(_READERS) as pool:
        hashes = list(pool.map(_hash_of, (task.path for task in tasks)))
    keys = [
        Key(name, picture or "", hashlib.sha256(text.encode()).hexdigest())
        for name, picture, (_, _, text) in zip(names, hashes, listed, strict=True)
    ]
    with Journal(beside(target, "journal.jsonl"), identity) as journal:
        groups = [range(i, min(i + batch_size, len(tasks))) for i in range(0, len(tasks), batch_size)]
        # A batch is judged whole, although some of its pictures may be known: on a GPU its rounding depends on all of them.
        todo = [group for group in groups if any(keys[i] not in journal.judged for i in group)]
        total, done = sum(map(len, todo)), 0
        watch(0, total)
        for number, judged in judging([[tasks[i] for i in group] for group in todo]):
            journal.add([(keys[i], found) for i, found in zip(todo[number], judged, strict=True)])
            done += len(judged)
            watch(done, total)
        verdicts = {name: journal.judged[key] for name, key in zip(names, keys, strict=True)}
    missing = list(read.missing)
    results = []
    for name, (prompt, _, text) in zip(names, listed, strict=True):
        if (problem := verdicts[name].problem) is not None:
            missing.append(Missing(name, problem, 1))
            continue
        found = verdicts[name]
        details = dump_json(found.details, ascii_only=True)
        tag = str(prompt.metadata.get("tag"))
        results.append(Result(name, tag, prompt.text, found.correct, found.reason, text, details))
    write_file(target, to_lines(results), read.folder, "--out")
    return Evaluation(read, identity, target, results, verdicts, missing, total, time.perf_counter() - start)


def judged_here(judge: Judge, batches: Iterable[Batch]) -> Iterator[list[Judged]]:
    """The verdicts of each batch in turn; files of the next batches are decoded on threads meanwhile."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Batch, list[Future[Image.Image | str]]]] = deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(_open, task.path) for task in batch]))
            if len(waiting) > AHEAD:
                yield _judge(judge, *waiting.popleft())
        while waiting:
            yield _judge(judge, *waiting.popleft())


def _judge(judge: Judge, batch: Batch, opened: Sequence[Future[Image.Image | str]]) -> list[Judged]:
    pictures = [future.result() for future in opened]
    good = {i: picture for i, picture in enumerate(pictures) if not isinstance(picture, str)}
    verdicts = judge.judge(list(good.values()), [batch[i].metadata for i in good]) if good else []
    found = dict(zip(good, verdicts, strict=True))
    return [found[i] if i in found else Judged(problem=str(picture)) for i, picture in enumerate(pictures)]


def _open(path: str) -> Image.Image | str:
    """A picture as RGB, or why it cannot be read."""
    try:
        return decode_image(read_image(path), path, formats=FORMATS, on_white=False)
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")


def _hash_of(path: str) -> str | None:
    """The hash of a file's bytes; None when it cannot be read, which is reported when it is opened."""
    try:
        return hashlib.sha256(read_image(path)).hexdigest()
    except InputError:
        return None
