"""Left alone: killed, out of disk, out of memory, started twice; then resumed, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scale_rae.adapters import write_adapter
from scale_rae.errors import DeviceError, ScaleRAEError
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import LatentSampler
from scale_rae.scaling.local_files import LocalFiles
from scale_rae.scaling.records import FIRST_FIELDS
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from tests.scaling.conftest import Scale, record, snapshot

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.link")  # audit events of Python


def killed(run: Callable[[], object], touches: int | None = None) -> bool:
    """Forks and runs; whether the child was killed. With `touches` it kills itself when it touches files that many times."""
    child = os.fork()
    if child == 0:
        left = [touches or 0]

        def audit(event: str, arguments: object) -> None:
            left[0] -= event in TOUCHES
            if event in TOUCHES and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.addaudithook(audit)
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_random_moments(scale: Scale, reference: dict[str, bytes]) -> None:
    rng = random.Random(3)
    kills = 0
    for _ in range(12):
        if not killed(scale, rng.randrange(40, 200)):
            break
        kills += 1
    assert kills >= 2
    assert scale().code == 0
    assert snapshot(scale.folder) == reference


def test_killed_in_the_middle_of_each_write(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalFiles.write
    for n in range(2, 14, 2):
        calls = [0]

        def half(
            files: LocalFiles, path: Path, data: bytes, durable: bool = True, n: int = n, calls: list[int] = calls
        ) -> None:
            calls[0] += durable
            if durable and calls[0] == n:
                files.temporary.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(files, path, data, durable)

        with monkeypatch.context() as patch:
            patch.setattr(LocalFiles, "write", half)
            killed(scale)
        # What was finished stays: a batch is two images and a record.
        assert len(list(scale.folder.glob(".work/batches/*/*.json"))) >= 1 or n < 5
    assert scale().code == 0
    assert snapshot(scale.folder) == reference


def test_killed_worker_and_killed_launcher(scale: Scale, reference: dict[str, bytes]) -> None:
    launcher = os.fork()
    if launcher == 0:
        try:
            scale("--devices", "cpu,cpu", device=False)
        finally:
            os._exit(0)

    def wait(for_: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 240  # against hanging only
        while not (found := for_()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    def process(worker: int) -> int | None:
        log = scale.folder / "logs" / f"worker-{worker}.log"
        found = re.search(r"process (\d+)", log.read_text()) if log.exists() else None
        return int(found[1]) if found else None

    os.kill(wait(lambda: process(1)), signal.SIGKILL)
    wait(lambda: list(scale.folder.glob("0*/samples/*.png")))
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert scale().code == 0  # once the lock, which the workers share, is free
    assert not Path(f"/proc/{process(0)}/fd/0").exists() or process(0) == os.getpid()
    assert snapshot(scale.folder) == reference


def test_a_second_run_does_nothing(finished: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = finished
    before = {p: p.stat().st_mtime_ns for p in scale.folder.glob("*/**/*.*")}
    monkeypatch.setattr("scale_rae.networks.load", None)
    result = scale()
    assert result.code == 0
    assert "3 prompts done already, 0 to do" in result.err
    assert before == {p: p.stat().st_mtime_ns for p in scale.folder.glob("*/**/*.*")}


def test_damaged_files_are_named_and_made_again(finished: Scale, reference: dict[str, bytes]) -> None:
    scale = finished
    samples = scale.folder / "00000" / "samples"
    (samples / "00001.png").unlink()
    data = (samples / "00002.png").read_bytes()
    (samples / "00002.png").write_bytes(data[:100])
    (scale.folder / "00007" / "metadata.jsonl").write_text("{")
    (scale.folder / ".work" / "batches" / "00002" / "00000-00001.json").write_text('{"start"')
    result = scale()
    assert result.code == 0
    assert f"{samples}/00001.png: missing; made again" in result.err
    assert f"{samples}/00002.png: damaged (100 bytes); made again" in result.err
    assert "00007/metadata.jsonl: damaged; made again" in result.err
    assert "00000-00001.json: damaged; made again" in result.err
    assert snapshot(scale.folder) == reference


def test_records_of_version_0_1_0_get_the_fields_that_came_later(
    finished: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official scripts read some of them. Nothing is drawn for that."""
    scale = finished
    for path in scale.folder.glob("0*/metadata.jsonl"):
        value = json.loads(path.read_text())
        old = {name: part for name, part in value.items() if name in FIRST_FIELDS | {"tag", "include"}}
        assert old.keys() < value.keys()
        path.write_text(json.dumps(old) + "\n")
    monkeypatch.setattr("scale_rae.networks.load", None)
    result = scale()
    assert result.code == 0
    assert "3 prompts done already, 0 to do" in result.err
    assert snapshot(scale.folder) == reference


