"""The command `scale-rae report`: a web page of an experiment's images and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.app import say, show
from scale_rae.cli.select import Debug, Keep, RewardWeight, check_metric
from scale_rae.ranking import METRICS_HELP, REWARD_WEIGHT

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The experiment: the folder that holds 00000, 00001, ….")]
Metric = Annotated[
    str | None,
    typer.Option(callback=check_metric, help=f"{METRICS_HELP}. Default: the first that the experiment has fields for."),
]


def command(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: DIR_report.html.")] = None,
    metric: Metric = None,
    keep: Keep = None,
    reward_weight: RewardWeight = REWARD_WEIGHT,
    thumbnail: Annotated[int, typer.Option(min=16, max=2048, help="Longest side of an image, in pixels.")] = 224,
    debug: Debug = False,
) -> None:
    """Make one web page of an experiment, with its images in it: ranked, with scores, filters and plots.

    The page opens from disk, needs no network, and prints.
    """
    from scale_rae.scaling.report import write_report

    path, experiment = write_report(folder, output, metric, keep, reward_weight, thumbnail)
    for p in experiment.incomplete:
        say(f"incomplete {p.folder.name}: {p.reason}")
    show(str(path))
