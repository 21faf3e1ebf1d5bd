"""The command `scale-rae score`: add a reward's scores to an experiment that was drawn without a reward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.app import say, show, show_json
from scale_rae.cli.progress import ScalingDisplay
from scale_rae.cli.select import Debug
from scale_rae.cli.signature import one_of
from scale_rae.errors import OptionError, counted
from scale_rae.options import DTYPES, REWARDS, check_device_name


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The experiment: the folder that holds 00000, 00001, ….")
    ],
    reward: Annotated[str, typer.Option(callback=one_of(*REWARDS), metavar="NAME", help=f"{', '.join(REWARDS)}.")],
    reward_path: Annotated[
        str | None, typer.Option(help="Folder with the reward's weights, instead of the hub.")
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="The model whose encoder siglip is. Default: the model that drew the images.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps. Default: the best there is.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(callback=one_of(*DTYPES), help=f"{', '.join(DTYPES)}. Default: as the images were drawn."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images scored at once. Default: as they were drawn, on a CPU one. Other numbers may round otherwise."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result, in one line, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Add a reward's scores to an experiment that was drawn with --reward none.

    The records are then as if it had been drawn with that reward: `select --metric image_reward` ranks by it, and `scale t2i`
    goes on with it. It can be stopped at any moment, and goes on when started again.
    """
    check_device_name(device)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: must be at least 1")
    from scale_rae.scaling.scoring import ScoreOptions, score_experiment

    options = ScoreOptions(reward, reward_path, model_path, revision, device, dtype, batch_size)
    display = ScalingDisplay()
    try:
        summary = score_experiment(folder, options, display)
    finally:
        display.stop()
    for name, reason in summary.incomplete.items():
        say(f"skipped {name}: {reason}")
    if json:
        show_json({**dataclasses.asdict(summary), "folder": str(summary.folder), "seconds": round(summary.seconds, 3)})
        return
    show(str(summary.folder))
    prompts, have = counted(summary.prompts, "prompt"), "has" if summary.prompts == 1 else "have"
    say(
        f"{prompts} {have} the scores of {reward}; {counted(summary.scored, 'image')} scored in {summary.seconds:.0f} s"
    )
