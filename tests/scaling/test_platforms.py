"""Systems that these tests do not run on: what they lack is taken away here, and what is left must do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from scale_rae import files, processes
from scale_rae.errors import OutputError
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling import local_files, locks
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment
from scale_rae.scaling.worker_process import encode_assignment
from tests.scaling.conftest import NAME, QUICK, Scale, snapshot

SETTINGS = Settings("", "shapes")

# Taken away is what Windows' Python lacks. The library's lock stays what it is here, an exclusive lock of an open file, as it
# is there. A child process runs this, since what is imported already would stay. psutil has another form for each system.
WITHOUT = """
import filelock, os, psutil, select, signal, subprocess, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "triton"):
    sys.modules[name] = None
for module, names in {
    os: "fork symlink getuid geteuid mkfifo O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_CLOEXEC",
    select: "poll", signal: "setitimer alarm SIGALRM SIGHUP",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from scale_rae.cli import main
from scale_rae.scaling import local_files
local_files.LOCK_WAIT = 0.1
options, folder = sys.argv[1:-1], Path(sys.argv[-1])
print(main(options), main([*options, "--seed", "1"]))
lock = open(folder / ".work" / "run.lock", "a")
assert filelock.lock_descriptor(lock.fileno(), blocking=False)
print(main(options))
lock.close()
print(main(options), main(["select", "--sample-dir", str(folder)]), main(["select", "--sample-dir", str(folder)]))
print(main(["report", str(folder), "-o", "report.html"]), main(["sheet", str(folder), "-o", "sheet.png"]))
from scale_rae.serve import server
from scale_rae.serve.settings import Limits
server.raise_file_limit(Limits())
"""


def test_a_run_where_windows_modules_are_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here = Scale(tmp_path / "here")
    assert here("--limit", 1).code == 0
    folder = tmp_path / "out" / NAME
    options = ["scale", "t2i", *QUICK, "--metadata-file", str(here.prompts), "--limit", "1"]
    options += ["--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, *options, str(folder)],
        cwd=tmp_path,
        env=processes.environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    codes = [line for line in ran.stdout.splitlines() if set(line) <= set("01 ")]
    assert codes == ["0 1", "1", "0 0 0", "0 0"], ran.stdout + ran.stderr
    assert "holds an experiment with other settings: seed 1 here, 42 there" in ran.stderr
    assert "is at work here; wait for it" in ran.stderr
    assert snapshot(folder) == snapshot(here.folder)
    assert (tmp_path / "report.html").exists()
    assert list(tmp_path.glob("scale-rae-*.lock")), "two selections at once are kept apart"


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(local_files, "LOCK_WAIT", 0.1)


@pytest.mark.usefixtures("no_flock")
def test_locks_of_the_library_keep_runs_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    with store.lock_run():
        with pytest.raises(OutputError, match=f"process {os.getpid()} on .* is at work here"):
            store.lock_run()
        prompt = store.lock_prompt(3)
        assert prompt is not None
        assert store.lock_prompt(3) is None
        prompt.close()
    store.lock_run().close()  # closing gives it back


@pytest.mark.usefixtures("no_flock")
def test_a_lock_of_the_library_ends_with_its_process(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    store.lock_run().close()
    code = (
        "import filelock, sys, time; file = open(sys.argv[1], 'a')\n"
        "print(filelock.lock_descriptor(file.fileno(), blocking=False), flush=True); time.sleep(60)"
    )
    path = tmp_path / "run" / ".work" / "run.lock"
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other.stdout as said:
        assert said.readline() == "True\n"
        with pytest.raises(OutputError, match="is at work here"):
            store.lock_run()
        other.kill()
        other.wait()
    store.lock_run().close()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_group_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"this operating system has no flock.*start one process, with all devices"):
        Store(tmp_path / "run", SETTINGS).lock_run(0, 2)


@pytest.mark.usefixtures("no_flock")
def test_without_any_locks_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, blocking: bool = True) -> bool:
        raise OSError(errno.ENOSYS, "fcntl is unavailable")

    monkeypatch.setattr(filelock, "lock_descriptor", none)
    with pytest.raises(OutputError, match=r"run.lock: this file system knows no locks \(fcntl is unavailable\)"):
        Store(tmp_path / "run", SETTINGS).lock_run()
    with locks.alone_in(tmp_path):  # here locks are not needed, only better
        pass


def test_a_link_is_not_followed_where_the_system_cannot_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    with pytest.raises(OSError, match="a symbolic link, which is not followed"):
        local_files.append(tmp_path / "link")
    local_files.LocalFiles(tmp_path / "work", "w0").sync(tmp_path)


@pytest.mark.parametrize(("is_windows", "wait", "tries"), [(True, 5.0, 3), (True, 0.0, 1), (False, 5.0, 1)])
def test_renaming_waits_for_readers_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_windows: bool, wait: float, tries: int
) -> None:
    tried, really = list[Path](), Path.replace

    def read_by_others(self: Path, target: Path) -> Path:
        tried.append(self)
        if len(tried) < 3:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return really(self, target)

    monkeypatch.setattr(files, "_IS_WINDOWS", is_windows)
    monkeypatch.setattr(files, "_READER_WAIT", wait)
    monkeypatch.setattr(Path, "replace", read_by_others)
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with contextlib.nullcontext() if tries == 3 else pytest.raises(PermissionError):
        files.replace(tmp_path / "new", tmp_path / "old")
    assert len(tried) == tries
    assert (tmp_path / "old").read_text() == ("new" if tries == 3 else "old")


def test_an_assignment_is_read_in_any_encoding(tmp_path: Path) -> None:
    prompts = [[PromptRecord(1, "ein Häuschen 🏠", 0)]]
    line = encode_assignment(Store(tmp_path / "für", SETTINGS), SETTINGS, Assignment(0, "cpu", prompts, [], {}))
    assert line.isascii()
    value = json.loads(line)
    assert value["assignment"]["own"][0][0]["prompt"] == "ein Häuschen 🏠"
    assert value["folder"] == str(tmp_path / "für")


def test_threads_of_a_process_write_at_once(tmp_path: Path) -> None:
    """As the lanes of an adaptive search do: the process has one temporary file."""
    files = local_files.LocalFiles(tmp_path / "work", "w0")
    files.make_folders([])
    numbers = range(200)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: files.write(tmp_path / str(n), str(n).encode(), durable=False), numbers))
    assert [(tmp_path / str(n)).read_text() for n in numbers] == [str(n) for n in numbers]
