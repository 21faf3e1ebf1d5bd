"""Verdicts: the recorded ones of the original evaluator, and metadata and detections that are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from scale_rae.errors import InputError, OptionError
from scale_rae.geneval import CLASSES, COLORS, VerdictOptions, check_metadata, color_calls, verdict
from tests.helpers.made_checkpoints import GOLDENS

CASES = [json.loads(line) for line in (GOLDENS / "geneval" / "verdicts.jsonl").read_text().splitlines()]
CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 5)


def nothing(name: str, numbers: list[int]) -> list[str]:
    raise AssertionError(f"asks for colours of {name}")


def test_every_recorded_verdict() -> None:
    assert len(CASES) == 447
    wrong = []
    for case in CASES:
        expected, calls = case["expected"], []

        def classify(name: str, numbers: list[int], calls: list[Any] = calls, case: Any = case) -> list[str]:
            calls.append([name, numbers])
            return [case["colors"][name][number] for number in numbers]

        found = {name: boxes(*rows) for name, rows in case["detections"].items()}
        options = VerdictOptions(**case.get("options", {}))
        given = verdict(case["metadata"], found, classify, options)
        agrees = (
            given.correct == expected["correct"]
            and given.reason in [expected["reason"], *expected.get("reason_also", [])]
            and json.dumps(given.details) == json.dumps(expected["details"])  # the order of classes counts
            and calls == expected.get("classifier_calls", [])
            and [[*call] for call in color_calls(case["metadata"], found, options)] == calls
        )
        wrong += [] if agrees else [case["id"]]
    assert not wrong


def test_classes_and_colours_are_genevals() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert len(COLORS) == 10
    assert {name for case in CASES for name in case["detections"]} == set(CLASSES)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "metadata must be an object"),
        ({"include": []}, "tag is None"),
        ({"tag": "counting"}, "neither include nor exclude"),
        ({"tag": "a", "include": "cat"}, "include is 'cat'"),
        ({"tag": "a", "include": ["cat"]}, r"include\[0\] is 'cat'"),
        ({"tag": "a", "exclude": [{"class": "mouse", "count": 1}]}, r"exclude\[0\].class is 'mouse'"),
        ({"tag": "a", "include": [{"class": ["cat"], "count": 1}]}, r"include\[0\].class is \['cat'\]"),
        ({"tag": "a", "include": [{"class": "cat", "count": True}]}, r"include\[0\].count is True"),
        ({"tag": "a", "include": [{"class": "cat", "count": 0}]}, r"include\[0\].count is 0"),
        ({"tag": "a", "include": [{"class": "cat", "count": 1, "color": "grey"}]}, r"include\[0\].color is 'grey'"),
        ({"tag": "a", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "position has target 0"),
        ({"tag": "a", "include": [*CAT["include"], {"class": "dog", "count": 1, "position": "above"}]}, "position is"),
        ({"tag": "a", "include": [*CAT["include"], {"class": "dog", "count": 1, "position": ["over", 0]}]}, "'over'"),
    ],
)
def test_bad_metadata_is_named(record: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_metadata(record)


def test_colors_and_places_of_what_should_be_absent_do_not_matter() -> None:
    clause = {"class": "cat", "count": 1, "color": "grey", "position": ["over", 7]}
    given = verdict({"tag": "a", "exclude": [clause]}, {"cat": boxes([0, 0, 9, 9, 0.5])}, nothing)
    assert given.reason == "expected cat<1, found 1"


def test_bad_detections_are_named() -> None:
    with pytest.raises(InputError, match="'kitten'"):
        verdict(CAT, {"kitten": boxes()}, nothing)
    with pytest.raises(InputError, match="detections of cat are"):
        verdict(CAT, {"cat": np.zeros((1, 5))}, nothing)
    with pytest.raises(OptionError, match="max overlap"):
        VerdictOptions(max_overlap=2)


def test_other_worlds_have_their_own_names() -> None:
    record = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "teal"}]}
    found = {"ring": boxes([0, 0, 9, 9, 0.5])}
    given = verdict(record, found, lambda name, numbers: ["red"], classes=("ring",), colors=("red", "teal"))
    assert given.reason == "expected teal ring>=1, found 0 teal; and 1 red"
    with pytest.raises(InputError, match="1 detections of ring"):
        verdict(record, found, lambda name, numbers: [], classes=("ring",), colors=("red", "teal"))
