"""What an evaluation leaves beside results.jsonl: a summary as JSON, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_rae.geneval.evaluation import Evaluation
from scale_rae.geneval.page import render
from scale_rae.geneval.policies import Policy
from scale_rae.geneval.results import beside
from scale_rae.geneval.summary import Comparison, Summary
from scale_rae.jsonio import dump_json
from scale_rae.scaling.replacing import write_file


def outcome_record(
    evaluation: Evaluation,
    summary: Summary,
    policies: Sequence[Policy],
    unusable: Mapping[str, str],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """The summary as JSON values: no time, no device and no path of this machine is in it."""
    inside = f"{evaluation.folder.folder}/"
    record: dict[str, Any] = {
        "evaluated": evaluation.folder.folder.name,
        "judge": evaluation.judge,
        **summary.record(),
        "missing_images": evaluation.missing_images,
        "missing": [item.record() for item in evaluation.missing],
    }
    if policies:
        record["policies"] = [policy.record() for policy in policies]
        record["unusable_metrics"] = {name: why.replace(inside, "") for name, why in unusable.items()}
    if comparison is not None:
        record["comparison"] = comparison.record()
    return record


def write_outcome(
    evaluation: Evaluation,
    record: Mapping[str, Any],
    summary: Summary,
    policies: Sequence[Policy],
    thumbnail: int | None,
) -> list[Path]:
    """The paths of the summary and the page, once they are written; no page where `thumbnail` (its pictures' side) is None.

    Raises:
        OutputError: when one cannot be written.
    """
    folder = evaluation.folder.folder
    written = [beside(evaluation.out, "summary.json")]
    write_file(written[0], (dump_json(record, indent=1, ascii_only=True) + "\n").encode(), folder, "--out")
    if thumbnail is not None:
        page = render(evaluation, summary, policies, thumbnail)
        written.append(beside(evaluation.out, "html"))
        write_file(written[1], page.encode("utf-8", "replace"), folder, "--out")
    return written