def test_a_damaged_description_is_restored(finished: Scale, reference: dict[str, bytes]) -> None:
    """As a loss of power leaves it, or a bad disk; other settings are still refused."""
    scale = finished
    path = scale.folder / "experiment.json"
    good = json.loads(path.read_text())
    for damaged in ("", path.read_text().replace('"seed": 42', '"seed": 43')):
        path.write_text(damaged)
        assert "seed 1 here, 42 there" in scale("--seed", 1).err
        path.write_text(damaged)
        result = scale()
        assert result.code == 0
        assert "experiment.json: " in result.err
        assert f"restored from {scale.folder}/.work/experiment.json" in result.err
        assert "3 prompts done already, 0 to do" in result.err
        restored = json.loads(path.read_text())
        assert {**restored, "seconds": good["seconds"]} == good
    assert snapshot(scale.folder) == reference


def test_killed_at_the_very_end(scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last prompt's metadata.jsonl, before an earlier error is removed and the run's end noted."""
    assert scale("--limit", 2).code == 0
    noted = json.loads((scale.folder / "experiment.json").read_text())

    def kill(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store = Store(scale.folder, Settings("", "shapes"))
    store.fail(2, "an earlier failure", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "tidy", lambda store, index: kill() if index == 2 else None)
        patch.setattr(Store, "reopen", lambda store, index: store.batches(index)[0])  # so that the error is still there
        assert killed(scale)
    assert (scale.folder / "00002" / "metadata.jsonl").exists()
    assert (scale.folder / "00002" / "error.json").exists()
    path = scale.folder / "experiment.json"
    path.write_text(json.dumps({k: v for k, v in noted.items() if k not in ("seconds", "failed", "unfinished")}))

    result = scale()
    assert result.code == 0
    assert "3 prompts done already, 0 to do" in result.err
    assert not (scale.folder / "00002" / "error.json").exists()
    ended = json.loads(path.read_text())
    assert (ended["failed"], ended["unfinished"]) == ([], [])
    assert ended["seconds"]["total"] >= 0
    assert {**ended, "seconds": noted["seconds"]} == noted
    assert snapshot(scale.folder) == reference


def test_prompts_that_a_run_does_not_look_at_stay_failed(scale: Scale) -> None:
    assert scale("--limit", 1).code == 0
    path = scale.folder / "experiment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": [7], "unfinished": [0, 2]}))
    assert scale("--limit", 1).code == 0
    ended = json.loads(path.read_text())
    assert (ended["failed"], ended["unfinished"]) == ([7], [2])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("~nosuch/x", "no such user"),
        ("x" * 300, "File name too long"),
        ("new/" + "x" * 300, "File name too long"),
        (os.fsdecode(b"caf\xe9"), "UTF-8"),
    ],
)
def test_output_folders_that_cannot_be(
    scale: Scale, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scale_rae.networks.load", None)  # before any work
    result = scale("--output-dir", name)
    assert result.code in (1, 2)
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert error in result.err


def test_other_settings_are_refused(scale: Scale, reference: dict[str, bytes], tmp_path: Path) -> None:
    assert scale("--limit", 1).code == 0
    before = snapshot(scale.folder)
    result = scale("--steps", 3, "--seed", 1, "--batch-size", 1)
    assert result.code == 1
    for text in ("steps 3 here, 2 there", "seed 1 here, 42 there", "batch_size 1 here, 2 there"):
        assert text in result.err
    with scale.prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    result = scale()
    assert result.code == 1
    assert "the prompts (4 here)" in result.err
    assert snapshot(scale.folder) == before


def test_another_model_of_the_same_name_is_refused(scale: Scale, checkpoints: dict[str, Path]) -> None:
    options = ["--limit", 1, "--model-path"]
    scale(*options, checkpoints["siglip"])
    result = scale("--model-path", checkpoints["webssl"])  # its folder is called "model" too
    assert result.code == 1
    assert "this experiment was started differently: model: config.json" in result.err


def test_another_adapter_of_the_same_name_is_refused(scale: Scale, tmp_path: Path) -> None:
    def write(value: float) -> None:
        change = torch.full((1, 256), value), torch.full((192, 1), value)
        write_adapter(tmp_path / "lora", {"diff_head_projector": change}, 1, 1.0, "shapes")

    options = ["--limit", 1, "--lora", tmp_path / "lora"]
    write(0.0)
    assert scale(*options).code == 0
    path = scale.folder / "experiment.json"
    recorded = json.loads(path.read_text())
    assert recorded["lora"][0]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    write(0.1)
    result = scale("--lora", tmp_path / "lora")
    assert result.code == 1
    assert "this experiment was started differently: lora: other adapters" in result.err
    write(0.0)
    del recorded["lora"]  # as earlier versions wrote it
    path.write_text(json.dumps(recorded))
    assert scale(*options[:1], 2, *options[2:]).code == 0


def test_results_without_their_description_are_refused(scale: Scale) -> None:
    assert scale("--limit", 1).code == 0
    (scale.folder / "experiment.json").unlink()
    result = scale()
    assert result.code == 1
    assert "experiment.json: missing" in result.err


def test_a_second_start_is_refused_while_the_first_runs(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.scaling.local_files.LOCK_WAIT", 0.2)
    store = Store(scale.folder, Settings("", "shapes"))
    with store.lock_run():
        result = scale()
        assert result.code == 1
        assert f"process {os.getpid()} on " in result.err
        assert "is at work here" in result.err
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert scale().code == 1
    with store.lock_run(1, 2), pytest.raises(ScaleRAEError):  # its rank is taken
        store.lock_run(1, 2)


def test_a_full_disk_stops_and_loses_nothing(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, left = os.fsync, [5]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = scale()
    assert result.code == 1
    assert "/00000/samples/00002.png: cannot be written (No space left on device)" in result.err, result.err
    assert not list(scale.folder.glob(".work/tmp/*"))
    assert len(list(scale.folder.glob(".work/batches/*/*.json"))) == 1
    assert scale().code == 0
    assert snapshot(scale.folder) == reference


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[int]], Exception | None]) -> list[int]:
    """Has ScaleRAE.sample raise what `fails` returns for its seeds; the batch sizes it is called with."""
    sample, sizes = ScaleRAE.sample, list[int]()

    def patched(self: LatentSampler, conditions: Any, seeds: Any, *args: Any, **options: Any) -> list[torch.Tensor]:
        sizes.append(len(seeds))
        error = fails(list(seeds))
        if error is not None:
            raise error
        return sample(self, conditions, seeds, *args, **options)

    monkeypatch.setattr(ScaleRAE, "sample", patched)
    return sizes


@pytest.mark.usefixtures("in_batches")
def test_a_failing_prompt_is_recorded_and_tried_again_by_the_rerun(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = json.loads(reference["00007/metadata.jsonl"])["image_seeds"][3]
    with monkeypatch.context() as patch:
        sizes = failing(patch, lambda seeds: ScaleRAEError("not finite") if bad in seeds else None)
        result = scale()
    assert result.code == 1
    assert sizes == [2, 2, 2, 2, 1, 1, 2, 2]
    assert "00007  not finite" in result.err
    assert "error: 1 of 3 prompts failed" in result.err
    assert json.loads((scale.folder / "00007" / "error.json").read_text()) == {"error": "not finite", "tries": 2}
    assert not (scale.folder / "00007" / "metadata.jsonl").exists()
    assert record(scale.folder, 2)
    assert json.loads((scale.folder / "experiment.json").read_text())["failed"] == [7]

    with monkeypatch.context() as patch:
        sizes = failing(patch, lambda seeds: None)
        assert scale().code == 0
    assert sizes == [1]  # the one image that is missing
    assert not (scale.folder / "00007" / "error.json").exists()
    assert snapshot(scale.folder).keys() >= {n for n in reference if not n.startswith(".work")}


def test_a_reply_without_an_image_fails(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    result = scale("--max-new-tokens", 2, "--limit", 1)
    assert result.code == 1
    assert "00000  the model's reply asks for no image within --max-new-tokens 2" in result.err
    assert not list(scale.folder.glob("00000/samples/*"))


@pytest.mark.usefixtures("in_batches")
def test_out_of_memory_halves_the_batch(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(seeds: list[int]) -> Exception | None:
        error = DeviceError("cuda: out of GPU memory")
        error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
        return error if len(seeds) > 1 else None

    sizes = failing(monkeypatch, out_of_memory)
    result = scale("--batch-size", 4, "--limit", 2)
    assert result.code == 0
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert "prompt 0: out of memory with 4 images at once; going on with 2" in result.err


@pytest.mark.usefixtures("in_batches")
def test_the_model_does_not_halve_batches_by_itself(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or other images would be drawn together than the log says."""
    sizes = list[int]()
    draw = LatentSampler.sample_batch

    def limited(self: LatentSampler, condition: torch.Tensor, seeds: list[int], *args: Any) -> torch.Tensor:
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, condition, seeds, *args)

    monkeypatch.setattr(LatentSampler, "sample_batch", limited)
    result = scale("--batch-size", 4, "--limit", 1)
    assert result.code == 0
    assert sizes == [4, 2, 2]
    assert "prompt 0: out of memory with 4 images at once; going on with 2" in result.err


def test_what_is_compiled_depends_on_the_whole_experiment(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list[int]()
    monkeypatch.setattr(ScaleRAE, "expect", lambda self, images: expected.append(images))
    assert scale("--limit", 1).code == 0
    assert scale("--limit", 2).code == 0
    assert expected == [3 * 4, 3 * 4]
    assert 'compile "on" here, "auto" there' in scale("--compile", "on").err


def test_scores_that_are_no_numbers_fail(scale: Scale, reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "score", lambda self, images, prompt: [float("nan")] * len(images))
    result = scale("--reward", "imagereward", "--limit", 1)
    assert result.code == 1
    assert "the reward came out as nan" in result.err
