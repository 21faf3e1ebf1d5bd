"""Launcher: workers on this machine, one per device; a single one runs in this process."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from scale_rae import processes
from scale_rae.errors import DeviceError, InputError, OptionError, OutputError, ScaleRAEError
from scale_rae.options import check_offload
from scale_rae.scaling.events import Event, Listener, Message, WorkerFailed, WorkerFinished, from_json
from scale_rae.scaling.launch import Job, share
from scale_rae.scaling.local_files import append
from scale_rae.scaling.locks import can_share
from scale_rae.scaling.object_store import is_remote
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.worker import Assignment, work
from scale_rae.scaling.worker_process import encode_assignment

if TYPE_CHECKING:
    from scale_rae.opening import LoadingBar

Reports: TypeAlias = "queue.Queue[tuple[int, Event | None]]"


def default_devices(device: str | None = None) -> list[str | None]:
    """The device named, else every CUDA device that torch sees, else [None]: the best there is."""
    import torch

    if device is None and torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [device]


def check_here(settings: Settings, output_dir: Path, devices: Sequence[str | None]) -> None:
    """Checks what workers on this machine need: a folder with locks, and devices that are there.

    Raises:
        InputError: for results in an object store, or offloading from a CPU. DeviceError: for a device that is not there, or
            cannot quantize so; for noise of a GPU where there is none; for compile "on" where nothing can be compiled.
    """
    from scale_rae.memory import pick_device, pick_dtype
    from scale_rae.noise import check_noise
    from scale_rae.quantization import check_quantize
    from scale_rae.toolchain import check_compile

    check_noise(settings.options.noise)
    if is_remote(output_dir):
        raise InputError(
            f"--output-dir {output_dir}: a store has no locks, by which workers that were launched so share prompts; "
            "use --launcher ray, on one machine too"
        )
    for name in devices:
        device = pick_device(name)
        dtype = pick_dtype(settings.dtype, device)
        check_quantize(settings.quantize, device, dtype)
        check_offload(settings.offload, device.type)
        check_compile(settings.compile, device)


@dataclass(frozen=True)
class Local:
    """One worker per device of this machine.

    `bars` shows how loading goes, where this process is the only worker.
    """

    devices: Sequence[str | None]
    bars: LoadingBar | None = None
    index = 0
    size = 1

    @property
    def workers(self) -> int:
        return len(self.devices)

    def check(self, settings: Settings, output_dir: Path) -> None:
        """See `check_here`."""
        check_here(settings, output_dir, self.devices)

    def draw(self, job: Job, listen: Listener) -> dict[str, float]:
        """Has the job's prompts drawn; returns seconds per stage, summed over the workers.

        A worker whose device has no memory for the model leaves its prompts to the other workers; so does one that dies.
        """
        todo = {p.index for p in job.todo}
        prompts = job.chosen if job.together > 1 else job.todo
        assignments = [
            Assignment(
                worker,
                device,
                *share(prompts, todo, job.together, worker, len(self.devices)),
                job.description,
                job.failed_before,
                job.debug,
            )
            for worker, device in enumerate(self.devices)
        ]
        if len(assignments) == 1:
            return work(job.store, job.settings, assignments[0], listen, self.bars)
        return _follow(job, assignments, listen)


def _follow(job: Job, assignments: Sequence[Assignment], listen: Listener) -> dict[str, float]:
    """Seconds per stage, once a process per assignment was started and has ended.

    Their events are passed on. The processes share the run's lock, so that the folder stays locked until the last of them is
    gone. Where locks cannot be shared (Windows), this process alone has it; the others end when it does, by the end of their
    stdin.
    """
    reports: Reports = queue.Queue()
    workers: list[subprocess.Popen[str]] = []
    stages: dict[str, float] = {}
    ended: set[int] = set()
    unfit: list[DeviceError] = []
    devices = [assignment.device for assignment in assignments]
    try:
        for assignment in assignments:
            workers.append(start_worker(job, assignment, thread_count(assignment.device, devices)))
            reader = threading.Thread(target=_read, args=(assignment.worker, workers[-1], reports), daemon=True)
            reader.start()
        running = len(workers)
        while running:
            worker, event = reports.get()
            if event is None:
                running -= 1
                code = workers[worker].wait()
                if worker not in ended:
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    log = job.store.log_file(worker)
                    rest = "; the others take over its prompts" if running else ""
                    listen(Message(f"worker {worker} ({devices[worker]}) died ({how}); its log is {log}{rest}"))
            elif isinstance(event, WorkerFinished):
                ended.add(worker)
                for stage, seconds in event.seconds.items():
                    stages[stage] = stages.get(stage, 0.0) + seconds
            elif isinstance(event, WorkerFailed) and event.kind == "DeviceError":  # other devices may do
                unfit.append(DeviceError(event.error))
                ended.add(worker)
                rest = "; the others take over its prompts" if len(unfit) < len(workers) else ""
                listen(Message(f"worker {worker} ({devices[worker]}): {event.error}{rest}"))
            elif isinstance(event, WorkerFailed):
                error = {e.__name__: e for e in (InputError, OptionError, OutputError)}.get(event.kind, ScaleRAEError)
                raise error(event.error)
            else:
                listen(event)
        if len(unfit) == len(workers):
            raise unfit[0]
    finally:
        _end(workers)
    return stages


def _end(workers: Sequence[subprocess.Popen[str]]) -> None:
    """Kills the workers that are still running."""
    for process in workers:
        if process.poll() is None:
            process.kill()
    for process in workers:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def thread_count(device: str | None, devices: Sequence[str | None]) -> int:
    """OpenMP threads of a worker on `device`, where `devices` are those of all workers of this machine.

    On the CPU, its share of the cores. A GPU's worker needs few, and with one per core the workers get in each other's way:
    two on 32 cores drew 1.4 times what one drew, with 4 threads each twice as much.
    """
    cores = os.cpu_count() or 1
    if device == "cpu":
        return max(1, cores // devices.count("cpu"))
    return max(1, min(4, cores // len(devices)))


def start_worker(job: Job, assignment: Assignment, threads: int) -> subprocess.Popen[str]:
    """A worker's process, with its assignment on its way; what it prints goes to its log."""
    shared = [file.fileno() for file in job.lock.files] if can_share() else []
    with append(job.store.log_file(assignment.worker)) as log:
        worker = processes.start("scale_rae.scaling.worker_process", log, threads, shared)
    processes.send(worker, encode_assignment(job.store, job.settings, assignment))
    return worker


def _read(worker: int, process: subprocess.Popen[str], reports: Reports) -> None:
    """Puts a worker's events into `reports`, and None at their end."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            try:
                reports.put((worker, from_json(line)))
            except ValueError:
                continue  # half a line of a worker that was killed
    reports.put((worker, None))
