"""The command `scale-rae reproduce`: GenEval of a model and what test-time scaling gains, in one go."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scale_rae.cli.app import aligned, fail, say, show, show_json
from scale_rae.cli.evaluate import evaluated, say_missing
from scale_rae.cli.options import Debug, device_names
from scale_rae.cli.progress import Bars, ScalingDisplay, duration
from scale_rae.cli.scale import read_question
from scale_rae.cli.signature import expanded, given_options, one_of
from scale_rae.errors import InputError, OptionError, counted
from scale_rae.geneval.judges import JudgeChoice, identity_of, metadata_check
from scale_rae.jsonio import read_json
from scale_rae.options import (
    AUTO_REWARD,
    DEFAULT_SEED,
    MODEL_HELP,
    REWARDS,
    ModelChoice,
    SamplingOptions,
    Seed,
    check_count,
)
from scale_rae.outputs import check_folder
from scale_rae.promptfile import PromptRecord, read_prompts
from scale_rae.scaling.settings import Settings
from scale_rae.student import own_options

if TYPE_CHECKING:
    from scale_rae.geneval.evaluation import Evaluation
    from scale_rae.geneval.reproduction import Estimate, Row
    from scale_rae.scaling.launch import RunSummary

_WHERE = (
    "GenEval's prompts are prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval (553 lines); download that file "
    "and give --prompts FILE"
)
_RUN, _WORKERS = "Reproduction", "Workers"
_GB = 10**9


@expanded
def command(
    ctx: typer.Context,
    *,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="GenEval's evaluation_metadata.jsonl, or prompts in its format. The file is not downloaded for you.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for everything; made if missing.", rich_help_panel=_RUN)
    ] = Path("reproduced"),
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.", min=1, rich_help_panel=_RUN)] = None,
    rounds: Annotated[
        int, typer.Option(help="Draw 4 x N images per prompt; N is 1, 2, 4 or 8.", rich_help_panel=_RUN)
    ] = 8,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Print the estimated time and disk space, and stop.", rich_help_panel=_RUN),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print reproduction.json (with --estimate: the estimate), in one line.", rich_help_panel=_RUN
        ),
    ] = False,
    choice: ModelChoice,
    options: SamplingOptions,
    seed: Seed = DEFAULT_SEED,
    batch_size: Annotated[
        int | None, typer.Option(help="Images drawn at once. Default: 8 on the CPU, else what there is memory for.")
    ] = None,
    reward: Annotated[
        str,
        typer.Option(
            callback=one_of(AUTO_REWARD, *REWARDS, "none"), help="The reward that some metrics need, as in `scale`."
        ),
    ] = AUTO_REWARD,
    reward_path: Annotated[
        str | None, typer.Option(help="Folder with the reward's weights, instead of the hub.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="One worker each, as in cuda:0,cuda:1. Default: every GPU, else one worker.", rich_help_panel=_WORKERS
        ),
    ] = None,
    judge: JudgeChoice,
    debug: Debug = False,
) -> None:
    """Draw GenEval's prompts (4 x 8 images each, and adaptive search), evaluate, compare with the paper.

    Leaves reproduction.html, reproduction.json, two experiments and their evaluations in --output-dir. It can be stopped at any moment:
    the same command goes on.
    """
    start = time.monotonic()
    if model is not None:
        choice = dataclasses.replace(choice, model_path=model)
    names = device_names(choice.device, devices)
    judge.check()
    choice.check()
    options.check()
    check_count("--batch-size", batch_size)
    from scale_rae.geneval.outcome import write_outcome
    from scale_rae.geneval.reproduction import PAPER_MODEL, ROUNDS, both, notes_on, write_reproduction
    from scale_rae.geneval.reproduction import estimate as estimated

    if rounds not in ROUNDS:
        raise OptionError(f"--rounds {rounds}: must be one of {', '.join(map(str, ROUNDS))}")
    if choice.memory is not None:
        raise OptionError(
            "--memory: reproduce has no such option; give --quantize, --offload and --batch-size, which `inspect` suggests"
        )
    records = _prompts(prompts, judge, limit)
    question, question_name = read_question(None, None)
    settings = dataclasses.replace(
        Settings(str(prompts), "").with_model(choice),
        question=question,
        question_name=question_name,
        seed=seed,
        options=options,
        batch_size=batch_size,
        reward=None if reward == "none" else reward,
        reward_path=reward_path,
    )
    for each in both(settings, rounds):
        each.check()
    check_folder(output_dir)
    identity_of(judge)  # finds a missing detector now, not after hours of drawing
    bars = Bars()
    with bars.waiting("estimating"):
        from scale_rae.inspection import inspect

        found = inspect(choice.model_path, choice.decoder_repo, choice.revision)
        options = own_options(found.config.student, options, given_options(ctx))
        takes = estimated(found, choice, options, judge.judge, len(records), rounds)
    settings = dataclasses.replace(settings, options=options)
    if estimate:
        show_json(takes.record()) if json else show("\n".join(_estimate_lines(takes, output_dir)))
        return
    if found.problems:
        raise InputError(f"{choice.model_path}: {found.problems[0]}")
    for line in _estimate_lines(takes, output_dir):
        say(line)
    evaluations: list[Evaluation] = []
    rows: list[Row] = []
    written: list[Path] = []
    left = 0
    for which in both(settings, rounds):
        summary = _draw(which, records, output_dir, names, bars, debug)
        left += len(summary.failed) + len(summary.unfinished)
        evaluations.append(evaluated(summary.folder, judge, names, None))
        say_missing(evaluations[-1])
        write_outcome(evaluations[-1])
        best_of, *rest = evaluations
        rows, written = write_reproduction(
            output_dir, choice.model_path, settings, best_of, rest[0] if rest else None, len(records)
        )
    if json:
        show_json(read_json(written[1]))
    else:
        show("\n".join([*_table(rows), *map(str, written)]))
    for note in notes_on(evaluations[0], evaluations[1], len(records)):
        say(f"note: {note}")
    say(f"paper: {PAPER_MODEL}; done in {duration(time.monotonic() - start)}")
    if missing := sum(len(e.missing) for e in evaluations):
        fail(f"missing: {missing}, listed above; the same command tries them again")
    if left:
        fail(f"prompts that are not finished: {left}; the same command tries them again")


def _prompts(path: Path | None, judge: JudgeChoice, limit: int | None) -> list[PromptRecord]:
    if path is None:
        raise OptionError(f"--prompts: is needed. {_WHERE}")
    from scale_rae.geneval.reproduction import check_prompts

    if not path.exists():
        raise InputError(f"{path}: no such prompt file. {_WHERE}")
    records = read_prompts(path)
    check_prompts(records, path, metadata_check(judge))
    return records[:limit]


def _draw(
    settings: Settings,
    prompts: Sequence[PromptRecord],
    folder: Path,
    devices: Sequence[str | None] | None,
    bars: Bars,
    debug: bool,
) -> RunSummary:
    """Draws one experiment; what it needed on a GPU is free afterwards."""
    with bars.waiting("starting"):
        import torch

        from scale_rae.scaling.launch import run
        from scale_rae.scaling.local import Local, default_devices
    say(
        f"drawing: {'adaptive search' if settings.is_adaptive else f'best of {settings.n_samples} x {settings.scaling_rounds}'}"
    )
    display = ScalingDisplay()
    try:
        summary = run(settings, prompts, folder, Local(devices or default_devices(), bars), None, display, debug)
    finally:
        bars.stop()
        display.stop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for index, error in sorted(summary.failed.items()):
        say(f"{index:05} failed: {' '.join(error.split())}")
    return summary


def _estimate_lines(takes: Estimate, folder: Path) -> list[str]:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    size = takes.results + takes.download
    lines = [
        f"{counted(takes.prompts, 'prompt')}: {counted(takes.images, 'image', ',')} of best-of-n, about {takes.adaptive_images:,} of adaptive search",
        f"estimated: drawing {duration(takes.drawing)}, evaluating {duration(takes.evaluating)}; "
        f"{takes.results / _GB:.2f} GB of results, {takes.download / _GB:.1f} GB of models to download; {free / _GB:.1f} GB are free",
    ]
    if size > free:
        lines.append(f"warning: {size / _GB:.1f} GB may not fit; files already written are kept if the disk is full")
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    head = ("images", "of each prompt", "chosen by", "overall, %", "95 %", "paper", "any right, %")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        found = row.summary
        if found is None:
            lines.append((row.name, row.pictures, row.metric, "–", row.why_none, "", ""))
            continue
        low, high = found.overall_interval
        lines.append(
            (
                row.name,
                row.pictures,
                row.metric or "–",
                f"{100 * found.overall:.1f}",
                f"[{100 * low:.1f}, {100 * high:.1f}]",
                "" if row.paper is None else f"{row.paper:.1f}",
                f"{100 * found.prompts.value:.1f}",
            )
        )
    return aligned(lines)
