"""An experiment's folder: what is finished, written whole or not at all, and locked against a second start.

    experiment.json                    settings, identities of model and reward, versions; seconds at the end
    00000/samples/00000.png …          every image drawn, and 00000_latent.pt with --save-latents
    00000/metadata.jsonl               one object; written when all images of the prompt are there
    00000/error.json                   instead of it, when the prompt failed
    logs/worker-0.log
    .work/batches/00000/00000-00007.json   scores and SHA-256 of the files of samples 0 to 7, written after them
    .work/locks/, .work/tmp/, .work/run.lock

A batch is finished when its record is there and every file it names has the recorded SHA-256. That is all that resuming
needs to know: metadata.jsonl is a function of the batches. Locks are flock's, so they end with the process, however that ends.

In an object store there is no .work/tmp and .work/locks, and .work/run.json is a lease (remote.py). There files are only looked
for, not read again: the store answers for what it took.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scale_rae.errors import InputError, OutputError
from scale_rae.jsonio import dump_json
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import remote
from scale_rae.scaling.experiment import Settings, prompt_record

_LOCK_WAIT = 3.0  # seconds for the processes of a killed run to be gone


@dataclass(frozen=True)
class Batch:
    """What is known of samples `start` … `start + len(judged) - 1` of a prompt."""

    start: int
    output_text: str
    seeds: list[int]
    judged: list[dict[str, Any]]  # entries of text_responses
    rewards: list[float] | None
    files: dict[str, str]  # name in samples/ -> SHA-256

    @property
    def samples(self) -> range:
        return range(self.start, self.start + len(self.judged))


@dataclass(frozen=True)
class Progress:
    """A prompt's batches as name -> (time written, ns; images), and when its record was written, if it was."""

    batches: dict[str, tuple[int, int]]
    record: int | None


