"""Keeps the best images: writes `<dir>_<metric>_verified` and `<dir>_ref` beside an experiment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, OutputError
from scale_rae.jsonio import json_bytes
from scale_rae.ranking import REWARD_WEIGHT, TABLE, Ranking, formula, metric_as_given, metric_named, rank
from scale_rae.scaling.reader import Experiment, Prompt, read_experiment, read_object
from scale_rae.scaling.replacing import replaced

_TOOL = "scale-rae select"
_SELECTION = "selection.json"


@dataclass(frozen=True)
class Selection:
    """What was kept of one prompt; `kept` and `ref` number the images as they were drawn."""

    prompt: Prompt
    ranking: Ranking
    kept: list[int]
    ref: list[int]  # the first images, as many as are kept

    def answers(self) -> list[str | None]:
        """The model's answer about each image, in the order they were drawn."""
        return [self.prompt.answer(i) for i in range(len(self.prompt.images))]

    def record(self) -> dict[str, Any]:
        """Its entry in selection.json."""
        return {
            "folder": self.prompt.name,
            "prompt": self.prompt.text,
            "images": len(self.prompt.images),
            "kept": self.kept,
            "ref": self.ref,
            "order": self.ranking.order,
            "scores": self.ranking.scores,
            "answers": self.answers(),
        }


def choose(experiment: Experiment, metric: str, keep: int | None, reward_weight: float) -> list[Selection]:
    """The best images of every complete prompt.

    Raises:
        InputError: when there is no complete prompt, or a prompt lacks what the metric needs.
    """
    if not experiment.prompts:
        first = experiment.incomplete[0]
        raise InputError(
            f"{experiment.folder}: no prompt is complete; {first.folder.name} {first.reason}"
            + (f", and {len(experiment.incomplete) - 1} more" if len(experiment.incomplete) > 1 else "")
        )
    selections = []
    for prompt in experiment.prompts:
        n = experiment.keep_of(prompt, keep)
        ranking = rank(prompt.verdicts, metric, reward_weight, at_least=n)
        selections.append(Selection(prompt, ranking, ranking.order[:n], list(range(n))))
    return selections


def formula_of(selections: Sequence[Selection], metric: str, reward_weight: float) -> str:
    """What a metric ordered the images by: `ranking.formula`.

    Where only some prompts have rewards, both of its forms.
    """
    without = [selection.ranking.without_reward for selection in selections]
    if all(without) or not any(without):
        return formula(metric, reward_weight, with_reward=not all(without))
    bare = formula(metric, reward_weight, with_reward=False)
    return f"{formula(metric, reward_weight)} (prompts without rewards: {bare})"


def yes_share(selections: Sequence[Selection], images: Callable[[Selection], Sequence[int]]) -> tuple[int, int]:
    """How many of the images the model says yes to, and how many it was asked about."""
    answers = [selection.prompt.answer(i) for selection in selections for i in images(selection)]
    return answers.count("yes"), len(answers) - answers.count(None)


def select(
    folder: Path, metric: str = "combined", keep: int | None = None, reward_weight: float = REWARD_WEIGHT
) -> tuple[Experiment, list[Selection], dict[str, Any]]:
    """(experiment, what was kept of each prompt, selection.json), once the files are written.

    The best images go to `<folder>_<metric>_verified`, the first images (as many) to `<folder>_ref`. The folder is named by
    the metric as it was given: `loss` and `prompt_loss` rank alike and have folders of their own.

    Both folders hold prompt folders as the experiment does. Images are renumbered, best first, and so is metadata.jsonl,
    which gets "original_indices"; selection.json records how the images were chosen. Folders of an earlier selection are
    replaced whole. The experiment's own folder is only read.

    "yes_ratios" in selection.json are the shares of images that the model itself says yes to: of the kept images, of the
    reference, and of all.

    Raises:
        InputError: when the folder is no experiment or lacks what the metric needs.
        OutputError: when a result cannot be written, or would replace what this tool did not write.
    """
    named, metric = metric_as_given(metric), metric_named(metric)
    experiment = read_experiment(folder)
    selections = choose(experiment, metric, keep, reward_weight)
    source = experiment.folder
    verified, ref = source.with_name(f"{source.name}_{named}_verified"), source.with_name(f"{source.name}_ref")
    record: dict[str, Any] = {
        "tool": _TOOL,
        "source": str(source),
        "metric": metric,
        "reward_weight": reward_weight if TABLE[metric].mix else None,
        "formula": formula_of(selections, metric, reward_weight),
        "keep": keep if keep is not None else experiment.n_samples,
        "yes_ratios": {
            "kept": _ratio(yes_share(selections, lambda s: s.kept)),
            "ref": _ratio(yes_share(selections, lambda s: s.ref)),
            "all": _ratio(yes_share(selections, lambda s: s.ranking.order)),
        },
        "verified": str(verified),
        "ref": str(ref),
        "prompts": [selection.record() for selection in selections],
        "incomplete": [{"folder": p.folder.name, "reason": p.reason} for p in experiment.incomplete],
        "not_begun": experiment.not_begun,
    }
    try:
        with replaced([verified, ref], _check_ours) as (new_verified, new_ref):
            _build(new_verified, selections, lambda s: s.kept, record)
            _build(new_ref, selections, lambda s: s.ref, record)
    except OSError as e:
        raise OutputError(
            f"{source.parent}: the selection cannot be written there ({e.strerror or e}); what was there before still is"
        ) from e
    return experiment, selections, record


