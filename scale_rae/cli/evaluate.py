"""The commands `scale-rae evaluate geneval` and `scale-rae evaluate convert-detector`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scale_rae.cli.app import aligned, fail, say, show, show_json
from scale_rae.cli.options import Debug, device_names
from scale_rae.cli.progress import CountingDisplay
from scale_rae.cli.signature import expanded
from scale_rae.errors import counted
from scale_rae.geneval.judges import NOT_COMPARABLE, JudgeChoice
from scale_rae.geneval.results import THUMBNAIL
from scale_rae.options import check_count

if TYPE_CHECKING:
    from scale_rae.geneval.evaluation import Evaluation
    from scale_rae.geneval.policies import Policy
    from scale_rae.geneval.results import Result
    from scale_rae.geneval.summary import Comparison, Summary

_OUTPUT, _WORKERS = "Output", "Workers"


@expanded
def geneval(
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Numbered folders, each with metadata.jsonl (GenEval's tag, include, …) and samples/0000.png, …",
        ),
    ],
    choice: JudgeChoice,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Default: DIR_geneval/results.jsonl; summary, page and journal lie beside it.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Another folder, which is evaluated too, or another results.jsonl: show the differences.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            help="For an experiment: images that metrics keep per prompt. Default: its n_samples.",
            min=1,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Write the page with every wrong image.", rich_help_panel=_OUTPUT)
    ] = True,
    thumbnail: Annotated[
        int,
        typer.Option(
            min=16, max=1024, help="Longest side of an image on the page, in pixels.", rich_help_panel=_OUTPUT
        ),
    ] = THUMBNAIL,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the summary, one line of JSON, and nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or mps. Default: every GPU.", rich_help_panel=_WORKERS)
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="One worker each, as in cuda:0,cuda:1 or cpu,cpu.", rich_help_panel=_WORKERS),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images judged at once. Default: 2 with GenEval's detector on a CPU, else 32.",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Score a folder of images by GenEval's rules: results.jsonl, a summary, a page of wrong images.

    DIR may be an experiment of `scale`, a selection of `select`, or another model's images. The command can be stopped at any moment;
    the same command continues. Exits 1 if an image or prompt could not be evaluated.
    """
    choice.check()
    check_count("--batch-size", batch_size)
    places = device_names(device, devices)
    from scale_rae.geneval.evaluation import open_folder
    from scale_rae.geneval.results import read_results

    other = None
    if compare is not None and compare.is_dir():
        open_folder(compare, choice)  # what is wrong with it is said before anything is judged
    elif compare is not None:
        other = read_results(compare)
    found = evaluated(folder, choice, places, batch_size, out)
    if compare is not None and other is None:
        there = evaluated(compare, choice, places, batch_size)
        say_missing(there)
        other = there.results
    problems = _report(found, other, keep, page, thumbnail, json)
    if problems:
        fail("\nerror: ".join(problems))


def evaluated(
    folder: Path,
    choice: JudgeChoice,
    devices: Sequence[str | None] | None,
    batch_size: int | None,
    out: Path | None = None,
) -> Evaluation:
    """The evaluation of a folder, with its progress shown. `devices` None: every GPU, else one worker.

    Raises:
        ScaleRAEError: as `geneval.evaluation.evaluate`.
    """
    from scale_rae.geneval.evaluation import evaluate, open_folder
    from scale_rae.geneval.judges import identity_of

    read = open_folder(folder, choice)  # what is wrong with it is said before torch is imported
    identity = identity_of(choice)
    from scale_rae.geneval.workers import batch_size_on, judging_on, usable_devices

    places = usable_devices(choice, devices)
    size = batch_size or batch_size_on(choice, places)
    display = CountingDisplay("images")
    try:
        return evaluate(read, choice, identity, judging_on(choice, places), size, out, display)
    finally:
        display.stop()


