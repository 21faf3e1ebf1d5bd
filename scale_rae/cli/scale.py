"""The command `scale-rae scale t2i`: draw many images per prompt, judge and rank them, by a launcher of scaling/."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scale_rae.cli.app import fail, say, show
from scale_rae.cli.options import Debug, device_names
from scale_rae.cli.progress import Bars, ScalingDisplay
from scale_rae.cli.signature import expanded, flag_name, given_options, one_of
from scale_rae.config import load_config, parse_config
from scale_rae.errors import InputError, OptionError, ScaleRAEError, counted
from scale_rae.listing import list_files
from scale_rae.options import (
    AUTO_REWARD,
    DEFAULT_MODEL,
    REWARDS,
    SAMPLING,
    ModelChoice,
    SamplingOptions,
    SearchOptions,
    options_of,
)
from scale_rae.outputs import check_folder
from scale_rae.promptfile import read_prompts, read_template
from scale_rae.scaling.settings import JUDGING, SCALING, Settings
from scale_rae.student import own_options

if TYPE_CHECKING:
    from scale_rae.scaling.launch import Launcher, RunSummary

_TEMPLATE = Path("assets", "qa_prompt_template.txt")
_PACKAGE = Path(__file__).parent.parent  # which has the template too, for those who run elsewhere
WORKERS = "Workers"
_DEFAULTS = Settings("", DEFAULT_MODEL)


def _batch_size(value: str) -> str:
    if value != "auto" and not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise typer.BadParameter(f"{value!r} is not auto or a whole number of at least 1")
    return value


@expanded
def command(
    ctx: typer.Context,
    *,
    mode: Annotated[str, typer.Argument(callback=one_of("t2i"), metavar="t2i", help="What is scaled: text to image.")],
    metadata_file: Annotated[
        Path,
        typer.Option(
            help='The prompts: {"prompt": …} a line (.jsonl), with "index" (else its place) and whatever else is to be '
            "carried into the results; or a prompt a line (.txt).",
            rich_help_panel=SCALING,
        ),
    ],
    output_dir: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Folder for results; an experiment in it goes on. With --launcher ray also one in a store: s3://…, gs://….",
            rich_help_panel=SCALING,
        ),
    ] = "scaling_outputs",
    post_qa_template_path: Annotated[
        Path | None,
        typer.Option(
            help="A file with the question the model is asked about each image, {prompt} in it replaced. "
            "Default: ./assets/qa_prompt_template.txt, or the package's if there is none.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None,
    post_qa_prompt: Annotated[
        str | None, typer.Option(help="The question itself, instead of a file.", rich_help_panel=JUDGING)
    ] = None,
    choice: ModelChoice,
    devices: Annotated[
        str | None,
        typer.Option(
            help="One worker each, as in cuda:0,cuda:1 or cpu,cpu. Default: every visible GPU, else one worker.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            callback=one_of("local", "ray"),
            help="local: workers on this machine, or the processes of torchrun or srun; ray: workers on a Ray cluster.",
            rich_help_panel=WORKERS,
        ),
    ] = "local",
    num_cpus_per_worker: Annotated[
        int | None,
        typer.Option(help="Ray: workers that use so many CPUs each, instead of a GPU.", rich_help_panel=WORKERS),
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(
            help="Ray: how many workers. Default: as many as the cluster has room for, at any time.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    settings: Settings = _DEFAULTS,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.", rich_help_panel=SCALING)] = None,
    reward: Annotated[
        str,
        typer.Option(
            callback=one_of(AUTO_REWARD, *REWARDS, "none"),
            help="What ranks the pictures: imagereward, siglip, pickscore, or none (the model's own confidence only). "
            "auto: siglip for a model that brings it, as the bundled one does; else imagereward.",
            rich_help_panel=JUDGING,
        ),
    ] = AUTO_REWARD,
    reward_path: Annotated[
        str | None, typer.Option(help="Folder with the reward's weights, instead of the hub.", rich_help_panel=JUDGING)
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            callback=_batch_size,
            metavar="N|auto",
            help="Images drawn at once. auto: 8 on the CPU, else what there is memory for.",
            rich_help_panel=SAMPLING,
        ),
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Draw many images of each prompt, let the model judge and a reward rank them (test-time scaling).

    Leaves <output-dir>/<model>/<rounds>_<template>_scale_<mode>/<index>/ with samples/*.png and metadata.jsonl. It can be
    stopped at any moment, and goes on when started again with the same settings.
    """
    given, on_ray = given_options(ctx), launcher == "ray"
    _check_workers(choice, devices, on_ray, num_cpus_per_worker, num_workers)
    if post_qa_prompt is not None and post_qa_template_path is not None:
        raise typer.BadParameter("give one of them", param_hint=["--post-qa-prompt", "--post-qa-template-path"])
    for number, name in (
        (limit, "--limit"),
        (num_cpus_per_worker, "--num-cpus-per-worker"),
        (num_workers, "--num-workers"),
    ):
        if number is not None and number < 1:
            raise OptionError(f"{name} {number}: must be at least 1")
    names = device_names(choice.device, devices)
    question, question_name = read_question(post_qa_prompt, post_qa_template_path)
    settings = dataclasses.replace(
        settings.with_model(choice),
        metadata_file=str(metadata_file),
        question=question,
        question_name=question_name,
        batch_size=None if batch_size == "auto" else int(batch_size),
        reward=None if reward == "none" else reward,
        reward_path=reward_path,
    )
    _check_search(settings, given)
    settings.check()
    settings = dataclasses.replace(settings, options=_own_sampling(settings, given))
    prompts = read_prompts(metadata_file)

    bars = Bars()
    with bars.waiting("starting"):
        from scale_rae.scaling.launch import run
        from scale_rae.scaling.local import Local, default_devices
        from scale_rae.scaling.object_store import is_remote, results_folder
        from scale_rae.scaling.ranks import ProcessGroup, Ranks
        from scale_rae.scaling.ray_cluster import RayCluster, check_installed
    if on_ray:
        check_installed()
    folder = results_folder(output_dir)
    if not is_remote(folder):
        check_folder(folder)
    if choice.memory is not None:
        settings = fitted(settings, choice, names or default_devices())
    group = ProcessGroup.from_environment()
    chosen: Launcher
    if on_ray:
        if group.size > 1:
            raise InputError(f"--launcher ray: to be started once, not in {group.size} processes of torchrun or srun")
        chosen = RayCluster(num_cpus_per_worker, num_workers)
    elif group.size > 1:
        chosen = Ranks(group, names or default_devices(), bars if group.index == 0 else None)
    else:
        chosen = Local(names or default_devices(), bars)
    if "{prompt}" not in question:
        begins = question if len(question) <= 80 else f"{question[:77]}..."
        say(f"note: no {{prompt}} in the question {begins!r}: the prompt is put at its end")
    display = ScalingDisplay(quiet=group.index > 0)
    try:
        summary = run(settings, prompts, folder, chosen, limit, display, debug)
    finally:
        bars.stop()
        display.stop()
    if group.index > 0:  # process 0 reports for all
        if summary.unfinished:
            fail(f"rank {group.index}: {counted(len(summary.unfinished), 'prompt')} unfinished")
        return
    show_summary(summary)


