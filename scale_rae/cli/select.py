"""scale-rae select: keep the best images of each prompt of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scale_rae.errors import InputError


def check_metric(value: str | None) -> str | None:
    """The metric an option names, in its full name."""
    from scale_rae.scaling.select import metric_named

    try:
        return metric_named(value) if value is not None else None
    except InputError as e:
        raise typer.BadParameter(str(e)) from e


Keep = Annotated[
    int | None, typer.Option(min=1, help="Images to keep of each prompt. Default: the experiment's n_samples.")
]
RewardWeight = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="combined: weight of the reward; the confidence has the rest.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
METRICS_HELP = (
    "combined, answer_conf, answer_logits, image_reward, prompt_loss (or loss), prompt_conf, image_conf, response_conf"
)


def command(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", hidden=True)] = None,
    sample_dir: Annotated[
        Path | None, typer.Option(help="The experiment: the folder that holds 00000, 00001, …; required.")
    ] = None,
    metric: Annotated[str, typer.Option(callback=check_metric, help=METRICS_HELP + ".")] = "combined",
    keep: Keep = None,
    reward_weight: RewardWeight = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print selection.json, in one line, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Keep the best images of each prompt: DIR_METRIC_verified beside DIR, and DIR_ref, the first ones unselected.

    The two ratios at the end are the shares of images that the model itself says yes to: of those kept, and of as
    many that were drawn first. They say what selection did, not how many images are right.
    """
    if (folder is None) == (sample_dir is None):
        raise typer.BadParameter("name one folder", param_hint="--sample-dir")
    from scale_rae.jsonio import dump_json
    from scale_rae.scaling.select import select

    source = sample_dir or folder
    assert source is not None
    experiment, selections, record = select(source, metric, keep, reward_weight)
    for p in experiment.incomplete:
        typer.echo(f"skipped {p.folder.name}: {p.reason}", err=True)
    if json:
        typer.echo(dump_json(record))
        return
    for s in selections:
        answers = s.answers()
        asked = sum(a is not None for a in answers)
        said = f"yes {sum(answers[i] == 'yes' for i in s.kept)}/{len(s.kept)}, drawn {answers.count('yes')}/{asked}"
        kept = " ".join(str(i) for i in s.kept)
        text = " ".join("".join(c if c.isprintable() else " " for c in s.prompt.text).split())
        typer.echo(f"{s.prompt.name}: kept {kept} of {len(answers)}" + (f" ({said})" if asked else "") + f"  {text}")
    if bare := sum(s.ranking.without_reward for s in selections):
        whose = "the experiment has" if bare == len(selections) else f"{bare} of {len(selections)} prompts have"
        typer.echo(f"note: {whose} no reward; chosen by confidence alone")
    if partly := sum(None in s.ranking.scores for s in selections):
        typer.echo(
            f"note: in {_count(partly, 'prompt')} only some images have what {record['metric']} needs; the rest come last"
        )
    if record["keep"] is not None and (few := sum(len(s.kept) < record["keep"] for s in selections)):
        typer.echo(f"note: {_count(few, 'prompt')} with fewer than {record['keep']} images kept whole")
    if experiment.incomplete:
        typer.echo(f"skipped {_count(len(experiment.incomplete), 'incomplete prompt')}, listed above")
    if experiment.not_begun:
        typer.echo(f"note: {_count(experiment.not_begun, 'prompt')} of the experiment not begun")
    ratios = record["yes_ratios"]
    typer.echo(f"yes among the kept:       {_share(ratios['kept'])}  {record['verified']}")
    typer.echo(f"yes among the unselected: {_share(ratios['ref'])}  {record['ref']}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _share(ratio: dict[str, Any]) -> str:
    if ratio["share"] is None:
        return "not asked"
    return f"{ratio['share']:.3f} ({ratio['yes']}/{ratio['asked']})"
