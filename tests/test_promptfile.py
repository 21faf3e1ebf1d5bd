from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_rae import promptfile
from scale_rae.errors import InputError
from scale_rae.promptfile import PromptRecord, read_prompts

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def write(tmp_path: Path, content: str | bytes, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def test_lines_are_prompts_without_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffone\r\n\r\n  two words \n\t\n# three\u2028still\n", "p.txt")
    assert read_prompts(path) == [
        PromptRecord(1, "one", 0),
        PromptRecord(3, "two words", 1),
        PromptRecord(5, "# three\u2028still", 2),
    ]


def test_records_are_prompts_with_their_index_and_what_else_they_hold(tmp_path: Path) -> None:
    path = write(
        tmp_path, '{"index": 5, "prompt": "a", "tag": {"n": 1}}\n\n{"prompt": " b "}\r\n{"prompt":"c","index":0}'
    )
    assert read_prompts(path) == [
        PromptRecord(1, "a", 5, {"tag": {"n": 1}}),
        PromptRecord(3, "b", 1),
        PromptRecord(4, "c", 0),
    ]


def test_the_guide_s_example(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"index": 0, "prompt": "a photo of a horse and a giraffe"}\n'
        '{"index": 1, "prompt": "a photo of a cake and a zebra"}\n',
    )
    assert [(r.index, r.prompt) for r in read_prompts(path)] == [
        (0, "a photo of a horse and a giraffe"),
        (1, "a photo of a cake and a zebra"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"prompt": NaN}', "not valid JSON"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be an object"),
        ('"a"', "must be an object"),
        ("{}", 'has no "prompt"'),
        ('{"prompt": null}', 'has no "prompt"'),
        ('{"prompt": 3}', '"prompt" is not text'),
        ('{"prompt": " "}', "empty"),
        ('{"prompt": "<image-placeholder>"}', "empty"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"prompt": "a", "index": -1}', '"index" is -1'),
        ('{"prompt": "a", "index": "1"}', '"index" is "1"'),
        ('{"prompt": "a", "index": true}', '"index" is true'),
        ('{"prompt": "a", "index": 1.0}', '"index" is 1.0'),
        ('{"prompt": "a", "index": null}', '"index" is null'),
        ('{"prompt": "a", "index": 0}', "index 0 is that of line 1 already"),
    ],
)
def test_bad_records(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path, '{"prompt": "good"}\n' + line + '\n{"prompt": "also good"}\n')
    text = complaint(path)
    assert text.startswith("line 2: ")
    assert problem in text


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt": "a"}\n{\n\n\xff\n{"prompt": "b"}\n7\n')
    assert [part[:7] for part in complaint(path).split("; ")] == ["line 2:", "line 4:", "line 6:"]


