"""What a bad disk or a stranger's folder does to a scaling experiment: nothing damaged is taken for the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scale_rae import processes
from scale_rae.errors import InputError, OutputError
from scale_rae.jsonio import dump_json
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import local, object_store
from scale_rae.scaling.events import Event, Message, PromptFailed, PromptFinished, printable_event
from scale_rae.scaling.launch import Job
from scale_rae.scaling.local_files import FileLocks
from scale_rae.scaling.object_store import results_folder
from scale_rae.scaling.records import FIRST_FIELDS, Batch, seal, unseal
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment

pytestmark = pytest.mark.attack
SETTINGS = Settings("prompts.jsonl", "shapes", n_samples=2, scaling_rounds=2, batch_size=2)
PROMPT = PromptRecord(1, "a röd circle", 3, {"tag": "single_object"})
DESCRIPTION = {"settings": {"seed": 42, "batch_size": 2}, "prompts": {"count": 1}, "versions": {"torch": "2.9"}}
RECORD = ".work/batches/00003/00000-00001.json"
PICTURE, METADATA, EXPERIMENT = "00003/samples/00001.png", "00003/metadata.jsonl", "experiment.json"


def draw(store: Store, prompt: PromptRecord = PROMPT) -> None:
    """What a worker does of a prompt: draws what is missing, and finishes it."""
    there = {i for batch in store.reopen(prompt.index) for i in batch.samples}
    for start in (0, 2):
        samples = [i for i in (start, start + 1) if i not in there]
        if samples:
            judged = [{"answer": "yes", "yes_logit": 0.1 * i + 0.3, "score": 1e-7 / (i + 1)} for i in samples]
            batch = Batch(samples[0], "Sure.", [7 * i for i in samples], judged, [0.5 * i - 1.0 for i in samples], {})
            store.save_batch(prompt.index, batch, {f"{i:05}.png": b"picture %d" % i * 9 for i in samples})
    store.finish(prompt)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).write_bytes(data)


def flipped(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An experiment with one finished prompt."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no disk is awaited
    store = Store(tmp_path / "run", SETTINGS)
    store.make_folders()
    store.keep_copy(store.claim(DESCRIPTION))
    draw(store)
    return store


def as_of_0_1_0(store: Store) -> dict[str, bytes]:
    """Has the experiment be what version 0.1.0 left: records without checksums, fewer fields, no copy."""
    for path in store.folder.glob(".work/batches/*/*.json"):
        path.write_bytes(dump_json(unseal(path.read_bytes())).encode())
    metadata = json.loads((store.folder / METADATA).read_bytes())
    old = {name: value for name, value in metadata.items() if name in FIRST_FIELDS or name in PROMPT.extra}
    (store.folder / METADATA).write_bytes((dump_json(old) + "\n").encode())
    (store.folder / ".work" / "experiment.json").unlink(missing_ok=True)
    return files(store.folder)


def test_flipped_bits_are_never_taken_for_the_truth(store: Store) -> None:
    rng, good = random.Random(14), files(store.folder)
    names = [name for name in good if name.startswith(("00003/", ".work/batches/"))]
    assert len(names) == 7
    for _ in range(300):
        name = rng.choice(names)
        write(store.folder, {name: flipped(rng, good[name])})
        finished, problems = store.check(PROMPT)
        assert not finished
        assert any(str(store.folder / name) in problem for problem in problems)
        if rng.random() < 0.1:
            draw(store)
            assert files(store.folder) == good
        write(store.folder, {name: good[name]})


def test_flipped_bits_in_what_0_1_0_wrote(store: Store) -> None:
    good = as_of_0_1_0(store)
    assert store.check(PROMPT) == (True, [])
    truth = [dataclasses.asdict(b) for b in store.batches(3)[0]]
    rng, names = random.Random(1), [n for n in good if n.startswith(("00003/", ".work/batches/"))]
    for _ in range(150):
        name = rng.choice(names)
        write(store.folder, {name: flipped(rng, good[name])})
        finished, problems = store.check(PROMPT)
        assert not finished
        assert problems
        assert all(dataclasses.asdict(b) in truth for b in store.batches(3)[0])
        write(store.folder, {name: good[name]})


def test_an_experiment_of_0_1_0_goes_on(store: Store) -> None:
    """What is finished stays as it is; records without a checksum count as far as metadata.jsonl says the same."""
    good = as_of_0_1_0(store)
    assert store.check(PROMPT) == (True, [])
    assert files(store.folder) == good
    (store.folder / PICTURE).unlink()
    assert [b.start for b in store.reopen(3)] == [2]  # is still known when metadata.jsonl is gone
    assert [b.start for b in store.batches(3)[0]] == [2]
    draw(store)
    assert store.check(PROMPT) == (True, [])
    as_of_0_1_0(store)
    (store.folder / METADATA).unlink()
    assert store.batches(3)[0] == []
    assert "has no checksum, and metadata.jsonl does not say the same" in store.check(PROMPT)[1][0]


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: record | values


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {k: v for k, v in record.items() if k != name}


MALFORMED: list[Callable[[dict[str, Any]], Any]] = [
    *(without(name) for name in ("start", "output_text", "seeds", "judged", "rewards", "files")),
    *(changed(start=value) for value in (-1, 4, 3, True, "0", None, 1.0, 10**300)),
    *(changed(judged=value) for value in ([], {}, None, [1, 2], [{}, {}], ["yes"] * 2, [{"answer": 1}] * 2)),
    *(changed(rewards=value) for value in (None, [], [1.0], ["1", "2"], [True, False], [1.0, None], {"0": 1.0})),
    *(changed(seeds=value) for value in (None, [1], [1.5, 2.5], [-1, 2], [2**63, 1], "ab")),
    *(changed(files=value) for value in (None, {}, [], {"00000.png": 3, "00001.png": 4}, {"../../x": "0" * 64})),
    changed(output_text=None),
    changed(more=1),
]


@pytest.mark.parametrize("change", MALFORMED)
@pytest.mark.parametrize("checksum", [True, False])
def test_malformed_records_are_drawn_again(store: Store, change: Any, checksum: bool) -> None:
    """Also those that a stranger has given a checksum, and those of a version without."""
    good = files(store.folder)
    value = change(unseal(good[RECORD]))
    write(store.folder, {RECORD: seal(value) if checksum else dump_json(value).encode()})
    finished, problems = store.check(PROMPT)
    assert not finished
    assert problems[0].startswith(str(store.folder / RECORD))
    draw(store)
    assert files(store.folder) == good


NO_JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b'{"start": NaN}']
NO_JSON += [b'"\\ud800"', b'{"sha256": "\\ud800"}', b'{"sha256": 1e999}', b"\x00" * 400]


@pytest.mark.parametrize("data", NO_JSON)
@pytest.mark.parametrize("name", [RECORD, METADATA, EXPERIMENT])
def test_what_is_no_json_is_made_again(store: Store, name: str, data: bytes) -> None:
    good = files(store.folder)
    write(store.folder, {name: data})
    assert store.check(PROMPT)[0] == (name == EXPERIMENT)
    assert isinstance(store.answers(3), list)
    assert store.restore_experiment() is not None or name != EXPERIMENT
    draw(store)
    assert files(store.folder) == good


@pytest.mark.parametrize("name", [RECORD, METADATA, EXPERIMENT, PICTURE])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "large", "lfs", "loop"])
def test_what_is_no_file_neither_hangs_nor_fills_the_memory(store: Store, name: str, kind: str) -> None:
    path = store.folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)  # whose whole name may be too long for a socket
            server.bind(path.name)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    else:
        path.symlink_to(path)
    assert store.check(PROMPT)[0] == (name == EXPERIMENT)
    assert store.read_experiment() == DESCRIPTION
    assert isinstance(store.answers(3), list)


def test_flipped_bits_in_the_experiments_description(store: Store) -> None:
    rng, good = random.Random(5), files(store.folder)
    copy = ".work/experiment.json"
    for _ in range(80):
        name = rng.choice((EXPERIMENT, copy))
        write(store.folder, {name: flipped(rng, good[name])})
        assert {
            name: part for name, part in (store.read_experiment() or {}).items() if name in DESCRIPTION
        } == DESCRIPTION
        store.restore_experiment()
        store.keep_copy(store.read_experiment() or {})
        found = json.loads((store.folder / EXPERIMENT).read_bytes())
        assert {name: part for name, part in found.items() if name in DESCRIPTION} == DESCRIPTION
        write(store.folder, {name: good[name] for name in (EXPERIMENT, copy)})


def test_an_experiment_without_any_description_is_refused(store: Store) -> None:
    copy = (store.folder / ".work" / "experiment.json").read_bytes()
    write(store.folder, {EXPERIMENT: b"", ".work/experiment.json": copy[:-3]})
    with pytest.raises(InputError, match=r"experiment\.json: cannot be read .*choose another --output-dir"):
        store.restore_experiment()
    write(store.folder, {".work/experiment.json": copy})
    (store.folder / EXPERIMENT).unlink()
    with pytest.raises(InputError, match=r"missing.*put its copy .*\.work/experiment\.json there"):
        store.read_experiment()


def test_a_damaged_description_without_results_is_made_anew(store: Store) -> None:
    shutil.rmtree(store.folder / ".work" / "batches")
    shutil.rmtree(store.folder / "00003")
    write(store.folder, {EXPERIMENT: b"", ".work/experiment.json": b""})
    assert "no results yet" in (store.restore_experiment() or "")
    other = DESCRIPTION | {"settings": {"seed": 1}}
    assert store.claim(other) == other


def test_a_copy_of_an_earlier_experiment_is_not_believed(store: Store) -> None:
    """Somebody removed all but .work, and a new experiment was killed before its copy was written."""
    shutil.rmtree(store.folder / ".work" / "batches")
    shutil.rmtree(store.folder / "00003")
    (store.folder / EXPERIMENT).unlink()
    other = DESCRIPTION | {"settings": {"seed": 1}}
    assert store.claim(other) == other
    assert store.read_experiment() == other


def test_a_description_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "link", lambda a, b: (done.append("link"), link(a, b)))
    store = Store(tmp_path, SETTINGS)
    store.make_folders()
    store.claim(DESCRIPTION)
    assert done == ["file", "link", "folder"]


def test_killed_between_a_result_and_the_removal_of_its_error(store: Store) -> None:
    good = files(store.folder)
    store.fail(3, "earlier", 2)
    assert store.failure(3) is None  # the result counts
    assert store.check(PROMPT) == (True, [])
    store.tidy(3)
    assert files(store.folder) == good
    store.fail(3, "earlier", 2)
    (store.folder / METADATA).unlink()
    assert (store.failure(3) or (0, ""))[1] == "earlier"
    store.reopen(3)
    assert store.failure(3) is None  # of a run before: not to be taken for one of this run


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"error": ["\\u001b[2J"]}', b"[" * 9999, b'{"error": "' + b"x" * 10**6 + b'"}']
)
def test_any_error_file_is_a_failure(store: Store, data: bytes) -> None:
    (store.folder / METADATA).unlink()
    (store.folder / "00003" / "error.json").write_bytes(data)
    failure = store.failure(3)
    assert failure is not None
    assert "\x1b" not in failure[1]
    assert len(failure[1]) < 5000


@pytest.mark.parametrize(
    "name",
    [".work/tmp/w0", ".work/tmp/w0.claim", ".work/locks/00003", ".work/run.lock", ".work/holder", "logs/worker-0.log"],
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_no_link_is_followed_where_something_is_written(tmp_path: Path, name: str, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    store = Store(tmp_path / "run", SETTINGS)
    store.make_folders()
    path = store.folder / name
    if kind == "link":
        path.symlink_to(victim)
    else:
        os.mkfifo(path)
    for act in (
        lambda: store.claim(DESCRIPTION),
        lambda: draw(store),
        lambda: store.lock_run().close(),
        lambda: store.lock_prompt(3),
        lambda: store.log(0, "a line"),
    ):
        if name.startswith((".work/locks", ".work/run.lock")):  # not replaced: another process may hold them
            with contextlib.suppress(OutputError):
                act()
        else:
            act()
    assert victim.read_text() == "precious"
    assert store.check(PROMPT) == (True, [])


@pytest.mark.parametrize("name", [".work", ".work/tmp", ".work/locks", ".work/batches"])
def test_no_folder_of_the_run_is_elsewhere(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a symbolic link, which is not followed"):
        Store(folder, SETTINGS).lock_run()


def test_what_a_killed_run_left_is_replaced(store: Store) -> None:
    good = files(store.folder)
    (store.folder / ".work" / "tmp" / "w0").write_bytes(b"half")
    (store.folder / ".work" / "tmp" / "w0.claim").write_bytes(b"half")
    (store.folder / PICTURE).unlink()
    draw(store)
    store.claim(DESCRIPTION)
    assert files(store.folder) == good


def test_records_that_are_not_used_are_complained_of_once(store: Store) -> None:
    folder = store.folder / ".work" / "batches" / "00003"
    (folder / "00000-00003.json").write_text("{}")
    (folder / "notes.json").write_text("{}")  # no record by its name
    assert store.check(PROMPT)[1] == [f"{folder / '00000-00003.json'}: damaged"]
    store.finish(PROMPT)
    assert store.check(PROMPT) == (True, [])
    assert (folder / "notes.json").exists()


@pytest.mark.parametrize("index", [10**18, 2**63, 10**240])
def test_large_indices(store: Store, index: int) -> None:
    prompt = PromptRecord(1, "x", index)
    assert store.check(prompt) == (False, [])
    draw(store, prompt)
    assert store.check(prompt) == (True, [])


def test_an_index_that_is_no_file_name(store: Store) -> None:
    prompt = PromptRecord(1, "x", 10**300)
    assert not store.check(prompt)[0]
    assert not store.has_record(prompt.index)
    with pytest.raises(OutputError, match="File name too long"):
        store.lock_prompt(prompt.index)
    with pytest.raises(OutputError, match="File name too long"):
        draw(store, prompt)


HOSTILE = "a \x1b]0;title\x07\x1b[2J\x9b1m\u202ecat"


def test_texts_of_files_are_escaped_where_they_are_shown(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "a \\x1b]0;title\\x07\\x1b[2J\\x9b1m\\u202ecat"
    hostile: list[Event] = [PromptFinished(3, HOSTILE, 4, 2), PromptFailed(3, HOSTILE), Message(f"a\n{HOSTILE}")]
    assert [printable_event(event) for event in hostile] == [
        PromptFinished(3, shown, 4, 2),
        PromptFailed(3, shown),
        Message(f"a\n{shown}"),
    ]
    store.log(0, f"done: {HOSTILE}")
    assert shown in (store.folder / "logs" / "worker-0.log").read_text()
    (store.folder / ".work" / "holder").write_text(HOSTILE)
    monkeypatch.setattr("scale_rae.scaling.local_files.LOCK_WAIT", 0.0)
    with store.lock_run():
        (store.folder / ".work" / "holder").write_text(HOSTILE)
        with pytest.raises(OutputError) as error:
            store.lock_run()
    assert shown in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("upath") is None, reason="needs the ray extra")
@pytest.mark.parametrize("data", [b"[1]", b"[" * 50_000, b"\xff", b'{"who": "\\u001b[2J", "run": 1}', b"x" * 10**6])
def test_a_hostile_lease(monkeypatch: pytest.MonkeyPatch, data: bytes, tmp_path: Path) -> None:
    for name, seconds in (("BEAT", 0.02), ("SILENCE", 0.05), ("SETTLE", 0.0)):
        monkeypatch.setattr(object_store, name, seconds)
    folder = results_folder(f"memory://{tmp_path.name}/run")
    object_store.put(folder / ".work" / "run.json", data)
    large = len(data) == 10**6
    refused = pytest.raises(OutputError, match="larger than 64 KiB") if large else contextlib.nullcontext()
    with refused:
        Store(folder, SETTINGS).lock_run().close()  # it never changes: its run is dead


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose modules are called like Python's own, and which is on the path by an empty entry."""
    for name in ("random", "json", "typing", "dataclasses", "scale_rae"):
        (tmp_path / f"{name}.py").write_text("import os\nos.mkdir('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:/nowhere")
    yield tmp_path
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_child_processes_import_nothing_from_the_working_folder(traps: Path, installed: bool) -> None:
    python, *rest = processes.command("scale_rae.errors")  # a module that needs nothing but Python
    code = "import os, random, sys; print(os.environ.get('PYTHONPATH'), sys.path, sys.modules['scale_rae'].__file__)"
    rest[rest.index("-c") + 1] += f"\nexec({code!r})"
    command = [python, *([] if installed else ["-S"]), *rest]  # without site-packages it is not installed
    ran = subprocess.run(command, env=processes.environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("/nowhere [")
    assert str(traps) not in ran.stdout
    assert "''" not in ran.stdout
    assert ran.stdout.strip().endswith(str(processes.FOLDER / "__init__.py"))


def test_workers_are_started_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Process:
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append((command, options["env"]))
            self.stdin = open(os.devnull, "w")  # noqa: PTH123, SIM115

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("PYTHONPATH", ":")
    with store.lock_run():
        pass
    job = Job(store, SETTINGS, {}, [], [], {}, FileLocks(), False)
    local.start_worker(job, Assignment(0, "cpu", [], [], {}), 1).stdin.close()
    ((command, environment),) = started
    assert command[:3] == [sys.executable, "-P", "-c"]
    assert command[-1] == "scale_rae.scaling.worker_process"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert "PYTHONPATH" not in environment
