"""What an evaluation leaves beside results.jsonl: a summary as JSON, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.geneval.evaluation import Evaluation
from scale_rae.geneval.page import render
from scale_rae.geneval.policies import Policy, policies
from scale_rae.geneval.results import THUMBNAIL, Result, beside
from scale_rae.geneval.summary import Comparison, Summary, compare, summarise
from scale_rae.jsonio import dump_json
from scale_rae.scaling.replacing import write_file


@dataclass(frozen=True)
class Outcome:
    """What came out of an evaluation; `policies` is empty for folders that are no experiments."""

    summary: Summary
    policies: list[Policy]
    comparison: Comparison | None
    record: dict[str, Any]
    files: list[Path]


def write_outcome(
    evaluation: Evaluation,
    other: Sequence[Result] | None = None,
    keep: int | None = None,
    thumbnail: int | None = THUMBNAIL,
) -> Outcome:
    """The outcome, once its summary and its page are written.

    `thumbnail` is the side of the page's pictures; None writes no page. `other` are results to compare with; metrics
    keep `keep` images per prompt, by default the experiment's n_samples.

    Raises:
        OutputError: when a file cannot be written.
    """
    summary = summarise(evaluation.results)
    chosen: list[Policy] = []
    unusable: dict[str, str] = {}
    if evaluation.folder.is_experiment:
        chosen, unusable = policies(evaluation.folder.prompts, evaluation.by_name, keep)
    comparison = compare(evaluation.results, other) if other is not None else None
    record = _record(evaluation, summary, chosen, unusable, comparison)
    folder = evaluation.folder.folder
    written = [beside(evaluation.out, "summary.json")]
    write_file(written[0], (dump_json(record, indent=1, ascii_only=True) + "\n").encode(), folder, "--out")
    if thumbnail is not None:
        page = render(evaluation, summary, chosen, thumbnail)
        written.append(beside(evaluation.out, "html"))
        write_file(written[1], page.encode("utf-8", "replace"), folder, "--out")
    return Outcome(summary, chosen, comparison, record, written)


def _record(
    evaluation: Evaluation,
    summary: Summary,
    chosen: Sequence[Policy],
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
    if chosen:
        record["policies"] = [policy.record() for policy in chosen]
        record["unusable_metrics"] = {name: why.replace(inside, "") for name, why in unusable.items()}
    if comparison is not None:
        record["comparison"] = comparison.record()
    return record
