"""Records: the fields of metadata.jsonl that scripts for the official program read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from scale_rae.options import SamplingOptions
from scale_rae.prompt import chat_text
from scale_rae.promptfile import PromptRecord
from scale_rae.ranking import rank
from scale_rae.scaling.experiment import experiment_record, prompt_record, setting_differences
from scale_rae.scaling.reader import Experiment, Prompt
from scale_rae.scaling.settings import Settings

RESPONSE = {
    "answer": "yes",
    "yes_logit": 1.0,
    "yes_conf_score": 2.0,
    "prompt_conf_score": 5.0,
    "no_logit": 0.0,
    "no_conf_score": 0.0,
    "score": 2.0,
}
LATER = ("model_path", "guidance_level", "max_new_tokens", "n_samples_generated", "input_prompt", "top_ir_scores")


def made(rewards: list[float] | None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    settings = Settings(
        "p.jsonl", "nyu-visionx/model", n_samples=2, scaling_rounds=2, options=SamplingOptions(guidance=1.5)
    )
    prompt = PromptRecord(1, "a cat", 3, extra or {})
    return prompt_record(settings, prompt, "Sure.", [1, 2, 3, 4], [RESPONSE] * 4, rewards)


def test_the_official_fields_and_their_types() -> None:
    record = made([0.5, 2.0, -1.0, 1.0])
    assert {name: record[name] for name in LATER} == {
        "model_path": "nyu-visionx/model",
        "guidance_level": 1.5,
        "max_new_tokens": 512,
        "n_samples_generated": 4,
        "input_prompt": chat_text("Can you generate a cat"),
        "top_ir_scores": [2.0, 1.0],
    }
    assert record["top_ir_indices"] == [1, 3]
    # As the official verify_results.py reads a record.
    assert [(int(i), r["score"], r["yes_logit"], r["no_conf_score"]) for i, r in record["text_responses"].items()] == [
        (i, 2.0, 1.0, 0.0) for i in range(4)
    ]
    assert made(None)["top_ir_scores"] is None


def test_a_prompt_files_own_fields_are_not_lost() -> None:
    record = made(None, {"model_path": "mine", "tag": "colors"})
    assert (record["model_path"], record["tag"]) == ("nyu-visionx/model", "colors")
    assert record["prompt_fields"] == {"model_path": "mine"}


def test_a_record_is_the_same_wherever_the_model_lies_today() -> None:
    """A folder may move, and workers on a cluster are given its full path; neither damages what is finished."""
    begun = Settings("p.jsonl", "models/shapes", reward=None)
    today = Settings("p.jsonl", "/data/shapes", reward=None).resumed({"settings": {"model_path": "models/shapes"}})
    on_a_cluster = dataclasses.replace(begun, model_path="/here/models/shapes")
    records = [
        prompt_record(settings, PromptRecord(1, "a cat", 0), "Sure.", [1], [RESPONSE], None)
        for settings in (begun, today, on_a_cluster)
    ]
    assert records[0] == records[1] == records[2]
    assert today.model_path == "/data/shapes"  # which is loaded
    assert setting_differences(experiment_record(begun, []), experiment_record(today, [])) == []


def test_records_without_these_fields_are_ranked_as_before() -> None:
    new = made([0.5, 2.0, -1.0, 1.0])
    old = {name: value for name, value in new.items() if name not in LATER}
    images = [Path(f"{i:05}.png") for i in range(4)]
    orders = [rank(Prompt(Path("e/00003"), record, images).verdicts, "combined").order for record in (new, old)]
    assert orders[0] == orders[1] == [1, 3, 0, 2]
    assert Experiment(Path("e"), None, []).keep_of(Prompt(Path("e/00003"), old, images)) == 2


def test_offload_is_recorded_where_it_is_set() -> None:
    """Experiments without it keep their bytes; a change is noticed either way."""
    plain = experiment_record(Settings("prompts.jsonl", "shapes"), [])
    streamed = experiment_record(Settings("prompts.jsonl", "shapes", offload="stream"), [])
    assert "offload" not in plain["settings"]
    assert streamed["settings"]["offload"] == "stream"
    assert setting_differences(plain, plain) == setting_differences(streamed, streamed) == []
    assert setting_differences(plain, streamed) == ['offload "stream" here, "none" there']
    assert setting_differences(streamed, plain) == ['offload "none" here, "stream" there']
