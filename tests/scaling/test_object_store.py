"""Results in an object store: fsspec's own in memory."""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from pathlib import Path

import pytest

from scale_rae.errors import InputError, OutputError
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import object_store
from scale_rae.scaling.object_store import Lease, is_remote, results_folder
from scale_rae.scaling.records import Batch
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from tests.scaling.conftest import Scale

pytestmark = pytest.mark.skipif(importlib.util.find_spec("upath") is None, reason="needs the ray extra")
PROMPT = PromptRecord(1, "a red circle", 3)
SETTINGS = Settings("", "shapes", n_samples=2, scaling_rounds=1, reward=None)


@pytest.fixture
def folder() -> Path:
    return results_folder(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder, SETTINGS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.02), ("SILENCE", 0.3), ("SETTLE", 0.05)):
        monkeypatch.setattr(object_store, name, seconds)


def finish(store: Store) -> None:
    for i in range(2):
        batch = Batch(i, "text", [i], [{"answer": "yes"}], None, {})
        store.save_batch(3, batch, {f"{i:05}.png": b"pixels" + bytes([i])})
    store.finish(PROMPT)


def test_addresses_are_of_stores_and_paths_of_folders(tmp_path: Path) -> None:
    assert results_folder("a/b") == Path("a/b")
    assert results_folder(f"file://{tmp_path}") == tmp_path
    assert not is_remote(results_folder("C:/x"))
    assert is_remote(results_folder("memory://bucket/x/"))
    assert str(results_folder("memory://bucket/x/") / "y") == "memory://bucket/x/y"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file://a/b", "three slashes"),
        ("nope://a/b", "nope"),
        ("~nosuch/x", "no such user"),
        ("caf\udce9", "not valid UTF-8"),
        ("a\0b", "null character"),
    ],
)
def test_names_that_are_none(url: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        results_folder(url)


def test_a_store_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    monkeypatch.setattr("upath.core.get_filesystem_class", missing, raising=False)
    with pytest.raises(InputError, match="s3://bucket/x: Install s3fs to access S3"):
        results_folder("s3://bucket/x")


def test_only_with_ray(scale: Scale) -> None:
    result = scale("--output-dir", "memory://bucket/x")
    assert result.code == 1
    assert "--output-dir memory://bucket/x: a store has no locks" in result.err


def test_the_same_files_as_in_a_folder(store: Store, folder: Path, tmp_path: Path) -> None:
    local = Store(tmp_path, SETTINGS)
    local.make_folders()
    for each in (store, local):
        assert each.read_experiment() is None
        assert each.claim({"settings": {}}) == {"settings": {}}
        finish(each)
        assert each.check(PROMPT) == (True, [])
        assert each.has_record(3)
        assert each.answers(3) == ["yes", "yes"]
        assert each.failure(3) is None
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 6
    for path in files:
        assert (folder / str(path.relative_to(tmp_path))).read_bytes() == path.read_bytes()


def test_what_is_gone_is_found(store: Store, folder: Path) -> None:
    store.claim({})
    finish(store)
    (folder / "00003" / "samples" / "00001.png").unlink()
    finished, problems = store.check(PROMPT)
    assert not finished
    assert problems == [f"{folder}/00003/samples/00001.png: missing"]
    store.reopen(3)
    assert not store.has_record(3)
    (folder / "experiment.json").unlink()
    with pytest.raises(InputError, match=r"experiment\.json: missing"):
        store.read_experiment()


def test_a_failure_is_kept_until_the_prompt_is_done(store: Store) -> None:
    before = time.time_ns()
    store.fail(3, "no memory", 2)
    failure = store.failure(3)
    assert failure is not None
    assert failure[1] == "no memory"
    assert before - 10**9 < failure[0] < time.time_ns() + 10**9
    finish(store)
    assert store.failure(3) is None


def test_a_store_that_refuses(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, data: bytes) -> None:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(object_store, "put", refuse)
    with pytest.raises(OutputError, match=r"00003/error\.json: cannot be written \(Unable to locate credentials\)"):
        store.fail(3, "", 2)
    with pytest.raises(OutputError, match=r"run: cannot be written to .*Unable to locate credentials"):
        store.lock_run()


@pytest.mark.usefixtures("quick")
def test_a_second_start_is_refused_while_the_first_lives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "SILENCE", 200.0)  # however late the first's sign of life is
    with store.lock_run(), pytest.raises(OutputError, match=r"process \d+ on .* is at work here"):
        store.lock_run()
    store.lock_run().close()


@pytest.mark.usefixtures("quick")
def test_the_lease_of_a_dead_run_runs_out(store: Store, folder: Path) -> None:
    path = folder / ".work" / "run.json"
    object_store.put(path, b'{"run": "x", "who": "process 1 on gone", "beat": 7}')
    start = time.monotonic()
    lock = store.lock_run()
    assert time.monotonic() - start >= 0.3
    assert json.loads(path.read_bytes())["run"] != "x"
    lock.close()
    assert not path.exists()
    object_store.put(path, b"{")  # an unreadable one too
    store.lock_run().close()


@pytest.mark.usefixtures("quick")
def test_a_run_whose_lease_was_taken_stops(folder: Path) -> None:
    path = folder / "run.json"
    lease = Lease(path)
    lease.check()
    other = b'{"run": "x", "who": "process 1 on another", "beat": 1}'

    def hold_on() -> None:
        deadline = time.monotonic() + 240  # against hanging only
        while time.monotonic() < deadline:
            lease.check()
            object_store.put(path, other)  # again, in case its own came last
            time.sleep(0.03)

    with pytest.raises(OutputError, match="process 1 on another has taken over here"):
        hold_on()
    lease.close()
    assert path.read_bytes() == other


@pytest.mark.usefixtures("quick")
def test_of_two_starts_at_once_one_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "run.json"

    def sleep(seconds: float) -> None:
        object_store.put(path, b'{"run": "x", "who": "process 1 on another", "beat": 1}')

    monkeypatch.setattr("scale_rae.scaling.object_store.time.sleep", sleep)
    with pytest.raises(OutputError, match="process 1 on another is at work here"):
        Lease(path)
