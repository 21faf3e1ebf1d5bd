"""What t2i, img and latent share: send inputs to the model, save images and manifests, print results."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import typer

from scale_rae.cli.app import fail, say, show, show_json
from scale_rae.cli.options import OutputOptions, PostQA
from scale_rae.cli.preview import show_picture
from scale_rae.cli.progress import Bars
from scale_rae.cli.signature import text_of
from scale_rae.config import load_config
from scale_rae.errors import InputError, OutputError, counted, shorten
from scale_rae.manifest import drawing_manifest, png_text
from scale_rae.opening import OpenedModel, find_model
from scale_rae.options import ModelChoice, Sampling
from scale_rae.outputs import Sample, save_run, timestamp
from scale_rae.student import own_options
from scale_rae.wording import is_refusal, what_it_can

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scale_rae.hub import Source
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.results import Generation, SearchResult


@dataclass(frozen=True)
class ModelInput:
    """One message to the model, with a latent that is shown before it if there is one.

    `index` is the prompt's index in its file; `where` is the prompt's place, for errors; `label` is part of file names,
    `recorded` part of the manifest.
    """

    prompt: str
    latent: Tensor | None = None
    index: int = 0
    where: str = ""
    label: str = ""
    recorded: dict[str, Any] = field(default_factory=dict)


class Outcome(NamedTuple):
    """The result of one input."""

    drew: bool
    text: str  # the reply
    cut_off: bool  # the reply has as many tokens as allowed
    withheld: bool  # the reply asks for an image, which was not to be drawn


def prepare(choice: ModelChoice, sampling: Sampling, bars: Bars, given: Collection[str]) -> tuple[Source, Sampling]:
    """Finds the model's files. Checks that need no torch come first; at the end torch is imported, which is slow.

    The sampling that is returned has a student's own options; `given` are the names of those that the user chose.

    Raises:
        OptionError: for values that no run can use. ScaleRAEError: for a model that is not there or cannot be used.
        DeviceError: for noise of a GPU where there is none.
    """
    sampling.check()
    if sampling.options.noise != "cpu":  # before a model is fetched
        with bars.waiting("starting"):
            from scale_rae.noise import check_noise
        check_noise(sampling.options.noise)
    source = find_model(choice)
    student = load_config(source.config_folder).student
    sampling = dataclasses.replace(sampling, options=own_options(student, sampling.options, given))
    with bars.waiting("starting"):
        from scale_rae.pipeline import ScaleRAE  # noqa: F401
    return source, sampling


def send(
    opened: OpenedModel,
    mode: dict[str, Any],
    inputs: Sequence[ModelInput],
    sampling: Sampling,
    output: OutputOptions,
    bars: Bars,
    post_qa: PostQA | None = None,
    draw: bool = True,
) -> list[Outcome]:
    """Sends inputs to the model in batches; each batch is saved and printed as soon as it is done.

    Each manifest begins with `mode`. `sampling.batch_size` images are drawn at once, for several inputs if one has fewer.
    Without `draw`, a reply that asks for an image ends there.

    Raises:
        InputError: before anything is drawn, for inputs longer than the model reads.
    """
    model = opened.model
    if post_qa is not None or any(item.latent is not None for item in inputs):
        model.check_reads()
    check_lengths(model, inputs)
    seeds = [_seeds(item, sampling) for item in inputs]
    batch_size = sampling.batch_size or model.batch_size
    at_once = max(1, batch_size // max(len(s) for s in seeds))
    expected = sum(len(s) for s in seeds)
    bars.expect(expected)
    model.expect(expected)
    outcomes = []
    with RunWriter(output, model.device.type == "cpu", bars, len(inputs)) as writer:
        for i in range(0, len(inputs), at_once):
            batch = inputs[i : i + at_once]
            try:
                results, images, seconds = _draw(
                    model, batch, seeds[i : i + at_once], sampling, output, batch_size, bars, draw
                )
            finally:
                bars.stop()
            answers: list[list[dict[str, str]]] | None = None
            if post_qa is not None:
                start = time.perf_counter()
                answers = ask_about(model, [item.prompt for item in batch], results, images, post_qa, batch_size)
                seconds["post_qa"] = round(time.perf_counter() - start, 3)
            record = opened.record()
            for j, (item, result) in enumerate(zip(batch, results, strict=True)):
                manifest = drawing_manifest(
                    mode,
                    item.prompt,
                    item.recorded,
                    record,
                    sampling,
                    [drawing.seed for drawing in result.images],
                    batch_size,
                    len(batch),
                    result.text,
                    opened.seconds | seconds,
                )
                if post_qa is not None and answers is not None:
                    manifest["post_qa"] = post_qa.record(answers[j])
                samples = [
                    Sample(
                        None if image is None else output.enlarged(image),
                        drawing.latent if output.save_latent or output.skip_decoder else None,
                        png_text(manifest, drawing.seed),
                        seed=drawing.seed,
                    )
                    for drawing, image in zip(result.images, images[j], strict=True)
                ]
                writer.save(manifest, samples, item.label)
                outcomes.append(outcome_of(model, result, sampling))
    return outcomes


def outcome_of(model: ScaleRAE, result: Generation | SearchResult, sampling: Sampling) -> Outcome:
    """The outcome of one result of the model."""
    withheld = not result.images and model.asks_for_image(result.reply)
    cut_off = not (result.images or withheld) and len(result.reply.ids) >= sampling.max_new_tokens
    return Outcome(bool(result.images), result.text.strip(), cut_off, withheld)


class RunWriter:
    """Saves runs on a thread of its own, while a GPU draws the next; prints each run, in order, when it is on disk.

    With `at_once`, `save` returns when the run is saved. If there are several runs, `total`, each is numbered on stderr.
    """

    def __init__(self, output: OutputOptions, at_once: bool, bars: Bars | None = None, total: int = 1) -> None:
        self._output, self._at_once, self._time = output, at_once, timestamp()
        self._bars, self._total, self._shown = bars, total, 0
        self._pool = ThreadPoolExecutor(1)
        self._underway: list[Future[dict[str, Any]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._pool.shutdown()
        with contextlib.suppress(OutputError) if error is not None else contextlib.nullcontext():
            self._show(wait=True)  # also after a failure: these runs are on disk

    def save(self, manifest: dict[str, Any], samples: Sequence[Sample], label: str) -> None:
        """Saves a run."""
        place, names = self._output.place, self._output.names
        if self._output.upscale > 1:
            manifest["upscale"] = self._output.upscale
        job = self._pool.submit(save_run, place, manifest, samples, self._time, label, names)
        self._underway.append(job)
        self._show(self._at_once)

    def _show(self, wait: bool) -> None:
        while self._underway and (wait or self._underway[0].done()):
            manifest = self._underway.pop(0).result()
            self._shown += 1
            if self._bars is not None and self._total > 1:
                self._bars.note(f"{self._shown}/{self._total} {shorten(manifest['prompt'], 100)}")
            print_results(manifest, self._output)


def note_shortcomings(
    opened: OpenedModel, outcomes: Sequence[Outcome], bars: Bars, flag: str, limit: int, instead: str
) -> None:
    """Prints notes on stderr about answers that fall short; fails where one would have been an image (`instead` says how to
    have it drawn)."""
    withheld = sum(outcome.withheld for outcome in outcomes)
    if any(not (outcome.drew or outcome.text or outcome.withheld) for outcome in outcomes):
        bars.note("note: the model answered with nothing that can be printed")
    if any(outcome.cut_off for outcome in outcomes):
        bars.note(f"note: the answer stops at {counted(limit, 'token')}; {flag} allows more")
    source = opened.model.source
    if any(is_refusal(source, outcome.text) for outcome in outcomes):
        bars.note(f"note: {what_it_can(source)}")
    if withheld:
        how_many = "" if len(outcomes) == 1 else f" {withheld} of {len(outcomes)} times"
        able = what_it_can(source)
        fail(
            f"the model began a picture{how_many} instead of answering, which was not drawn; "
            f"put the question in other words, or {instead}" + (f" ({able})" if able else "")
        )


def note_seed(ctx: typer.Context, sampling: Sampling, bars: Bars) -> None:
    """Prints the seeds on stderr if they are random."""
    if "random" in text_of(ctx, "seed") and sampling.image_seeds is None:
        bars.note(f"seed {','.join(map(str, sampling.seeds))}")


def check_lengths(model: ScaleRAE, inputs: Sequence[ModelInput]) -> None:
    """Raises InputError for prompts that are too long, with their places in the file, which the pipeline does not know."""
    config, problems = model.config, []
    for item in inputs:
        if item.where:
            length = len(model.tokenizer.chat(item.prompt))
            if length + config.tokens > config.max_length:
                problems.append(
                    f"{item.where}: {length} tokens long; with {config.tokens} image tokens the model reads at most "
                    f"{config.max_length}"
                )
    if problems:
        raise InputError("; ".join(problems))


def _seeds(item: ModelInput, sampling: Sampling) -> list[int]:
    from scale_rae.noise import image_seed

    if sampling.image_seeds is not None:
        return list(sampling.image_seeds)
    return [image_seed(seed, item.index, j) for seed in sampling.seeds for j in range(sampling.num_images)]


def _draw(
    model: ScaleRAE,
    batch: Sequence[ModelInput],
    seeds: list[list[int]],
    sampling: Sampling,
    output: OutputOptions,
    batch_size: int,
    bars: Bars,
    draw: bool,
) -> tuple[list[Generation], list[list[Image.Image | None]], dict[str, float]]:
    """A batch's replies, the pixels of each reply's images (None when decoding is skipped), and seconds."""
    shown = [item.latent for item in batch if item.latent is not None]
    results = model.generate(
        [item.prompt for item in batch],
        image_seeds=seeds,
        options=sampling.options,
        max_new_tokens=sampling.max_new_tokens,
        latents=shown or None,
        batch_size=batch_size,
        decode=False,
        draw=draw,
        callback=bars.step,
    )
    seconds = {name: round(value, 3) for name, value in results[0].seconds.items()}
    start = time.perf_counter()
    latents = [drawing.latent for result in results for drawing in result.images]
    skip = output.skip_decoder or not latents
    pixels: Iterator[Image.Image | None] = iter([None] * len(latents) if skip else model.decode(latents, batch_size))
    images = [[next(pixels) for _ in result.images] for result in results]
    seconds["decoding"] = round(time.perf_counter() - start, 3)
    return results, images, seconds


def ask_about(
    model: ScaleRAE,
    prompts: Sequence[str],
    results: Sequence[Generation | SearchResult],
    images: Sequence[Sequence[Image.Image | None]],
    post_qa: PostQA,
    batch_size: int,
) -> list[list[dict[str, str]]]:
    """Question and answer per image, a list per result."""
    questions = [post_qa.question(p) for p, result in zip(prompts, results, strict=True) for _ in result.images]
    if post_qa.mode == "image":
        latents = model.encode([image for row in images for image in row if image is not None])
    else:
        latents = [drawing.latent for result in results for drawing in result.images]
    answers: list[dict[str, str]] = []
    for i in range(0, len(questions), batch_size):
        asked, shown = questions[i : i + batch_size], latents[i : i + batch_size]
        replies = model.answer(asked, latents=shown, max_new_tokens=post_qa.max_new_tokens)
        answers += [{"question": q, "answer": a.text} for q, a in zip(asked, replies, strict=True)]
    rest = iter(answers)
    return [[next(rest) for _ in result.images] for result in results]


def print_results(manifest: dict[str, Any], output: OutputOptions) -> None:
    """Prints a run: its text, the paths of its files, the answers about its images. With `json`, prints its manifest."""
    if output.json:
        show_json(manifest)
        return
    text = (manifest["output_text"] or "").strip()
    if text:
        show(text)
    answers = manifest.get("post_qa", {}).get("answers", [])
    images, latents = manifest["output_images"], manifest["latent_paths"]
    for k in range(max(len(images), len(latents))):
        for paths in (images, latents):
            if paths:
                show(paths[k])
        if output.preview and images and (reason := show_picture(Path(images[k]))):
            say(f"note: no preview of {images[k]}: {reason}")
        if answers:
            show(f"  {answers[k]['question']} {answers[k]['answer'].strip()}")
