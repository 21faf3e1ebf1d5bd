"""The command `scale-rae latent`: decode saved latents, ask about them, continue from them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scale_rae.cli.options import OutputOptions
from scale_rae.cli.progress import Bars
from scale_rae.cli.runs import ModelInput, note_seed, note_shortcomings, prepare, print_results, send
from scale_rae.cli.signature import expanded, given_options, one_of
from scale_rae.errors import InputError
from scale_rae.files import check_file
from scale_rae.manifest import input_latents, png_text
from scale_rae.opening import OpenedModel
from scale_rae.options import DECODE_AT_ONCE, DEFAULT_ANSWER_TOKENS, SAMPLING, ModelChoice, Sampling
from scale_rae.outputs import Sample, save_run, timestamp
from scale_rae.prompt import clean_message

if TYPE_CHECKING:
    from torch import Tensor


@expanded
def command(
    ctx: typer.Context,
    *,
    action: Annotated[
        str,
        typer.Option(
            callback=one_of("decode", "qa", "continue"),
            help="decode: latent to image. qa: ask about it, in words. continue: go on from it, to text or another image.",
        ),
    ],
    latent: Annotated[
        list[Path] | None, typer.Option("--latent", help="A latent file, or several: --latent a.pt b.pt; required.")
    ] = None,
    latents_after: Annotated[list[Path] | None, typer.Argument(metavar="LATENT", hidden=True)] = None,
    prompt: Annotated[str | None, typer.Option(help="The question or request; qa and continue need it.")] = None,
    choice: ModelChoice,
    sampling: Sampling,
    max_new_tokens_qa: Annotated[
        int, typer.Option(help="Longest answer of qa, in tokens.", rich_help_panel=SAMPLING)
    ] = DEFAULT_ANSWER_TOKENS,
    output: OutputOptions,
) -> None:
    """Decode saved latents, ask about them, or continue from them."""
    output.check(given_options(ctx))
    paths = [*(latent or []), *(latents_after or [])]
    if not paths:
        raise typer.BadParameter("name at least one latent file", param_hint="--latent")
    if action != "decode":
        if prompt is None:
            raise typer.BadParameter(f"--action {action} needs it", param_hint="--prompt")
        clean_message(prompt)
    elif prompt is not None:
        raise typer.BadParameter("cannot go with --action decode, which asks nothing", param_hint="--prompt")
    elif unknown := output.names.fields() & {"prompt", "seed", "index"}:
        raise typer.BadParameter(f"decoding knows no {', '.join(sorted(unknown))}", param_hint="--filename-template")
    elif output.skip_decoder:
        raise typer.BadParameter("cannot go with --action decode", param_hint="--skip-decoder")
    for path in paths:
        check_file(path, "latent file")
    output.check_place()
    if action == "qa":
        sampling = dataclasses.replace(sampling, max_new_tokens=max_new_tokens_qa)
    bars = Bars(output.quiet)
    note_seed(ctx, sampling, bars)
    source, sampling = prepare(choice, sampling, bars, given_options(ctx))
    from scale_rae.checkpoint import load_latent

    latents = [load_latent(path) for path in paths]
    opened = OpenedModel(choice, bars, source=source, decoder=action == "decode", debug=output.debug)
    for i, path in enumerate(paths):
        try:
            latents[i] = opened.model.check_latent(latents[i])
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
    mode = {"mode": "latent", "action": action}
    if action == "decode":
        _decode(opened, mode, paths, latents, output, sampling.batch_size)
        return
    assert prompt is not None
    inputs = [
        # Each latent is its own conversation, so its images have the noise that they would have alone.
        ModelInput(prompt, shown, label=f"-{i:02}" if len(paths) > 1 else "", recorded=input_latents([path]))
        for i, (path, shown) in enumerate(zip(paths, latents, strict=True))
    ]
    outcomes = send(opened, mode, inputs, sampling, output, bars, draw=action == "continue")
    flag = "--max-new-tokens-qa" if action == "qa" else "--max-new-tokens"
    note_shortcomings(opened, outcomes, bars, flag, sampling.max_new_tokens, "have it drawn: --action continue")


def _decode(
    opened: OpenedModel,
    mode: dict[str, Any],
    paths: Sequence[Path],
    latents: Sequence[Tensor],
    output: OutputOptions,
    batch_size: int | None,
) -> None:
    start = time.perf_counter()
    size = batch_size or DECODE_AT_ONCE
    images = opened.model.decode(latents, size)
    seconds = opened.seconds | {"decoding": round(time.perf_counter() - start, 3)}
    manifest = {**mode, "prompt": None, **input_latents(paths), **opened.record(), "batch_size": size}
    manifest |= {"output_text": None, "seconds": seconds}
    if output.upscale > 1:
        manifest["upscale"] = output.upscale
    text = png_text(manifest)
    samples = [
        Sample(output.enlarged(image), shown if output.save_latent else None, text | {"latent": str(path)})
        for image, shown, path in zip(images, latents, paths, strict=True)
    ]
    with ThreadPoolExecutor(1) as pool:  # Ctrl-C interrupts the main thread only
        saved = pool.submit(save_run, output.place, manifest, samples, timestamp(), "", output.names).result()
    print_results(saved, output)
