"""results.jsonl, its summary, and differences between two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scale_rae.errors import InputError
from scale_rae.geneval.results import Result, read_results, reason_kinds, to_lines
from scale_rae.geneval.summary import compare, summarise


def result(prompt: str, correct: bool, tag: str = "colors", reason: str = "", number: int = 0) -> Result:
    metadata = json.dumps({"tag": tag, "include": [], "prompt": prompt})
    return Result(f"00000/samples/{number:05}.png", tag, prompt, correct, reason, metadata, "{}")


# What pandas 3.1 makes of it: DataFrame.to_json(orient="records", lines=True).
PANDAS = (
    r'{"filename":"00000\/samples\/00000.png","tag":"colors","prompt":"a \"red\" dog \/ gr\u00fcner Hund \u7dd1 \ud83d\ude00 \\ \t\u0001",'
    r'"correct":true,"reason":"","metadata":"{\"tag\": \"colors\", \"include\": [], \"prompt\": \"a \\\"red\\\" dog \/ gr\\u00fcner '
    r'Hund \\u7dd1 \\ud83d\\ude00 \\\\ \\t\\u0001\"}","details":"{}"}'
)


def test_lines_are_as_pandas_writes_them() -> None:
    made = result('a "red" dog / grüner Hund 緑 😀 \\ \t\x01', True)
    assert to_lines([made, made]).decode() == f"{PANDAS}\n" * 2


def test_reads_what_it_wrote_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    made = [result("a", True), result("b/c", False, reason="expected dog>=1, found 0")]
    path.write_bytes(to_lines(made))
    assert read_results(path) == made
    path.write_bytes(to_lines(made) + b'{"filename": "x", "tag": "colors", "prompt": "a", "correct": "yes"}\n')
    with pytest.raises(InputError, match=r"results.jsonl: line 3: .*correct is 'yes'"):
        read_results(path)
    path.write_bytes(b"\n")
    with pytest.raises(InputError, match="holds no results"):
        read_results(path)


def test_kinds_of_reasons() -> None:
    lines = {
        "expected traffic light>=2, found 1": "missing object",
        "expected dog<3, found 3": "too many",
        "expected no ring, found 1": "too many",
        "expected red dog>=1, found 0 red; and 1 blue, 1 white": "wrong colour",
        "expected red dog>=1, found 1 blue": "wrong colour",
        "expected dog left of target, found right of and above target": "wrong position",
        "expected dog left of target, found  target": "wrong position",
        "expected heart below square, found right of": "wrong position",
        "no target for dog to be above": "wrong position",
        "unclear red object at 1, 2, most like a star": "unclear object",
        "something else": "other",
    }
    for line, kind in lines.items():
        assert reason_kinds(line) == [kind], line
    assert reason_kinds("no target for a to be above\nexpected a>=1, found 0") == ["missing object", "wrong position"]
    assert reason_kinds("") == []


def test_summary_is_the_mean_of_kinds_and_counts_prompts_by_metadata() -> None:
    made = [
        *(result("a", right, "two") for right in (True, False, False, False)),
        *(result("b", right, "two") for right in (False, False, False, False)),
        *(result("c", right, "one") for right in (True, True)),
    ]
    found = summarise(made)
    assert (found.images.right, found.images.total) == (3, 10)
    assert (found.prompts.right, found.prompts.total) == (2, 3)
    assert list(found.tags) == ["two", "one"]
    assert found.overall == (1 / 8 + 1) / 2
    low, high = found.overall_interval
    assert (low, high) == (0.5, 0.625)  # both prompts of "two" are b, or both are a
    assert found.record()["tags"]["two"]["interval"] == [round(x, 6) for x in found.tags["two"].interval]


def test_differences_are_paired_by_prompt() -> None:
    """Every prompt gains one right picture of two, though prompts differ: the interval has no width."""
    before = [result(f"p{i}", i % 2 == 0 and first, number=i) for i in range(20) for first in (True, False)]
    after = [result(f"p{i}", i % 2 == 0 or first, number=i) for i in reversed(range(20)) for first in (True, False)]
    found = compare(after, [*before, result("other", True)])
    assert (found.prompts, found.only_here, found.only_there) == (20, 0, 1)
    row = found.rows["overall"]
    assert (row.here, row.there, row.difference) == (0.75, 0.25, 0.5)
    assert row.interval == pytest.approx((0.5, 0.5))
    assert row.is_clear
    assert found.rows["prompts_with_any"].difference == 0.5
    assert found.rows["prompts_with_any"].interval[0] < 0.5 < found.rows["prompts_with_any"].interval[1]
    assert compare(after, before).record() == compare(after, before).record()  # the seed is fixed
    assert compare([result("x", True)], [result("y", True)]).rows == {}
