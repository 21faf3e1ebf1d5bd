"""Reads and writes an experiment's folder, every file whole or not at all.

    experiment.json                    settings, identities of model and reward, versions; seconds at the end
    00000/samples/00000.png …          every image drawn, and 00000_latent.pt with --save-latents
    00000/metadata.jsonl               one object; written when all images of the prompt are there
    00000/error.json                   instead of it, when the prompt failed
    logs/worker-0.log
    00000/dropped/00003.png            candidate 3's picture as it was dropped, with --save-dropped
    .work/batches/00000/00000-00007.json   scores and SHA-256 of the files of samples 0 to 7, written after them
    .work/experiment.json              a copy of what experiment.json said at the start
    .work/locks/, .work/tmp/, .work/run.lock

A batch is finished when its record is there and every file it names has the recorded SHA-256. That is all that resuming
needs to know: metadata.jsonl is a function of the batches. Locks (locks.py) end with the process, however that ends.
A prompt is finished once metadata.jsonl has been renamed into place: an error.json beside it is a leftover.

Nothing is believed because it is in the folder: a disk may damage it, and a stranger may have made it. Batch records and the
copy of experiment.json end with a SHA-256 of themselves (`seal`). Version 0.1.0 wrote its records without; such a record
counts only as far as metadata.jsonl says the same. Reading is bounded, and no link is followed where something is written.

local_files.py has what is done with files of a folder. In an object store (object_store.py) there is no .work/tmp and no
.work/locks, and .work/run.json is a lease; files are only listed, not read again: the store answers for what it took.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any, TypeAlias

from scale_rae import acceptance
from scale_rae.acceptance import Candidate
from scale_rae.errors import InputError, OutputError, first_line, printable
from scale_rae.jsonio import MOST_BYTES, dump_json
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.experiment import prompt_record
from scale_rae.scaling.local_files import FileLocks, LocalFiles, cannot_write
from scale_rae.scaling.object_store import Lease, ObjectFiles, is_remote
from scale_rae.scaling.records import (
    Batch,
    consecutive,
    is_record,
    object_in,
    read_batch,
    says_the_same,
    seal,
    unseal,
)
from scale_rae.scaling.settings import Settings

RunLock: TypeAlias = FileLocks | Lease
_MOST_OF_A_SAMPLE = 256 << 20  # bytes of a picture or latent; those of the published models have 4 MB
_MOST_OF_AN_ERROR = 4000  # characters shown of a prompt's error
_RECORD_NAME = re.compile(r"[0-9]{5,}-[0-9]{5,}(-revived)?\.json")
_ADDED_AT_THE_END = ("seconds", "failed", "unfinished", "search")  # to experiment.json, by each run


@dataclass(frozen=True)
class PromptState:
    """How far a prompt is.

    `batches` are name -> (time written, ns; images); `record` is when its record was written (ns), if it was.
    """

    batches: dict[str, tuple[int, int]]
    record: int | None


@dataclass(frozen=True)
class Finding:
    """Whether a prompt is finished, and what is wrong with its files.

    `newer_record` is what this version would write as its metadata.jsonl, where an older version wrote fewer fields.
    """

    finished: bool
    problems: list[str]
    newer_record: bytes | None = None


class Store:
    """The files of one experiment.

    `writer` names this process's temporary file: no two processes of a run share one.
    """

    def __init__(self, folder: Path, settings: Settings, writer: str = "w0") -> None:
        self.folder, self.settings = folder, settings
        self._writer = writer
        self._work = folder / ".work"
        self._files = ObjectFiles(self._work) if is_remote(folder) else LocalFiles(self._work, writer)

    @property
    def remote(self) -> bool:
        """Whether the experiment is in an object store."""
        return self._files.remote

    def prompt_folder(self, index: int) -> Path:
        """The folder of a prompt's results."""
        return self.folder / f"{index:05}"

    def with_settings(self, settings: Settings) -> Store:
        """The same experiment's files, for settings in which what was left open is known."""
        return Store(self.folder, settings, self._writer)

    def log_file(self, worker: int) -> Path:
        """The log of a worker."""
        return self.folder / "logs" / f"worker-{worker}.log"

    # --- writing -------------------------------------------------------------------------------------------------

    def make_folders(self) -> None:
        """Makes the experiment's folder and those that are not a prompt's."""
        with self._disk_errors(self.folder):
            self._files.make_folders([self.folder / "logs"])

    def missing_folders(self) -> list[Path]:
        """The experiment's folder and the two above it, as far as they do not exist yet, the innermost first."""
        if self.remote:
            return []
        return [folder for folder in (self.folder, *self.folder.parents[:2]) if not folder.exists()]

    def remove_unused(self, made: Sequence[Path]) -> None:
        """Removes an experiment's folder that a run had `made` and left without results.

        Its parents that the run had made go with it. What cannot be removed, or holds anything else, stays.
        """
        if self.folder not in made or (self.folder / "experiment.json").exists() or self._has_results():
            return
        for inner in (self._work, self.folder / "logs"):
            shutil.rmtree(inner, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file, whole or not at all, making its folder.

        Raises:
            OutputError: naming the file, when it cannot be written.
        """
        self._put(path, data)

    def _put(self, path: Path, data: bytes, durable: bool = True) -> None:
        with self._disk_errors(path):
            self._files.write(path, data, durable)

    def log(self, worker: int, text: str) -> None:
        """Adds a line to a worker's log; in an object store, to stderr."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text, lines=True)}"
        self._files.add_line(self.log_file(worker), line)

    @contextlib.contextmanager
    def _disk_errors(self, path: Path) -> Iterator[None]:
        """A context that raises errors of writing as OutputErrors that name `path`."""
        try:
            yield
        except self._files.write_errors as e:
            raise cannot_write(path, e) from e

    # --- reading -------------------------------------------------------------------------------------------------

    def _read(self, path: Path, most: int = MOST_BYTES) -> bytes | None:
        """The content of a file of the experiment, None when it is missing.

        Raises:
            InputError: naming the file, when it cannot be read, is no regular file, or is larger than `most`.
        """
        return self._files.read(path, most)

    def _read_object(self, path: Path) -> dict[str, Any] | None:
        """The JSON object in a file of the experiment, None when it is missing.

        Raises:
            ValueError: when it is something else.
            InputError: when it cannot be read.
        """
        data = self._read(path)
        return None if data is None else object_in(data)

    # --- experiment.json -----------------------------------------------------------------------------------------

    def read_experiment(self) -> dict[str, Any] | None:
        """experiment.json, or None when there is none yet.

        Where it is damaged, its copy has what it said at the start.

        Raises:
            InputError: when it cannot be read and has no copy, or is missing although there are results.
        """
        return self._read_experiment()[0]

    def restore_experiment(self) -> str | None:
        """Writes experiment.json anew from its copy when it is damaged; returns what was wrong with it.

        Where there are no results yet, nothing is lost with it: it is removed.
        """
        path = self.folder / "experiment.json"
        try:
            value, problem = self._read_experiment()
        except InputError as e:
            if self._has_results() or not path.is_file():
                raise
            with self._disk_errors(path):
                path.unlink()
            return f"{e.args[0].partition('; ')[0]}; made again, since there are no results yet"
        if problem is not None and value is not None:
            self._write_experiment(value)
        return problem

    def _has_results(self) -> bool:
        return any((self._work / "batches").glob("*/*.json")) or any(self.folder.glob("[0-9]*/metadata.jsonl"))

    def _read_experiment(self) -> tuple[dict[str, Any] | None, str | None]:
        """What experiment.json says, and what was wrong with it if that comes from its copy."""
        path, value = self.folder / "experiment.json", None
        try:
            value = self._read_object(path)
            problem = "damaged"
        except InputError as e:
            problem = str(e).removeprefix(f"{path}: ")
        except ValueError as e:
            problem = f"cannot be read ({first_line(e)})"
        else:
            if value is None:
                if self._has_results():
                    remedy = f"put its copy {self._copy} there, or " if self._copy_of_experiment() is not None else ""
                    raise InputError(
                        f"{path}: missing, so it is not known what drew the results beside it; {remedy}choose another "
                        "--output-dir"
                    )
                return None, None
        copy = self._copy_of_experiment()
        if copy is not None and (value is None or any(value.get(name) != part for name, part in copy.items())):
            return copy, f"{path}: {problem}; restored from {self._copy}"
        if value is None:
            raise InputError(f"{path}: {problem}; choose another --output-dir")
        return value, None

    @property
    def _copy(self) -> Path:
        return self._work / "experiment.json"

    def _copy_of_experiment(self) -> dict[str, Any] | None:
        """What the copy of experiment.json says; None when there is none, or it is damaged too."""
        if self.remote:
            return None  # the store answers for what it took
        try:
            data = self._read(self._copy)
            return None if data is None else unseal(data)
        except (InputError, ValueError):
            return None

    def claim(self, description: dict[str, Any]) -> dict[str, Any]:
        """Writes experiment.json unless another worker was first; returns what it says then."""
        path = self.folder / "experiment.json"
        with self._disk_errors(path):
            if not self.remote and not path.exists():
                self._copy.unlink(missing_ok=True)  # of an experiment that was here before
            self._files.write_first(path, (dump_json(description, indent=2) + "\n").encode())
        recorded = self.read_experiment()
        if recorded is None:
            raise OutputError(
                f"{path}: cannot be made; something else of that name is there, or it was removed at once"
            )
        return recorded

    def keep_copy(self, recorded: Mapping[str, Any]) -> None:
        """Sees to it that experiment.json, which says `recorded`, has a copy."""
        description = {name: part for name, part in recorded.items() if name not in _ADDED_AT_THE_END}
        if not self.remote and self._copy_of_experiment() != description:
            self._put(self._copy, seal(description), durable=False)  # what it is a copy of is on the disk

    def update_experiment(self, changes: Mapping[str, Any]) -> None:
        """Adds to experiment.json what is known at the end."""
        self._write_experiment({**(self.read_experiment() or {}), **changes})

    def replace_experiment(self, value: Mapping[str, Any]) -> None:
        """Writes all of experiment.json anew, then its copy.

        Before that, the old copy goes, since a copy that differs would count instead.
        """
        with self._disk_errors(self._copy):
            self._copy.unlink(missing_ok=True)
        self._write_experiment(value)
        self.keep_copy(value)

    def _write_experiment(self, value: Mapping[str, Any]) -> None:
        """Writes experiment.json, and has it outlive a loss of power."""
        path = self.folder / "experiment.json"
        self.write(path, (dump_json(value, indent=2) + "\n").encode())
        with self._disk_errors(path):
            self._files.sync(self.folder)

    # --- batches and prompts -------------------------------------------------------------------------------------

    def save_batch(self, index: int, batch: Batch, files: Mapping[str, bytes]) -> None:
        """Writes a batch's files, then its record. `batch.files` is filled in from `files`."""
        for name, data in files.items():
            self.write(self._sample_file(index, name), data)
            batch.files[name] = hashlib.sha256(data).hexdigest()
        self.write(self._record_folder(index) / batch.name, seal(batch.record()))

    def _sample_file(self, index: int, name: str) -> Path:
        """The path of a file of a batch."""
        return self.prompt_folder(index) / ("" if "/" in name else "samples") / name

    def _record_folder(self, index: int) -> Path:
        return self._work / "batches" / f"{index:05}"

    def _records(self, index: int) -> list[Path]:
        """The files that are records by their name."""
        try:
            return sorted(p for p in self._record_folder(index).glob("*.json") if _RECORD_NAME.fullmatch(p.name))
        except OSError:  # writing there will say why
            return []

    def batches(self, index: int) -> tuple[list[Batch], list[str]]:
        """(a prompt's finished batches, in order and disjoint; what is wrong with others' files).

        Of an adaptive search, these are the waves from the first on until one is missing.
        """
        sealed, unsealed, problems = self._batches(index)
        batches = sorted([*sealed, *unsealed], key=lambda b: (b.start, b.name))
        return consecutive(batches) if self.settings.is_adaptive else batches, problems

    def _batches(self, index: int) -> tuple[list[Batch], list[Batch], list[str]]:
        """(finished batches with a checksum, those of version 0.1.0 without, what is wrong)."""
        finished: tuple[list[Batch], list[Batch]] = ([], [])
        problems: list[str] = []
        covered = set[int]()
        stored = {path.name for path in (self.prompt_folder(index) / "samples").glob("*")} if self.remote else None
        for path in self._records(index):
            try:
                data = self._read(path)
                if data is None:
                    continue  # gone since it was listed
                is_sealed, batch = read_batch(data, self.settings)
                if batch.name != path.name:
                    raise ValueError("of other samples than its name says")
            except InputError as e:
                problems.append(str(e))
                continue
            except ValueError:
                problems.append(f"{path}: damaged")
                continue
            if not is_sealed and not self._is_vouched_for(index, batch):
                problems.append(f"{path}: has no checksum, and metadata.jsonl does not say the same")
                continue
            bad = self._missing(index, batch, stored) if stored is not None else self._damaged(index, batch)
            problems += bad
            if not bad and covered.isdisjoint(batch.samples):
                finished[0 if is_sealed else 1].append(batch)
                covered.update(batch.samples)
        return *finished, problems

    def _is_vouched_for(self, index: int, batch: Batch) -> bool:
        """Whether a prompt's metadata.jsonl agrees with a batch's record."""
        try:
            metadata = self._read_object(self.prompt_folder(index) / "metadata.jsonl")
        except (InputError, ValueError):
            return False
        return metadata is not None and says_the_same(metadata, batch)

    def _missing(self, index: int, batch: Batch, stored: set[str]) -> list[str]:
        """What is missing of a batch's files, in an object store that has files of these names."""
        return [f"{self._sample_file(index, name)}: missing" for name in batch.files if name not in stored]

    def _damaged(self, index: int, batch: Batch) -> list[str]:
        """What is wrong with a batch's files: missing, unreadable, or of another SHA-256 than the record's."""
        problems = []
        for name, sha in batch.files.items():
            path = self._sample_file(index, name)
            try:
                data = self._read(path, _MOST_OF_A_SAMPLE)
            except InputError as e:
                problems.append(str(e))
                continue
            if data is None:
                problems.append(f"{path}: missing")
            elif hashlib.sha256(data).hexdigest() != sha:
                problems.append(f"{path}: damaged ({len(data)} bytes)")
        return problems

    def prompt_state(self, index: int) -> PromptState:
        """How far a prompt is, from names and times alone."""
        batches = {}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._record_folder(index)):
                first, _, last = entry.name.removesuffix(".json").removesuffix("-revived").partition("-")
                with contextlib.suppress(OSError, ValueError):
                    batches[entry.name] = (entry.stat().st_mtime_ns, int(last) - int(first) + 1)
        record = self.prompt_folder(index) / "metadata.jsonl"
        try:
            return PromptState(batches, record.stat().st_mtime_ns)
        except OSError:
            return PromptState(batches, None)

    def record(self, prompt: PromptRecord, batches: Sequence[Batch]) -> bytes | None:
        """What metadata.jsonl must be, or None when batches are missing."""
        candidates = reduce(acceptance.with_wave, (b.searched() for b in batches), list[Candidate]())
        if self.settings.is_adaptive:
            if acceptance.next_wave(candidates, self.settings.rules):
                return None
        elif sum(len(b.judged) for b in batches) != self.settings.total:
            return None
        rewards = [b.rewards for b in batches]
        value = prompt_record(
            self.settings,
            prompt,
            batches[0].output_text,
            [seed for b in batches for seed in b.seeds],
            [entry for b in batches for entry in b.judged],
            None if self.settings.reward is None else [x for some in rewards for x in some or ()],
            candidates,
        )
        return (dump_json(value) + "\n").encode()

    def check(self, prompt: PromptRecord) -> tuple[bool, list[str]]:
        """Whether a prompt is finished, every file of it as it was written; and what is wrong if it once was."""
        finding = self.inspect(prompt)
        return finding.finished, finding.problems

    def inspect(self, prompt: PromptRecord) -> Finding:
        """What `check` finds, and what an older record lacks."""
        batches, problems = self.batches(prompt.index)
        expected = self.record(prompt, batches)
        path = self.prompt_folder(prompt.index) / "metadata.jsonl"
        try:
            found = self._read(path)
        except InputError as e:
            return Finding(False, [*problems, str(e)])
        if found is None:
            return Finding(False, problems)
        if expected is None:
            return Finding(False, problems or [f"{path}: belongs to images that are not there"])
        if not is_record(found, expected):
            return Finding(False, [*problems, f"{path}: damaged"])
        return Finding(True, problems, expected if found != expected else None)

    def renew(self, index: int, record: bytes) -> None:
        """Writes the `newer_record` that `inspect` found: the same result with the fields that came later."""
        self.write(self.prompt_folder(index) / "metadata.jsonl", record)

    def has_record(self, index: int) -> bool:
        """Whether a prompt's metadata.jsonl is there, whatever is in it."""
        try:
            return (self.prompt_folder(index) / "metadata.jsonl").is_file()
        except OSError:
            return False

    def holder(self) -> str:
        """Who has the run's lock, as the folder says; empty if it cannot be read, and in an object store."""
        return self._files.holder()

    def search_counts(self, index: int) -> dict[str, float] | None:
        """What an adaptive search took for a finished prompt, in numbers; None when its record does not say."""
        try:
            record = self._read_object(self.prompt_folder(index) / "metadata.jsonl") or {}
            return {
                "prompts": 1,
                "candidates": len(record["candidates"]),
                "evaluations": record["evaluations"],
                "accepted": record["n_accepted"],
                "filled_up": int(bool(record["filled_up"])),
            }
        except (InputError, ValueError, KeyError, TypeError):
            return None

    def answers(self, index: int) -> list[str]:
        """The model's answers about a finished prompt's images; none when its record has gone since."""
        try:
            record = self._read_object(self.prompt_folder(index) / "metadata.jsonl") or {}
            return [entry["answer"] for entry in record["text_responses"].values()]
        except (InputError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def reopen(self, index: int) -> list[Batch]:
        """The finished batches of a prompt that lacks some; the prompt's record and error are removed.

        Batches of version 0.1.0 count only while metadata.jsonl agrees with them, so they get a checksum before that.
        """
        folder = self.prompt_folder(index)
        sealed, unsealed, _ = self._batches(index)
        for batch in unsealed:
            self.write(self._record_folder(index) / batch.name, seal(batch.record()))
        with self._disk_errors(folder):
            (folder / "error.json").unlink(missing_ok=True)
            (folder / "metadata.jsonl").unlink(missing_ok=True)
        return self.batches(index)[0] if self.settings.is_adaptive else [*sealed, *unsealed]

    def finish(self, prompt: PromptRecord) -> dict[str, Any]:
        """Writes a prompt's metadata.jsonl from its batches and returns it."""
        batches, problems = self.batches(prompt.index)
        data = self.record(prompt, batches)
        if data is None:
            raise OutputError(f"{self.prompt_folder(prompt.index)}: changed while it was drawn ({'; '.join(problems)})")
        self.write(self.prompt_folder(prompt.index) / "metadata.jsonl", data)
        self.tidy(prompt.index)
        if problems:  # records that were made again under other names would be complained of for ever
            used = {batch.name for batch in batches}
            with self._disk_errors(self._record_folder(prompt.index)):
                for path in self._records(prompt.index):
                    if path.name not in used:
                        path.unlink(missing_ok=True)
        return object_in(data)

    def tidy(self, index: int) -> None:
        """Removes the error of an earlier run from beside a finished prompt's record."""
        path = self.prompt_folder(index) / "error.json"
        with self._disk_errors(path):
            path.unlink(missing_ok=True)

    def fail(self, index: int, error: str, tries: int) -> None:
        """Records that a prompt failed."""
        self.write(
            self.prompt_folder(index) / "error.json", (dump_json({"error": error, "tries": tries}) + "\n").encode()
        )

    def failure(self, index: int) -> tuple[int, str] | None:
        """(time of failure in ns, printable error) of a failed prompt; None for one that has its record."""
        path = self.prompt_folder(index) / "error.json"
        try:
            time_of_failure = self._files.time_written(path)
            if self.has_record(index):
                return None  # killed between the two, or the failure is older
            value = self._read_object(path)
            return (
                None
                if value is None
                else (time_of_failure, printable(str(value["error"])[:_MOST_OF_AN_ERROR], lines=True))
            )
        except FileNotFoundError:
            return None
        except (OSError, InputError, ValueError, KeyError):
            return 0, "(its error.json cannot be read)"

    # --- locks ---------------------------------------------------------------------------------------------------

    def lock_run(self, process: int = 0, processes: int = 1) -> RunLock:
        """Keeps other starts out of the folder while the lock is open, here or in a child process.

        Processes that were started together (`processes` > 1) share the folder, each under its own number.

        Raises:
            OutputError: when another run has it.
        """
        self.make_folders()
        return self._files.lock_run(process, processes)

    def lock_prompt(self, index: int) -> IO[str] | None:
        """A prompt's lock, held until the file is closed; None when another worker has it."""
        return self._files.lock_prompt(index)