def _check_workers(
    choice: ModelChoice, devices: str | None, on_ray: bool, num_cpus_per_worker: int | None, num_workers: int | None
) -> None:
    """Raises BadParameter for flags of workers that do not go with the launcher."""
    if devices is not None and choice.device is not None:
        raise typer.BadParameter("give one of them", param_hint=["--device", "--devices"])
    for named, flag in ((choice.device, "--device"), (devices, "--devices")):
        if on_ray and named is not None:
            raise typer.BadParameter("not with --launcher ray, which gives each worker its own", param_hint=[flag])
    for number, flag in ((num_cpus_per_worker, "--num-cpus-per-worker"), (num_workers, "--num-workers")):
        if not on_ray and number is not None:
            raise typer.BadParameter("only with --launcher ray", param_hint=[flag])
    if on_ray and choice.memory is not None:
        raise typer.BadParameter(
            "not with --launcher ray, whose workers run elsewhere; give --quantize, --offload and --batch-size",
            param_hint=["--memory"],
        )


def _check_search(settings: Settings, given: set[str]) -> None:
    """Raises OptionError for flags that have no effect in the search that was chosen."""
    if settings.is_adaptive:
        alone, why = ["scaling_rounds"], "not with --search adaptive, which has no rounds; --max-candidates bounds it"
    else:
        alone, why = [option.name for option in options_of(SearchOptions)], "only with --search adaptive"
    if flags := [flag_name(name) for name in alone if name in given]:
        raise OptionError(f"{', '.join(flags)}: {why}")


