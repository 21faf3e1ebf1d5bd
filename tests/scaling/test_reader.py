from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scale_rae.errors import InputError
from scale_rae.ranking import rank
from scale_rae.scaling.reader import Experiment, Prompt, read_experiment
from scale_rae.scaling.scoring import ScoreOptions, score_experiment


def prompt(images: int, **metadata: Any) -> Prompt:
    return Prompt(Path("exp/00007"), {"prompt": "p", **metadata}, [Path(f"{i:05}.png") for i in range(images)])


def test_how_many_to_keep() -> None:
    p = prompt(6, top_ir_indices=[3, 1])
    assert Experiment(Path("exp"), 4, [p]).keep_of(p) == 4
    assert Experiment(Path("exp"), 4, [p]).keep_of(p, 5) == 5
    assert Experiment(Path("exp"), None, [p]).keep_of(p) == 2
    assert Experiment(Path("exp"), None, [p]).keep_of(prompt(6, n_samples=3)) == 3
    for keep in range(1, 13):
        assert Experiment(Path("exp"), None, [p]).keep_of(p, keep) == min(keep, 6)
    with pytest.raises(InputError, match="--keep N"):
        Experiment(Path("exp"), None, [p]).keep_of(prompt(6))
    with pytest.raises(InputError, match="n_samples is 'four'"):
        Experiment(Path("exp"), None, [p]).keep_of(prompt(1, n_samples="four"))


def test_errors_name_the_file() -> None:
    with pytest.raises(InputError, match=r"^exp/00007/metadata\.jsonl: all_ir_scores is missing"):
        rank(prompt(2).verdicts, "image_reward")
    damaged = prompt(2, all_ir_scores=["high", 1.0])
    assert damaged.rewards_or_none() == [None, None]


def test_an_images_seed() -> None:
    assert [prompt(3, image_seeds=[5, 6]).seed(i) for i in range(3)] == [5, 6, None]
    assert prompt(1).seed(0) is None


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket", "memory://x/y"])
def test_results_in_a_store_are_to_be_copied_first(url: str) -> None:
    for read in (read_experiment, lambda folder: score_experiment(folder, ScoreOptions("siglip"))):
        with pytest.raises(InputError, match=f"^{url}: is not a folder; copy the results"):
            read(Path(url))
