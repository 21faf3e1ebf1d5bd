"""How processes of a launcher share an experiment, and what a device has memory for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from scale_rae.errors import DeviceError, InputError
from scale_rae.memory import largest_batch, out_of_memory
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import local
from scale_rae.scaling.events import Event, ImagesDrawn, PromptFailed, PromptFinished, WorkerFailed, to_json
from scale_rae.scaling.lanes import split
from scale_rae.scaling.ranks import ProcessGroup, watched
from scale_rae.scaling.records import Batch
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from tests.scaling.conftest import PROMPTS, Scale, snapshot, write_prompts


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, ProcessGroup()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, ProcessGroup(3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, ProcessGroup(3, 8, 3)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            ProcessGroup(2, 4, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ProcessGroup()),  # a batch script, not started by srun
    ],
)
def test_the_group_of_a_process(environment: dict[str, str], group: ProcessGroup) -> None:
    assert ProcessGroup.from_environment(environment) == group


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}],
)
def test_a_group_that_cannot_be(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="RANK"):
        ProcessGroup.from_environment(environment)


@pytest.mark.parametrize(
    ("device", "devices", "cores", "threads"),
    [
        ("cpu", ["cpu"], 8, 8),
        ("cpu", ["cpu"] * 3, 8, 2),
        ("cpu", ["cpu", "cuda:0"], 8, 8),
        ("cpu", ["cpu"] * 3, 2, 1),
        ("cuda:1", ["cuda:0", "cuda:1"], 32, 4),
        ("cuda:0", ["cuda:0"], 2, 2),
        ("cuda:0", [f"cuda:{i}" for i in range(8)], 16, 2),
        ("cuda:0", [f"cuda:{i}" for i in range(8)], None, 1),
    ],
)
def test_workers_share_the_cores(
    device: str, devices: list[str | None], cores: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs' workers with a thread for every core drew 1.3 times what one did."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert local.thread_count(device, devices) == threads


def test_one_display_for_all_processes_of_a_launch(tmp_path: Path, reference: dict[str, bytes]) -> None:
    scale = Scale(tmp_path)

    def start(rank: str) -> int:
        """A process of its own that runs the command; it is forked, which saves it from importing everything again."""
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.environ.update(WORLD_SIZE="2", RANK=rank)
                with (
                    (tmp_path / f"{rank}.out").open("w") as sys.stdout,
                    (tmp_path / f"{rank}.err").open("w") as sys.stderr,
                ):
                    code = scale().code
            finally:
                os._exit(code)
        return child

    ranks = [start("0")]
    deadline = time.monotonic() + 240  # against hanging only
    while not (scale.folder / ".work" / "holder").exists():  # rank 0 counts what is to do
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks.append(start("1"))
    # Neither ends before the other is done, or a launcher would end it.
    assert [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks] == [0, 0]
    (out, err), *rest = [tuple((tmp_path / f"{rank}.{name}").read_text() for name in ("out", "err")) for rank in "01"]
    assert out == f"{scale.folder}\n"
    assert [f"[{n}/3 prompts, " in err for n in (1, 2, 3)] == [True] * 3
    assert all(f"{index:05} a photo of" in err for index in (0, 2, 7))
    assert "3 of 3 prompts done; 12 images drawn" in err
    assert rest == [("", "")]
    assert snapshot(scale.folder) == reference


def test_what_other_processes_do_is_seen_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.scaling.ranks.LOOK", 0.01)
    store = Store(tmp_path, Settings("", "shapes", n_samples=1, reward=None))
    store.make_folders()
    prompts = [PromptRecord(i + 1, f"prompt {i}", i) for i in range(3)]
    judged = [{"answer": "yes"}]
    store.save_batch(0, Batch(0, "", [1], judged, None, {}), {"00000.png": b"x"})  # of an earlier run
    store.fail(2, "earlier", 2)
    failed = {2: (store.failure(2) or (0, ""))[0]}
    events: list[Event] = []
    with watched(store, prompts, failed, events.append):
        store.save_batch(0, Batch(1, "", [2], judged, None, {}), {"00001.png": b"y"})
        store.finish(prompts[0])
        store.fail(1, "no memory", 2)
    assert sorted(events, key=str) == [
        ImagesDrawn(1),
        PromptFailed(index=1, error="no memory"),
        PromptFinished(index=0, prompt="prompt 0", images=2, yes=2),
    ]


def test_a_worker_waits_for_what_others_draw(scale: Scale, reference: dict[str, bytes]) -> None:
    store = Store(scale.folder, Settings("", "shapes"))
    store.make_folders()
    lock = store.lock_prompt(7)
    assert lock is not None
    log = store.log_file(0)

    def release() -> None:  # as if its worker died
        while not (log.exists() and "waiting for 1 prompt that other workers are drawing" in log.read_text()):
            time.sleep(0.02)
        lock.close()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    assert scale().code == 0
    thread.join()
    assert snapshot(scale.folder) == reference


@pytest.mark.usefixtures("forked_workers")
def test_a_device_that_is_full_leaves_its_prompts_to_the_others(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers the second reports at once that its device has no memory for the model."""
    start = local.start_worker
    line = to_json(WorkerFailed("cuda:1: out of GPU memory", "DeviceError"))

    def start_second_unfit(job: Any, assignment: Any, threads: int) -> Any:
        if assignment.worker in unfit:
            script = f"print({line!r}); import sys; sys.exit(3)"
            return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        return start(job, assignment, threads)

    monkeypatch.setattr(local, "start_worker", start_second_unfit)
    unfit = {0, 1}
    result = scale("--devices", "cpu,cpu", device=False)
    assert result.code == 1
    assert "error: cuda:1: out of GPU memory" in result.err
    unfit = {1}
    result = scale("--devices", "cpu,cpu", device=False)
    assert result.code == 0
    assert "worker 1 (cpu): cuda:1: out of GPU memory; the others take over its prompts" in result.err
    assert snapshot(scale.folder) == reference


