from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from scale_rae.errors import ConfigError, InputError, MissingExtraError, first_line, last_line, need, printable
from scale_rae.files import read_bytes
from scale_rae.jsonio import parse_json, read_json


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert read_bytes(tmp_path / "a", 3_000_000, "thing") == b"x" * 3_000_000


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such thing"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.write_bytes(b"x" * 11), "larger than 10 bytes"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "a"
    make(path)
    with pytest.raises(InputError, match=rf"a: .*{said}"):
        read_bytes(path, 10, "thing")


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ConfigError, match="git-LFS pointer"):
        read_bytes(path, 1000, "thing", ConfigError)


def test_a_pipe_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b"abc"))
    writer.start()
    assert read_bytes(path, 10, "thing", pipes=True) == b"abc"
    writer.join()


def test_a_pipe_that_nothing_writes_to_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.files._PIPE_WAIT", 0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: is a pipe that nothing writes to"):
        read_bytes(tmp_path / "pipe", 10, "thing", pipes=True)


def test_a_writer_that_takes_its_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.files._PIPE_WAIT", 0)
    reading, writing = os.pipe()
    real = os.set_blocking

    def write_then_block(file: int, blocking: bool) -> None:  # only after the wait is over
        os.write(writing, b"abc")
        os.close(writing)
        real(file, blocking)

    monkeypatch.setattr(os, "set_blocking", write_then_block)
    assert read_bytes(Path(f"/dev/fd/{reading}"), 10, "thing", pipes=True) == b"abc"
    os.close(reading)


def test_a_device_is_no_pipe() -> None:
    with pytest.raises(InputError, match="/dev/zero: is not a regular file"):
        read_bytes(Path("/dev/zero"), 10, "thing", pipes=True)


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\0b", "x" * 300, "~nosuchuser/x"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        read_bytes(tmp_path / name, 10, "thing")


def test_json_with_a_byte_order_mark_is_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert parse_json('\ufeff{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "1" * 500, "1" * 5000, "{", "\ud800"])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_first_and_last_line() -> None:
    assert first_line(ValueError("\n a \nb\n")) == "a"
    assert last_line(ValueError("\n a \nb\n")) == "b"
    assert first_line(ValueError()) == last_line(ValueError("\n")) == "ValueError"


def test_nothing_that_a_terminal_acts_on_is_printed() -> None:
    assert printable("a\x1b]0;t\x07b\x9bc\u202ed") == "a\\x1b]0;t\\x07b\\x9bc\\u202ed"
    assert printable("a\n\tb\r") == "a\\n\\tb\\r"
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r"
    assert printable("é猫🔴") == "é猫🔴"


def test_a_missing_extra_is_named() -> None:
    need("shapes", "this", "json")
    with pytest.raises(MissingExtraError, match=r'this: needs nosuch_a, nosuch_b, which are .*"scale-rae\[shapes\]"'):
        need("shapes", "this", "nosuch_a", "json", "nosuch_b")
