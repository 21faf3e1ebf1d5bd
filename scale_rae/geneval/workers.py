"""Where pictures are judged: in this process, or in one process per device.

A process gets its judge as a line of JSON on stdin, then a batch per line; it answers each with a line on stdout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from scale_rae import processes
from scale_rae.errors import DeviceError, InputError, ScaleRAEError, last_line, printable
from scale_rae.geneval.evaluation import AHEAD, Batch, Judging, Task, judged_here
from scale_rae.geneval.journal import Judged
from scale_rae.geneval.judges import JudgeChoice, open_judge
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.options import from_record, to_record
from scale_rae.scaling.local import default_devices, thread_count

_SHAPES_BATCH = 32
_GPU_BATCH, _CPU_BATCH = 32, 2  # the detector divides them again
_log = logging.getLogger("scale_rae")


def usable_devices(choice: JudgeChoice, devices: Sequence[str | None] | None) -> list[str | None]:
    """The devices to judge on: those named, else every CUDA device, else the best there is.

    Raises:
        DeviceError: for a device that is not there.
    """
    if choice.judge == "shapes":  # which computes on the CPU, wherever
        return list(devices or ["cpu"])
    from scale_rae.memory import pick_device

    places = list(devices or default_devices())
    for place in places:
        pick_device(place)
    return places


def batch_size_on(choice: JudgeChoice, devices: Sequence[str | None]) -> int:
    """Pictures per batch where none is chosen, on these devices."""
    if choice.judge == "shapes":
        return _SHAPES_BATCH
    from scale_rae.memory import pick_device

    return _GPU_BATCH if all(pick_device(device).type == "cuda" for device in devices) else _CPU_BATCH


def judging_on(choice: JudgeChoice, devices: Sequence[str | None]) -> Judging:
    """A function that judges batches on the devices; each device opens its own judge when it gets a batch."""

    def judging(batches: Sequence[Batch]) -> Iterator[tuple[int, list[Judged]]]:
        if not batches:
            return
        if len(devices) == 1:
            yield from enumerate(judged_here(open_judge(choice, devices[0]), batches))
            return
        yield from _shared(choice, devices, batches)

    return judging


@dataclass
class _Worker:
    """A process that judges, and the batches that it has and has not answered yet."""

    device: str | None
    process: subprocess.Popen[str]
    log: IO[bytes]
    waiting: set[int] = field(default_factory=set)
    error: ScaleRAEError | None = None


def _shared(
    choice: JudgeChoice, devices: Sequence[str | None], batches: Sequence[Batch]
) -> Iterator[tuple[int, list[Judged]]]:
    """The verdicts of batches, judged in several processes; if one dies, the others take over its batches.

    Raises:
        ScaleRAEError: when every process failed.
    """
    left, living = list(range(len(batches))), list(devices)
    while left:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in left:
            todo.put(number)
        answers: queue.SimpleQueue[tuple[int, list[Judged]] | None] = queue.SimpleQueue()
        workers = [_start(choice, device, living) for device in living]
        threads = [threading.Thread(target=_drive, args=(w, batches, todo, answers), daemon=True) for w in workers]
        done: set[int] = set()
        try:
            for thread in threads:
                thread.start()
            running = len(workers)
            while running:
                answer = answers.get()
                if answer is None:
                    running -= 1
                else:
                    done.add(answer[0])
                    yield answer
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
            for thread in threads:
                if thread.is_alive():  # it reads the end of its process's answers
                    thread.join()
            for worker in workers:
                for stream in (worker.process.stdin, worker.process.stdout, worker.log):
                    with contextlib.suppress(OSError):  # of what a dead process did not read
                        if stream is not None:
                            stream.close()
        failed = [worker for worker in workers if worker.error is not None]
        left = [number for number in left if number not in done]
        living = [worker.device for worker in workers if worker.error is None]
        for worker in failed:
            if not isinstance(worker.error, DeviceError) or (left and not living):
                assert worker.error is not None
                raise worker.error
            _log.warning("%s; the other processes take over its images", worker.error)


def _start(choice: JudgeChoice, device: str | None, devices: Sequence[str | None]) -> _Worker:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
    worker = _Worker(device, processes.start("scale_rae.geneval.workers", log, thread_count(device, devices)), log)
    _send(worker, {"choice": to_record(choice), "device": device})
    return worker


def _send(worker: _Worker, value: Any) -> None:
    processes.send(worker.process, dump_json(value, ascii_only=True))


def _drive(
    worker: _Worker,
    batches: Sequence[Batch],
    todo: queue.SimpleQueue[int],
    answers: queue.SimpleQueue[tuple[int, list[Judged]] | None],
) -> None:
    """Keeps a worker in batches, and passes its answers on; at their end, None."""

    def feed() -> None:
        while len(worker.waiting) < AHEAD + 2:  # fewer, and it would wait for the files of the next before it judges
            try:
                number = todo.get_nowait()
            except queue.Empty:
                _send(worker, {"end": True})
                return
            worker.waiting.add(number)
            _send(worker, {"batch": number, "tasks": [asdict(task) for task in batches[number]]})

    assert worker.process.stdout is not None
    feed()
    try:
        for line in worker.process.stdout:
            value = parse_json(line)
            if "error" in value:
                kinds = {e.__name__: e for e in (DeviceError, InputError)}
                worker.error = kinds.get(value["kind"], ScaleRAEError)(value["error"])
                continue
            number = value["batch"]
            worker.waiting.discard(number)
            answers.put((number, [Judged.of(record) for record in value["judged"]]))
            feed()
    except (ValueError, KeyError, TypeError):  # half a line of a process that was killed
        pass
    if worker.waiting and worker.error is None:
        worker.error = DeviceError(f"the process that judges on {worker.device} died{_last_words(worker)}")
    answers.put(None)


def _last_words(worker: _Worker) -> str:
    code = worker.process.wait()
    worker.log.seek(0)
    lines = worker.log.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f" ({how}{f': {printable(lines[-1])}' if lines else ''})"


def main() -> int:
    """Judges the batches on stdin. Exit code: 0 done, 1 the parent has gone, 3 an error was reported."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(value: Any) -> None:
        answers.write(dump_json(value, ascii_only=True) + "\n")
        answers.flush()

    first = parse_json(sys.stdin.readline())
    numbers: list[int] = []

    def batches() -> Iterator[Batch]:
        for line in sys.stdin:
            value = parse_json(line)
            if "end" in value:
                return
            numbers.append(value["batch"])
            yield [Task(**task) for task in value["tasks"]]
        os._exit(1)  # the parent has gone

    try:
        judge = open_judge(from_record(JudgeChoice, first["choice"]), first["device"])
        for number, judged in enumerate(judged_here(judge, batches())):
            answer({"batch": numbers[number], "judged": [value.record() for value in judged]})
    except ScaleRAEError as e:
        traceback.print_exc()
        answer({"error": str(e), "kind": type(e).__name__})
        return 3
    except Exception as e:
        traceback.print_exc()
        answer({"error": f"unexpected {type(e).__name__}: {last_line(e)}", "kind": "ScaleRAEError"})
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
