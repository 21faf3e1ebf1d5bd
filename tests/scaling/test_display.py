"""What a person sees of a run."""

from __future__ import annotations

import sys

import pytest
from rich.progress import Progress, TaskID

from scale_rae.cli.progress import ScalingDisplay
from scale_rae.scaling.events import (
    Event,
    ImagesDrawn,
    Message,
    Planned,
    PromptFailed,
    PromptFinished,
    WorkerFailed,
    WorkerFinished,
    WorkerLoaded,
    from_json,
    to_json,
)

EVENTS: list[Event] = [
    Planned(todo=3, finished=1, images_per_prompt=8, workers=2),
    WorkerLoaded(worker=0, device="cpu"),
    ImagesDrawn(8),
    PromptFinished(index=4, prompt="a cat", images=8, yes=5),
    PromptFailed(index=5, error="no\nimage"),
    Message("prompt 6: out of memory"),
    ImagesDrawn(4),
]


def show(display: ScalingDisplay, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the events, two seconds apart."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for event in EVENTS:
        display(event)
        now[0] += 2
    display.stop()


def test_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show(ScalingDisplay(), monkeypatch)
    assert capsys.readouterr().err.splitlines() == [
        "1 prompt done already, 3 to do",
        "00004 a cat: 5 yes of 8 [1/3 prompts, 2.00 images/s, 8 s left]",
        "00005 failed: no image",
        "prompt 6: out of memory",
    ]


def test_only_warnings_of_a_quiet_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show(ScalingDisplay(quiet=True), monkeypatch)
    assert capsys.readouterr().err == "prompt 6: out of memory\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    states: list[str] = []
    update = Progress.update

    def recorded(bar: Progress, task: TaskID, *, completed: float, total: float, description: str) -> None:
        states.append(description)
        update(bar, task, completed=completed, total=total, description=description)

    monkeypatch.setattr(Progress, "update", recorded)
    show(ScalingDisplay(), monkeypatch)
    assert states[0] == "0/3 prompts, loading"
    assert states[-1] == "2/3 prompts, 1.20 images/s, 7 s left"
    err = capsys.readouterr().err
    assert "00005 failed: no image" in err
    assert "a cat" not in err


@pytest.mark.parametrize("event", [*EVENTS, WorkerFinished({"drawing": 1.5}), WorkerFailed("no memory", "DeviceError")])
def test_events_as_json(event: Event) -> None:
    """As worker processes send them; half a line of one that was killed is none."""
    line = to_json(event)
    assert "\n" not in line
    assert from_json(line) == event
    for other in (line[:-1], "[]", '{"event": "planned"}', line[:-1] + ', "more": 1}'):
        with pytest.raises(ValueError):
            from_json(other)
