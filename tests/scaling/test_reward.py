"""Which reward ranks an experiment's pictures when none is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scale_rae.hub import BUNDLED, Source
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import default_reward
from scale_rae.scaling.experiment import experiment_record, setting_differences
from scale_rae.scaling.settings import Settings
from tests.scaling.conftest import Scale, record

ENCODER = Path("shapes", "siglip-patch16-128")


def test_the_bundled_model_brings_its_own(scale: Scale) -> None:
    """The guide's command, with nothing else to download; what is recorded is what was used."""
    result = scale("--reward", "auto", "--limit", 1)
    assert result.code == 0, result.err
    assert "reward: siglip, which the model brings (--reward chooses another)\n" in result.err
    found = record(scale.folder)
    assert found["reward"] == "siglip"
    assert len(found["all_ir_scores"]) == 4
    described = json.loads((scale.folder / "experiment.json").read_text())
    assert described["settings"]["reward"] == described["reward"]["name"] == "siglip"
    for name in ("auto", "siglip"):  # and it goes on with either
        result = scale("--reward", name, "--limit", 1)
        assert result.code == 0, result.err
        assert "0 images drawn" in result.err
    assert 'reward null here, "siglip" there' in scale("--reward", "none", "--limit", 1).err


def test_an_experiment_goes_on_with_the_reward_it_has(scale: Scale, reward: object) -> None:
    """One that was begun when the bundled model, too, was ranked by the guide's reward."""
    assert scale("--reward", "imagereward", "--limit", 1).code == 0
    result = scale("--reward", "auto", "--limit", 2)
    assert result.code == 0, result.err
    assert record(scale.folder, 7)["reward"] == "imagereward"


def model(folder: Path, encoder: Path, kind: str = "siglip") -> ScaleRAE:
    made: Any = SimpleNamespace(
        source=Source("m", folder),
        encoder_source=Source("e", encoder),
        encoder=SimpleNamespace(kind=kind, model=SimpleNamespace(config=SimpleNamespace(vision_use_head=True))),
    )
    return made


def test_only_an_encoder_of_the_models_own_counts(tmp_path: Path) -> None:
    shapes = BUNDLED["shapes"]
    assert default_reward(model(shapes, shapes / ENCODER)) == "siglip"
    # A published model's encoder has a repository of its own, whose text tower has nothing to do with the model.
    assert default_reward(model(tmp_path, shapes / ENCODER)) == "imagereward"
    assert default_reward(model(shapes, shapes / ENCODER, kind="dinov2")) == "imagereward"
    own = tmp_path / "e"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"vision_config": {}}))  # no text tower
    assert default_reward(model(tmp_path, own)) == "imagereward"


@pytest.mark.parametrize("recorded", ["siglip", None])
def test_what_is_left_open_is_no_difference(recorded: str | None) -> None:
    then = experiment_record(Settings("p", "m", reward=recorded), [])
    left_open = Settings("q", "m", reward="auto")
    assert setting_differences(then, experiment_record(left_open, [])) == []
    assert left_open.resumed(then).reward == recorded
    assert left_open.resumed(None) == left_open