def _own_sampling(settings: Settings, given: set[str]) -> SamplingOptions:
    """The sampler's options, or those of a student. Of a model on the hub, only config.json is read.

    Raises:
        OptionError: for an option that the student does not take.
    """
    try:
        files = list_files(settings.model_path, "model", revision=settings.revision)
        config = parse_config(files.read_json("config.json"), Path(files.where("config.json")))
    except ScaleRAEError:  # which workers report
        return settings.options
    return own_options(config.student, settings.options, given)


def fitted(settings: Settings, choice: ModelChoice, devices: Sequence[str | None]) -> Settings:
    """The settings with the quantisation, residency and batch size that --memory chooses, the same for all devices.

    Raises:
        DeviceError: when nothing fits the device with the least memory.
    """
    from scale_rae.machine import plan
    from scale_rae.memory import pick_device, pick_dtype
    from scale_rae.opening import find_model

    source = find_model(choice)
    config = load_config(source.config_folder)
    plans = []
    for name in devices:
        place = pick_device(name)
        plans.append(plan(choice, source, config, place, pick_dtype(choice.dtype, place)))
    least = min(plans, key=lambda found: found.limit)
    say(str(least))
    return dataclasses.replace(
        settings,
        quantize=least.way.quantize,
        offload=least.way.offload,
        batch_size=settings.batch_size or least.way.batch,
        memory=f"{least.limit >> 20}M",
    )


def show_summary(summary: RunSummary) -> None:
    """Prints the folder, how much is done, and a table of what failed; ends with an error when something is left to do."""
    show(str(summary.folder))
    done = summary.prompts - len(summary.failed) - len(summary.unfinished)
    rate = f" ({summary.drawn / summary.working:.2f} images/s once loaded)" if summary.drawn else ""
    prompts = counted(summary.prompts, "prompt")
    say(f"{done} of {prompts} done; {counted(summary.drawn, 'image')} drawn in {summary.seconds:.0f} s{rate}")
    if found := summary.search:
        mean = found["evaluations"] / found["prompts"]
        filled = (
            f"; {found['filled_up']} of {counted(found['prompts'], 'prompt')} with fewer, filled up"
            if found["filled_up"]
            else ""
        )
        say(
            f"{mean:.1f} evaluations per prompt for {found['accepted']} accepted of {counted(found['candidates'], 'candidate')}{filled}"
        )
    if summary.failed:
        width = max(len(f"{index:05}") for index in summary.failed)
        say(f"{'prompt':{width}}  error")
        for index, error in sorted(summary.failed.items()):
            say(f"{index:05}  {' '.join(error.split())}")
    if summary.failed or summary.unfinished:
        parts = [
            f"{len(which)} of {prompts} {how}"
            for which, how in ((summary.failed, "failed"), (summary.unfinished, "unfinished"))
            if which
        ]
        fail(f"{' and '.join(parts)}; the same command tries only those again")
    folder = shlex.quote(str(summary.folder))
    say(f"next: keep the best images by `scale-rae select {folder}`, look at all by `scale-rae report {folder}`")


def read_question(prompt: str | None, path: Path | None) -> tuple[str, str]:
    """The question's template and its name."""
    if prompt is not None:
        return prompt.strip(), "prompt"
    path = path or (_TEMPLATE if _TEMPLATE.exists() else _PACKAGE / _TEMPLATE)
    return read_template(path), path.stem
