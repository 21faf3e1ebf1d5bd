"""The command `scale-rae sheet`: a contact sheet of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.app import say, show
from scale_rae.cli.report import Folder
from scale_rae.cli.select import Debug, Keep, RewardWeight, check_metric
from scale_rae.errors import shorten
from scale_rae.ranking import METRICS_HELP, REWARD_WEIGHT


def command(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: DIR_sheet.png.")] = None,
    metric: Annotated[str, typer.Option(callback=check_metric, help=METRICS_HELP + ".")] = "combined",
    keep: Keep = None,
    reward_weight: RewardWeight = REWARD_WEIGHT,
    thumbnail: Annotated[int, typer.Option(min=16, max=1024, help="Longest side of an image, in pixels.")] = 128,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Columns of prompts. Default: what makes the sheet about square.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show the first prompts only.")] = None,
    debug: Debug = False,
) -> None:
    """Make a PNG with each prompt's images, best first: the kept ones framed, answer and score below each."""
    from scale_rae.scaling.sheet import write_sheet

    sheet = write_sheet(folder, output, metric, keep, reward_weight, thumbnail, columns, limit)
    for p in sheet.experiment.incomplete:
        say(f"incomplete {p.folder.name}: {p.reason}")
    if sheet.prompts < len(sheet.experiment.prompts):
        say(f"the first {sheet.prompts} of {len(sheet.experiment.prompts)} prompts")
    if sheet.missing:
        say(
            f"note: boxes stand for characters of prompts ({shorten(sheet.missing, 20)}): no known font here has all characters of "
            "such a prompt; install one that has, such as Noto Sans CJK for Chinese, Japanese and Korean"
        )
    show(str(sheet.path))