class Store:
    """The files of one experiment. `writer` names this process's temporary file: no two writers of a run share one."""

    def __init__(self, folder: Path, settings: Settings, writer: str = "w0") -> None:
        self.folder, self.settings = folder, settings
        self.remote = remote.is_remote(folder)
        self._work = folder / ".work"
        self._temporary = self._work / "tmp" / writer

    def prompt_folder(self, index: int) -> Path:
        return self.folder / f"{index:05}"

    def log_file(self, rank: int) -> Path:
        return self.folder / "logs" / f"worker-{rank}.log"

    # --- writing -------------------------------------------------------------------------------------------------

    def make_folders(self) -> None:
        """Makes the experiment's folder and those that are not a prompt's."""
        if self.remote:
            return  # a store has none
        with self._disk_errors(self.folder):
            for folder in (self._work / "batches", self._work / "locks", self._work / "tmp", self.folder / "logs"):
                folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file, whole or not at all, making its folder.

        Raises:
            OutputError: naming the file, when it cannot be written.
        """
        with self._disk_errors(path):
            if self.remote:
                remote.put(path, data)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # some file systems notice a full disk only here
                self._temporary.rename(path)
            except OSError:
                self._temporary.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _disk_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if not (self.remote or isinstance(e, OSError)):  # every store has errors of its own
                raise
            raise OutputError(
                f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); make room or permission there and start again: "
                "what is finished is kept"
            ) from e

    # --- experiment.json -----------------------------------------------------------------------------------------

    def read_experiment(self) -> dict[str, Any] | None:
        """experiment.json, or None when there is none yet.

        Raises:
            InputError: when it cannot be read, or is missing although there are results.
        """
        path = self.folder / "experiment.json"
        try:
            value = json.loads(path.read_bytes().decode())
        except FileNotFoundError:
            if any((self._work / "batches").glob("*/*.json")) or any(self.folder.glob("[0-9]*/metadata.jsonl")):
                raise InputError(
                    f"{path}: missing, so it is not known what drew the results beside it; choose another --output-dir"
                ) from None
            return None
        except (OSError, ValueError, RecursionError) as e:
            raise InputError(f"{path}: cannot be read ({e}); choose another --output-dir") from e
        if not isinstance(value, dict):
            raise InputError(f"{path}: not an experiment's description; choose another --output-dir")
        return value

    def claim(self, description: dict[str, Any]) -> dict[str, Any]:
        """Writes experiment.json unless another worker was first; returns what it says then."""
        path = self.folder / "experiment.json"
        if self.remote:  # its launcher sees to it that only one worker is here
            self.update_experiment(description)
            return self.read_experiment() or {}
        mine = self._temporary.with_suffix(".claim")
        with self._disk_errors(path):
            mine.write_bytes((dump_json(description, indent=2) + "\n").encode())
            try:
                os.link(mine, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not path.exists():
                    mine.replace(path)
            finally:
                mine.unlink(missing_ok=True)
        recorded = self.read_experiment()
        assert recorded is not None
        return recorded

    def update_experiment(self, changes: Mapping[str, Any]) -> None:
        """Adds to experiment.json what is known at the end."""
        recorded = self.read_experiment() or {}
        self.write(self.folder / "experiment.json", (dump_json({**recorded, **changes}, indent=2) + "\n").encode())

    # --- batches and prompts -------------------------------------------------------------------------------------

    def save_batch(self, index: int, batch: Batch, files: Mapping[str, bytes]) -> None:
        """Writes a batch's files, then its record. `batch.files` is filled in from `files`."""
        samples = self.prompt_folder(index) / "samples"
        for name, data in files.items():
            self.write(samples / name, data)
            batch.files[name] = hashlib.sha256(data).hexdigest()
        name = f"{batch.samples[0]:05}-{batch.samples[-1]:05}.json"
        self.write(self._work / "batches" / f"{index:05}" / name, dump_json(batch.__dict__).encode())

    def batches(self, index: int) -> tuple[list[Batch], list[str]]:
        """A prompt's finished batches, in order and disjoint; and what was found wrong with files of others."""
        batches: list[Batch] = []
        problems: list[str] = []
        samples, covered = self.prompt_folder(index) / "samples", set[int]()
        stored = {path.name for path in samples.glob("*")} if self.remote else None
        for path in sorted((self._work / "batches" / f"{index:05}").glob("*.json")):
            try:
                batch = Batch(**json.loads(path.read_bytes().decode()))
                in_order = batch.samples[0] >= 0 and batch.samples[-1] < self.settings.total
                complete = len(batch.seeds) == len(batch.judged) and bool(batch.files)
            except (OSError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
                problems.append(f"{path}: damaged")
                continue
            bad = [
                problem
                for name, sha in batch.files.items()
                if (problem := _file_problem(samples / name, sha if stored is None else name in stored))
            ]
            problems += bad
            if not bad and in_order and complete and covered.isdisjoint(batch.samples):
                batches.append(batch)
                covered.update(batch.samples)
        return sorted(batches, key=lambda b: b.start), problems

    def progress(self, index: int) -> Progress:
        """How far a prompt is, from names and times alone."""
        batches = {}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._work / "batches" / f"{index:05}"):
                first, _, last = entry.name.removesuffix(".json").partition("-")
                with contextlib.suppress(OSError, ValueError):
                    batches[entry.name] = (entry.stat().st_mtime_ns, int(last) - int(first) + 1)
        record = self.prompt_folder(index) / "metadata.jsonl"
        try:
            return Progress(batches, record.stat().st_mtime_ns)
        except OSError:
            return Progress(batches, None)

    def record(self, prompt: PromptRecord, batches: Sequence[Batch]) -> bytes | None:
        """What metadata.jsonl must be, or None when batches are missing."""
        if sum(len(b.judged) for b in batches) != self.settings.total:
            return None
        rewards = [b.rewards for b in batches]
        value = prompt_record(
            self.settings,
            prompt,
            batches[0].output_text,
            [seed for b in batches for seed in b.seeds],
            [entry for b in batches for entry in b.judged],
            None if self.settings.reward is None else [x for some in rewards for x in some or ()],
        )
        return (dump_json(value) + "\n").encode()

    def check(self, prompt: PromptRecord) -> tuple[bool, list[str]]:
        """Whether a prompt is finished, every file of it as it was written; and what is wrong if it once was."""
        batches, problems = self.batches(prompt.index)
        expected = self.record(prompt, batches)
        path = self.prompt_folder(prompt.index) / "metadata.jsonl"
        try:
            found = path.read_bytes()
        except OSError:
            return False, problems
        if expected is None:
            return False, problems or [f"{path}: belongs to images that are not there"]
        return found == expected, problems if found == expected else [*problems, f"{path}: damaged"]

    def has_record(self, index: int) -> bool:
        """Whether a prompt's metadata.jsonl is there, whatever is in it."""
        return (self.prompt_folder(index) / "metadata.jsonl").is_file()

    def holder(self) -> str:
        """Who has the run's lock, as written in the folder; empty where that cannot be read."""
        try:
            return (self._work / "holder").read_text().strip()
        except OSError:
            return ""

    def answers(self, index: int) -> list[str]:
        """The model's answers about a finished prompt's images; none when its record has gone since."""
        try:
            record = json.loads((self.prompt_folder(index) / "metadata.jsonl").read_bytes())
            return [entry["answer"] for entry in record["text_responses"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def reopen(self, index: int) -> None:
        """A prompt that has to be drawn, in whole or in part, has no record until it is finished."""
        with self._disk_errors(self.prompt_folder(index)):
            (self.prompt_folder(index) / "metadata.jsonl").unlink(missing_ok=True)

    def finish(self, prompt: PromptRecord) -> dict[str, Any]:
        """Writes a prompt's metadata.jsonl from its batches and returns it."""
        batches, problems = self.batches(prompt.index)
        data = self.record(prompt, batches)
        if data is None:
            raise OutputError(f"{self.prompt_folder(prompt.index)}: changed while it was drawn ({'; '.join(problems)})")
        self.write(self.prompt_folder(prompt.index) / "metadata.jsonl", data)
        with self._disk_errors(self.prompt_folder(prompt.index)):
            (self.prompt_folder(prompt.index) / "error.json").unlink(missing_ok=True)
        return json.loads(data)  # type: ignore[no-any-return]

    def fail(self, index: int, error: str, tries: int) -> None:
        """Records that a prompt failed."""
        self.write(
            self.prompt_folder(index) / "error.json", (dump_json({"error": error, "tries": tries}) + "\n").encode()
        )

    def failure(self, index: int) -> tuple[int, str] | None:
        """A failed prompt's time of failure (ns) and error."""
        path = self.prompt_folder(index) / "error.json"
        try:
            time_of_failure = remote.put_time(path) if self.remote else path.stat().st_mtime_ns
            return time_of_failure, str(json.loads(path.read_bytes())["error"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return 0, "(its error.json cannot be read)"

    # --- locks ---------------------------------------------------------------------------------------------------

    def lock_run(self, rank: int = 0, world_size: int = 1) -> RunLock:
        """Keeps other starts out of the folder for as long as the lock returned is open, here or in a child process.

        Processes of one launch (`world_size` > 1) share the folder, one for each rank.

        Raises:
            OutputError: when another run has it.
        """
        if self.remote:
            return RunLock([], remote.Lease(self._work / "run.json"))
        self.make_folders()
        wanted = [(self._work / "run.lock", fcntl.LOCK_SH if world_size > 1 else fcntl.LOCK_EX)]
        if world_size > 1:
            wanted.append((self._work / f"rank-{rank}.lock", fcntl.LOCK_EX))
        lock = RunLock([])
        for path, kind in wanted:
            file = self._lock(path, kind, _LOCK_WAIT)
            if file is None:
                lock.close()
                holder = self.holder() or "another process"
                raise OutputError(
                    f"{self.folder}: {holder} is at work here; wait for it, or choose another --output-dir"
                )
            lock.files.append(file)
        if rank == 0:
            self.write(self._work / "holder", f"process {os.getpid()} on {socket.gethostname()}".encode())
        return lock

    def lock_prompt(self, index: int) -> IO[str] | None:
        """A prompt's lock, held until the file is closed; None when another worker has it."""
        if self.remote:
            return io.StringIO()  # its launcher gives a prompt to one worker only
        return self._lock(self._work / "locks" / f"{index:05}", fcntl.LOCK_EX, 0.0)

    def _lock(self, path: Path, kind: int, patience: float) -> IO[str] | None:
        with self._disk_errors(path):
            file = path.open("a")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.close()
                    return None
                time.sleep(0.1)
            except OSError as e:
                file.close()
                raise OutputError(f"{path}: this file system knows no locks ({e.strerror}); use another folder") from e


class RunLock:
    """The locks that keep other runs out of a folder, held until closed here and in every process that `files` went to."""

    def __init__(self, files: list[IO[str]], lease: remote.Lease | None = None) -> None:
        self.files, self._lease = files, lease

    def check(self) -> None:
        """Raises OutputError when the folder has been lost to another run."""
        if self._lease is not None:
            self._lease.check()

    def close(self) -> None:
        if self._lease is not None:
            self._lease.close()
        for file in self.files:
            file.close()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.close()


def _file_problem(path: Path, sha: str | bool) -> str | None:
    """What is wrong with a file that should have that SHA-256, or of which it is known whether it is there."""
    if isinstance(sha, bool):
        return None if sha else f"{path}: missing"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as e:
        return f"{path}: cannot be read ({e.strerror})"
    return None if hashlib.sha256(data).hexdigest() == sha else f"{path}: damaged ({len(data)} bytes)"