def test_invalid_utf8(tmp_path: Path) -> None:
    assert "line 2: not valid UTF-8 (byte 4 " in complaint(write(tmp_path, b"ok\nabc\xe9\n", "p.txt"))
    assert "line 1: not valid UTF-8" in complaint(write(tmp_path, "abc".encode("utf-16"), "q.txt"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a red circle\na blue star\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("a red circle\na blue star\n".encode("utf-16-le"), "the file is UTF-16; save it as UTF-8"),
        ("a red circle\na blue star\n".encode("utf-16-be"), "the file is UTF-16; save it as UTF-8"),
        (b"a red circle\ra blue star\r", "its lines end by carriage returns alone"),
        (b'[{"prompt": "a red circle"},\n {"prompt": "a blue star"}]\n', "is one JSON array"),
        (b'\xef\xbb\xbf[\n  "a red circle",\n  "a blue star"\n]\n', "is one JSON array"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json"])
def test_files_of_other_kinds_are_named_as_that(tmp_path: Path, content: bytes, problem: str, name: str) -> None:
    assert problem in complaint(write(tmp_path, content, name))


def test_text_in_brackets_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "[a red circle]\n{a blue star}\n{}\n[a ring]", "p.txt")
    assert [r.prompt for r in read_prompts(path)] == ["[a red circle]", "{a blue star}", "{}", "[a ring]"]


def test_records_in_a_text_file(tmp_path: Path) -> None:
    """Which would be drawn as they are written, braces and all."""
    assert "line 2: is a JSON record" in complaint(write(tmp_path, 'a\n{"prompt": "a red circle"}\n', "p.txt"))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_of_many_bad_lines_the_first_ten_are_named(tmp_path: Path, name: str) -> None:
    text = complaint(write(tmp_path, b"\xff\n" * 100_000, name))
    assert "line 1: " in text
    assert "line 10: " in text
    assert "line 11: " not in text
    assert text.endswith("; and 99990 more lines")
    assert len(text) < 1000


@pytest.mark.parametrize("index", [2**63, 10**300])
def test_an_index_that_no_file_name_holds(tmp_path: Path, index: int) -> None:
    text = complaint(write(tmp_path, json.dumps({"prompt": "a", "index": index})))
    assert '"index" is ' in text
    assert len(text) < 150
    assert read_prompts(write(tmp_path, json.dumps({"prompt": "a", "index": 2**63 - 1})))[0].index == 2**63 - 1


def test_a_mark_before_any_record(tmp_path: Path) -> None:
    """As in a file that several were joined to."""
    path = write(tmp_path, '\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n')
    assert [r.prompt for r in read_prompts(path)] == ["a", "b"]


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promptfile, "MOST_BYTES", 10)
    assert (
        complaint(write(tmp_path, b"0123456789a\n")) == "larger than 10 bytes, the most that is read of a prompt file"
    )
    assert "is not a regular file" in complaint(Path("/dev/zero"))
    monkeypatch.setattr(promptfile, "MOST_TEMPLATE_BYTES", 10)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        promptfile.read_template(write(tmp_path, b"0123456789a\n"))


def test_prompts_through_a_pipe() -> None:
    """As in --prompts <(grep cat all.txt)."""
    read, written = os.pipe()
    os.write(written, b"a cat\n")
    os.close(written)
    assert [r.prompt for r in read_prompts(f"/dev/fd/{read}")] == ["a cat"]
    os.close(read)


def test_nothing_to_read(tmp_path: Path) -> None:
    assert complaint(write(tmp_path, "", "p.txt")) == "holds no prompts"
    assert complaint(write(tmp_path, " \n\n")) == "holds no prompts"
    assert complaint(tmp_path / "none.txt") == "no such prompt file"
    assert complaint(tmp_path) == "is a folder, not a prompt file"


def is_prompt(text: str) -> bool:
    return bool(text.replace("<image-placeholder>", "").strip())


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(is_prompt)


@SAME_FOLDER
@given(prompts=st.lists(TEXT, min_size=1, max_size=8))
def test_any_prompts_come_back_from_records(tmp_path: Path, prompts: list[str]) -> None:
    path = write(tmp_path, "\n".join(json.dumps({"prompt": p, "extra": p}) for p in prompts))
    assert read_prompts(path) == [PromptRecord(i + 1, p.strip(), i, {"extra": p}) for i, p in enumerate(prompts)]


@SAME_FOLDER
@given(
    prompts=st.lists(
        TEXT.filter(
            lambda t: (
                min(t.strip() or "\0") >= " "
                and "\n" not in t
                and "\r" not in t
                and is_prompt(t.encode().strip().decode())
                and t[0] != "\ufeff"
            )
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_prompts_come_back_from_lines(tmp_path: Path, prompts: list[str]) -> None:
    path = write(tmp_path, "\n".join(prompts), "p.txt")
    assert [r.prompt for r in read_prompts(path)] == [p.strip() for p in prompts]


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "index", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@SAME_FOLDER
@given(
    content=st.binary(max_size=60) | st.lists(JSON, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
def test_any_file_is_read_or_refused_by_line(tmp_path: Path, content: bytes) -> None:
    for name in ("p.txt", "p.jsonl"):
        path = write(tmp_path, content, name)
        try:
            records, refusal = read_prompts(path), ""
        except InputError as e:
            records, refusal = [], str(e)
        assert bool(records) != bool(refusal)
        assert not refusal or refusal.startswith(f"{path}: ")
        assert len({r.index for r in records}) == len(records)
        assert all(r.prompt.strip() and 1 <= r.line <= content.count(b"\n") + 1 for r in records)


@pytest.mark.parametrize(
    ("text", "encoding"), [("красный круг\nсиний круг\n", "utf-16-be"), ("a cat\na dog\n", "utf-32-le")]
)
def test_other_encodings_that_are_valid_utf8_are_not_drawn(tmp_path: Path, text: str, encoding: str) -> None:
    """The bytes of such files are valid UTF-8, with control characters in it."""
    path = tmp_path / "p.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="UTF-16"):
        read_prompts(path)


def test_a_table_is_no_list_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.CSV"
    file.write_text("index,prompt\n0,a cat\n")
    with pytest.raises(InputError, match=r"prompts\.CSV: is a table; write its prompts to a \.txt file, one a line"):
        read_prompts(file)