def say_missing(evaluation: Evaluation) -> None:
    """Prints a line on stderr for everything that could not be evaluated."""
    for item in evaluation.missing:
        say(f"not evaluated: {item}")


def _report(
    found: Evaluation, other: list[Result] | None, keep: int | None, page: bool, thumbnail: int, as_json: bool
) -> list[str]:
    """Prints and writes what came out; returns what is wrong with it, a line each."""
    from scale_rae.geneval.outcome import write_outcome

    say_missing(found)
    if found.judge.get("comparable") is False:
        say(f"note: {NOT_COMPARABLE}")
    outcome = write_outcome(found, other, keep, thumbnail if page else None)
    comparison = outcome.comparison
    if as_json:
        show_json(outcome.record)
    else:
        show("\n".join(_text(outcome.summary, outcome.policies, comparison)))
        for path in (found.out, *outcome.files):
            show(str(path))
        say(f"{counted(found.new, 'image')} judged in {found.seconds:.0f} s")
    problems = []
    if comparison is not None and not comparison.prompts:
        problems.append(
            f"--compare: none of the other's prompts ({comparison.only_there}) is among these ({comparison.only_here}); prompts are "
            "paired by tag, include, exclude and prompt"
        )
    if found.missing:
        images = f" (images: {found.missing_images})" if found.missing_images else ""
        problems.append(
            f"{counted(len(found.missing), 'thing')} could not be evaluated, listed above{images}; the scores are those of the rest"
        )
    return problems


def _text(summary: Summary, chosen: Sequence[Policy], comparison: Comparison | None) -> list[str]:
    lines = [
        f"images:   {summary.images.total}, right: {summary.images}",
        f"prompts:  {summary.prompts.total}, with any right image: {summary.prompts}",
    ]
    width = max(map(len, (*summary.tags, "overall")))
    lines += [f"{tag:{width}}  {share}" for tag, share in summary.tags.items()]
    low, high = summary.overall_interval
    lines.append(f"{'overall':{width}}  {summary.overall:.5f} [{low:.3f}, {high:.3f}], the mean of the kinds")
    if chosen:
        rows: list[tuple[str, ...]] = [("chosen by", "images of each prompt", "overall", "95 %", "images", "prompts")]
        for policy in chosen:
            s = policy.summary
            low, high = s.overall_interval
            interval = f"[{low:.3f}, {high:.3f}]"
            rows.append(
                (
                    policy.name,
                    policy.pictures,
                    f"{s.overall:.5f}",
                    interval,
                    f"{s.images.value:.3f}",
                    f"{s.prompts.value:.3f}",
                )
            )
        lines += ["", *aligned(rows)]
    if comparison is not None and comparison.prompts:
        lines += ["", *_comparison_lines(comparison)]
    return lines


def _comparison_lines(comparison: Comparison) -> list[str]:
    only = [
        f"{count} only {where}"
        for count, where in ((comparison.only_here, "here"), (comparison.only_there, "in the other"))
        if count
    ]
    lines = [
        f"compared on {counted(comparison.prompts, 'prompt')} that both have{f' ({chr(44).join(only)})' if only else ''}:"
    ]
    rows: list[tuple[str, ...]] = [("", "here", "other", "difference", "95 %")]
    for name, row in comparison.rows.items():
        low, high = row.interval
        label = name.replace("prompts_with_any", "prompts with any right")
        rows.append(
            (label, f"{row.here:.3f}", f"{row.there:.3f}", f"{row.difference:+.3f}", f"[{low:+.3f}, {high:+.3f}]")
        )
    return lines + aligned(rows)


def convert_detector(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published checkpoint, mask2former_swin-s-….pth.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Convert GenEval's published detector to transformers' names and safetensors; it then loads faster."""
    from scale_rae.geneval.mask2former import convert

    convert(file, out)
    show(str(out))


commands: dict[str, Any] = {"geneval": geneval, "convert-detector": convert_detector}