def _ratio(count: tuple[int, int]) -> dict[str, Any]:
    yes, asked = count
    return {"yes": yes, "asked": asked, "share": yes / asked if asked else None}


def renumbered(metadata: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """The metadata of a folder that holds only `images`, in that order.

    Fields that are not per image stay as they are.
    """
    result = {name: value for name, value in metadata.items() if name != "original_indices"}
    earlier = metadata.get("original_indices")  # the metadata is a selection's
    for name in ("image_seeds", "all_ir_scores"):
        values = metadata.get(name)
        if isinstance(values, list) and all(i < len(values) for i in images):
            result[name] = [values[i] for i in images]
    new = {old: i for i, old in enumerate(images)}
    best, best_scores = metadata.get("top_ir_indices"), metadata.get("top_ir_scores")
    if isinstance(best, list):
        left = [(place, i) for place, i in enumerate(best) if i in new]
        result["top_ir_indices"] = [new[i] for _, i in left]
        if isinstance(best_scores, list) and len(best_scores) == len(best):
            result["top_ir_scores"] = [best_scores[place] for place, _ in left]
    responses = metadata.get("text_responses")
    if isinstance(responses, dict):
        result["text_responses"] = {str(new[i]): responses[str(i)] for i in images if str(i) in responses}
    if isinstance(metadata.get("filled_up"), list):  # an adaptive search's
        result["filled_up"] = [new[i] for i in metadata["filled_up"] if i in new]
        result["candidates"] = [c | {"image": new.get(c["image"])} for c in metadata["candidates"]]
    known = isinstance(earlier, list) and all(i < len(earlier) for i in images)
    result["original_indices"] = [earlier[i] for i in images] if known and earlier else list(images)
    return result


def _check_ours(target: Path) -> None:
    """Raises OutputError when the folder holds anything that this tool did not write."""
    if not os.path.lexists(target):
        return
    advice = "move it away, or rename the experiment's folder"
    try:
        if target.is_symlink():
            raise ValueError
        record = read_object(target / _SELECTION, _SELECTION, most=1 << 30)
        holds = record["holds"]
        if record.get("tool") != _TOOL:
            raise ValueError
        names = {p.name for p in target.iterdir()} - {_SELECTION}
        strange = [target / n for n in names - holds.keys()]
        for name in names & holds.keys():
            expected = {f"{i:05}.png" for i in range(holds[name])}
            strange += [p for p in (target / name).iterdir() if p.name not in ("samples", "metadata.jsonl")]
            strange += [p for p in (target / name / "samples").iterdir() if p.name not in expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise OutputError(f"{target}: is there and was not written by scale-rae select; {advice}") from e
    if strange:
        raise OutputError(
            f"{min(strange)}: was not written by scale-rae select, which would replace its folder; {advice}"
        )


def _build(
    folder: Path,
    selections: Sequence[Selection],
    images: Callable[[Selection], list[int]],
    record: Mapping[str, Any],
) -> None:
    """Fills a new folder with those images of each selection, and selection.json."""
    folder.mkdir()
    for selection in selections:
        prompt, chosen = selection.prompt, images(selection)
        samples = folder / prompt.name / "samples"
        samples.mkdir(parents=True)
        for i, image in enumerate(chosen):
            shutil.copyfile(prompt.images[image], samples / f"{i:05}.png")
        metadata = renumbered(prompt.metadata, chosen)
        (folder / prompt.name / "metadata.jsonl").write_bytes(json_bytes(metadata) + b"\n")
    holds = {selection.prompt.name: len(images(selection)) for selection in selections}
    (folder / _SELECTION).write_bytes(json_bytes({**record, "holds": holds}, indent=1) + b"\n")
