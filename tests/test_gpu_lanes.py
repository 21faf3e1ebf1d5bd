"""Halves of a group, side by side on a GPU: the same bytes as one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from scale_rae.options import SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import lanes
from scale_rae.scaling.batches import BatchMaker
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, Worker
from tests.scaling.conftest import snapshot

pytestmark = pytest.mark.gpu
PROMPTS = [
    PromptRecord(i, f"a photo of a {color} {shape}", i)
    for i, (color, shape) in enumerate((c, s) for c in ("red", "blue", "green") for s in ("ring", "star", "cross") * 2)
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_side_by_side_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    settings = Settings(
        "prompts.jsonl",
        "shapes",
        search="adaptive",
        n_samples=2,
        reward=None,
        dtype=dtype,
        options=SamplingOptions(steps=10, solver="ab2"),
        batch_size=16,
    )
    model = ScaleRAE.from_pretrained("shapes", device="cuda", dtype=dtype)
    left = []
    for run, at_once in enumerate((1, lanes.LANES, lanes.LANES)):
        monkeypatch.setattr(lanes, "ThreadPoolExecutor", lambda _, threads=at_once: ThreadPoolExecutor(threads))
        store = Store(tmp_path / str(run), settings)
        store.make_folders()
        with Worker(
            store, BatchMaker(settings, model), 16, Assignment(0, "cuda:0", [], [], {}), lambda event: None
        ) as worker:
            assert worker.attempt(PROMPTS)
        assert all(store.has_record(prompt.index) for prompt in PROMPTS)
        left.append(snapshot(tmp_path / str(run)))
    assert left[0] == left[1] == left[2]


def test_one_function_is_in_a_stage_and_what_fails_is_raised_when_all_have_ended() -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cuda")
    halves, inside, most, ended = lanes.Lanes(model, lambda: None), [0], [0], threading.Event()

    def work() -> None:
        for _ in range(20):
            with halves.turn("drawing"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                torch.ones(1 << 20, device="cuda").sum().item()
                inside[0] -= 1
        ended.set()

    def fail() -> None:
        raise ValueError("not so")

    with pytest.raises(ValueError, match="not so"):
        halves.run([fail, work])
    assert ended.is_set()
    halves.run([work, work])
    assert most == [1]
