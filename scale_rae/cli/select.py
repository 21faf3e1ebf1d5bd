"""The command `scale-rae select`: keep the best images of each prompt of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scale_rae.cli.app import say, show, show_json
from scale_rae.errors import InputError, counted
from scale_rae.ranking import METRICS_HELP, REWARD_WEIGHT, formula, metric_as_given, metric_named

if TYPE_CHECKING:
    from scale_rae.scaling.select import Selection


def check_metric(value: str | None) -> str | None:
    """The metric an option names, in its full name."""
    return _checked(metric_named, value) if value is not None else None


def _check_given(value: str) -> str:
    """The metric an option names, as it was given: the folder is named by it."""
    return _checked(metric_as_given, value)


def _checked(check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except InputError as e:
        raise typer.BadParameter(str(e)) from e


Keep = Annotated[
    int | None, typer.Option(min=1, help="Images to keep of each prompt. Default: the experiment's n_samples.")
]
RewardWeight = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Weight of the reward; the confidences share the rest. By default, combined: "
        f"{formula('combined')}; combined_v1: {formula('combined_v1')}. z standardises over a prompt's images.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def command(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", hidden=True)] = None,
    sample_dir: Annotated[
        Path | None, typer.Option(help="The experiment: the folder that holds 00000, 00001, …; required.")
    ] = None,
    metric: Annotated[str, typer.Option(callback=_check_given, help=METRICS_HELP + ".")] = "combined",
    keep: Keep = None,
    reward_weight: RewardWeight = REWARD_WEIGHT,
    json: Annotated[bool, typer.Option("--json", help="Print selection.json, in one line, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Keep the best images of each prompt: DIR_METRIC_verified beside DIR, and DIR_ref, the first ones unselected.

    After each selection comes how many of these images the model itself says yes to, asked whether they show the prompt.
    That says what selection did, not how many images are right.
    """
    if (folder is None) == (sample_dir is None):
        raise typer.BadParameter("name one folder", param_hint="--sample-dir")
    from scale_rae.scaling.select import select

    source = sample_dir or folder
    assert source is not None
    experiment, selections, record = select(source, metric, keep, reward_weight)
    for p in experiment.incomplete:
        say(f"skipped {p.folder.name}: {p.reason}")
    if json:
        show_json(record)
        return
    for s in selections:
        show(_line(s))
    if bare := sum(s.ranking.without_reward for s in selections):
        whose = "the experiment has" if bare == len(selections) else f"{bare} of {len(selections)} prompts have"
        show(f"note: {whose} no reward; chosen by confidence alone")
    if partly := sum(None in s.ranking.scores for s in selections):
        show(
            f"note: in {counted(partly, 'prompt')} only some images have what {record['metric']} needs; the rest come last"
        )
    if record["keep"] is not None and (few := sum(len(s.kept) < record["keep"] for s in selections)):
        show(f"note: {counted(few, 'prompt')} with fewer than {counted(record['keep'], 'image')}, all of them kept")
    if experiment.incomplete:
        show(f"skipped {counted(len(experiment.incomplete), 'incomplete prompt')}, listed above")
    if experiment.not_begun:
        show(f"note: {counted(experiment.not_begun, 'prompt')} of the experiment not begun")
    ratios = record["yes_ratios"]
    show(f"best images kept: {_yes(ratios['kept'])}; {record['verified']}")
    show(f"first images drawn, to compare: {_yes(ratios['ref'])}; {record['ref']}")


def _line(selection: Selection) -> str:
    """What was kept of one prompt."""
    answers, kept = selection.answers(), selection.kept
    text = " ".join("".join(c if c.isprintable() else " " for c in selection.prompt.text).split())
    numbers = ", ".join(str(i) for i in kept)
    line = (
        f"{selection.prompt.name} {text}: kept {len(kept)} of {counted(len(answers), 'image')}, best first: {numbers}"
    )
    asked = sum(a is not None for a in answers)
    if not asked:
        return line
    yes = sum(answers[i] == "yes" for i in kept)
    all_asked = f"all {asked}" if asked == len(answers) else f"the {asked} it was asked about"
    return f"{line}; the model says yes to {yes} of the kept and to {answers.count('yes')} of {all_asked}"


def _yes(ratio: dict[str, Any]) -> str:
    if ratio["share"] is None:
        return "the model was not asked about them"
    return f"the model says yes to {ratio['yes']} of {ratio['asked']} ({ratio['share']:.3f})"
