"""A worker in a process of its own.

Its assignment is a line of JSON on stdin, its events are lines of JSON on stdout. stdin stays open as long as the launcher
lives; when it closes, the process ends.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import traceback
from pathlib import Path

from scale_rae.errors import ScaleRAEError, printable
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.options import from_record, to_record
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.events import Event, Message, WorkerFailed, WorkerFinished, to_json
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, work


def encode_assignment(store: Store, settings: Settings, assignment: Assignment) -> str:
    """An assignment as the line of JSON that `main` reads.

    It is ASCII, since stdin may have any encoding.
    """
    return dump_json(
        {
            "folder": str(store.folder),
            "settings": to_record(settings),
            "assignment": dataclasses.asdict(assignment),
        },
        ascii_only=True,
    )


def _decode_assignment(line: str) -> tuple[Store, Settings, Assignment]:
    value = parse_json(line)
    values, assigned = value["settings"], value["assignment"]
    assigned["failed_before"] = {int(index): time for index, time in assigned["failed_before"].items()}
    for name in ("own", "rest"):
        assigned[name] = [[PromptRecord(**prompt) for prompt in group] for group in assigned[name]]
    settings, assignment = from_record(Settings, values), Assignment(**assigned)
    return Store(Path(value["folder"]), settings, f"w{assignment.worker}"), settings, assignment


def main() -> int:
    """The exit code, once the assignment on stdin is carried out.

    0 done, 3 after an event WorkerFailed, 1 for an unexpected error.
    """
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_launcher, daemon=True).start()

    def listen(event: Event) -> None:
        events.write(to_json(event) + "\n")
        events.flush()

    store, settings, assignment = _decode_assignment(line)
    try:
        seconds = work(store, settings, assignment, listen)
    except ScaleRAEError as e:
        _print_traceback()
        listen(WorkerFailed(str(e), type(e).__name__))
        return 3
    except Exception as e:
        _print_traceback()
        listen(Message(f"worker {assignment.worker}: unexpected {type(e).__name__}: {e}"))
        return 1
    listen(WorkerFinished(seconds))
    return 0


def _print_traceback() -> None:
    print(printable(traceback.format_exc(), lines=True), file=sys.stderr, flush=True)


def _die_with_launcher() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)  # at once, as if killed: everything on disk is whole at any moment


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