class Memory:
    """A device with memory for `capacity` images at once; it notes the sizes tried, and the smallest share that was free."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.tried, self.released = capacity, list[int](), 0

    def attempt(self, size: int) -> None:
        self.tried.append(size)
        if size > self.capacity:
            raise DeviceError("cuda:0: out of GPU memory") from torch.OutOfMemoryError("CUDA out of memory")

    def release(self) -> None:
        self.released += 1

    def spare(self) -> float:
        return 1 - max(self.tried) / self.capacity


@pytest.mark.parametrize(
    ("most", "capacity", "size", "tried"),
    [
        (8, 100, 8, [1, 2, 4, 8]),
        (12, 100, 12, [1, 2, 4, 8, 12]),
        (32, 20, 16, [1, 2, 4, 8, 16, 32]),
        (32, 17, 8, [1, 2, 4, 8, 16]),  # 16 fit, but with too little to spare
        (1, 100, 1, [1]),
        (8, 0.5, 1, [1]),
    ],
)
def test_largest_batch(most: int, capacity: float, size: int, tried: list[int]) -> None:
    memory = Memory(capacity)
    assert largest_batch(most, memory.attempt, memory.release, memory.spare, 0.1) == size
    assert memory.tried == tried
    assert memory.released == (tried[-1] > capacity)


def test_what_an_attempt_made_is_gone_when_its_memory_is_released() -> None:
    class Large: ...

    made: list[weakref.ref[Large]] = []

    def attempt(size: int) -> None:
        large = Large()
        made.append(weakref.ref(large))
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def release() -> None:
        assert made[-1]() is None

    assert largest_batch(8, attempt, release, lambda: 1.0, 0.1) == 2
    assert len(made) == 3


def test_largest_batch_passes_other_errors_on() -> None:
    def attempt(size: int) -> None:
        raise InputError("no such prompt")

    with pytest.raises(InputError, match="no such prompt"):
        largest_batch(8, attempt, lambda: None, lambda: 1.0, 0.1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    wrapped = DeviceError("x")
    wrapped.__cause__ = error
    assert out_of_memory(error)
    assert out_of_memory(wrapped)
    assert not out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.usefixtures("in_batches")
def test_batch_size_auto_is_measured_once_and_kept(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the CPU, of which only the type matters here."""
    sizes = list[int]()
    sample = ScaleRAE.sample

    def limited(self: ScaleRAE, conditions: Any, seeds: Any, *args: Any, **options: Any) -> list[torch.Tensor]:
        sizes.append(len(seeds))
        if len(seeds) > 3:
            raise DeviceError("out of GPU memory") from torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, conditions, seeds, *args, **options)

    monkeypatch.setattr(ScaleRAE, "sample", limited)
    monkeypatch.setattr("scale_rae.scaling.joining.measures_memory", lambda model: True)
    write_prompts(scale.prompts, [{"prompt": "word " * 5000}, *PROMPTS])  # the first cannot be read at all
    result = scale("--batch-size", "auto", "--limit", 2)
    assert result.code == 1
    assert sizes == [1, 2, 4, 2, 2]
    assert "00000  the prompt is" in result.err
    described = json.loads((scale.folder / "experiment.json").read_text())
    assert described["settings"]["batch_size"] == 2
    assert json.loads((scale.folder / "00001" / "metadata.jsonl").read_text())["image_seeds"]

    sizes.clear()
    scale("--batch-size", "auto", "--limit", 3)  # goes on with what was measured then
    assert sizes == [2, 2]
    assert "batch_size 1 here, 2 there" in scale("--batch-size", 1).err


def test_the_lanes_of_a_group_depend_on_its_size_alone() -> None:
    assert split(range(15)) == [range(15)]
    assert split(range(16)) == [range(8), range(8, 16)]
    assert split(range(33)) == [range(17), range(17, 33)]
