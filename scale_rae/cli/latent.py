"""scale-rae latent: decode saved latents, ask about them, continue from them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scale_rae.cli import options as o
from scale_rae.cli.drawing import Message, note_shortcomings, prepare, print_results, send
from scale_rae.cli.progress import Bars
from scale_rae.errors import InputError
from scale_rae.manifest import input_latents, png_text
from scale_rae.opening import OpenedModel
from scale_rae.outputs import Sample, check_folder, save_run, timestamp
from scale_rae.prompt import clean_message

if TYPE_CHECKING:
    from torch import Tensor


def command(
    action: Annotated[
        str,
        typer.Option(
            callback=o.one_of("decode", "qa", "continue"),
            help="decode: latent to image. qa: ask about it, in words. continue: go on from it, to text or another image.",
        ),
    ],
    latent: Annotated[
        list[Path] | None, typer.Option("--latent", help="A latent file, or several: --latent a.pt b.pt; required.")
    ] = None,
    latents_after: Annotated[list[Path] | None, typer.Argument(metavar="LATENT", hidden=True)] = None,
    prompt: Annotated[str | None, typer.Option(help="The question or request; qa and continue need it.")] = None,
    model_path: o.ModelPath = o.DEFAULT_MODEL,
    decoder_repo: o.DecoderRepo = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    compile: o.Compile = "auto",
    quantize: o.Quantize = None,
    num_images: o.NumImages = 1,
    seed: o.Seed = 42,
    guidance_level: o.GuidanceLevel = 1.0,
    guidance_interval: o.GuidanceInterval = None,
    steps: o.Steps = o.DEFAULT_STEPS,
    solver: o.Solver = "euler",
    max_new_tokens: o.MaxNewTokens = 512,
    max_new_tokens_qa: Annotated[
        int, typer.Option(help="Longest answer of qa, in tokens.", rich_help_panel=o.SAMPLING)
    ] = 64,
    batch_size: o.BatchSize = None,
    output_dir: o.OutputDir = Path("outputs"),
    save_latent: o.SaveLatent = False,
    skip_decoder: o.SkipDecoder = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Decode saved latents, ask about them, or continue from them."""
    paths = [*(latent or []), *(latents_after or [])]
    if not paths:
        raise typer.BadParameter("name at least one latent file", param_hint="--latent")
    if action != "decode":
        if prompt is None:
            raise typer.BadParameter(f"--action {action} needs it", param_hint="--prompt")
        clean_message(prompt)
    elif prompt is not None:
        raise typer.BadParameter("cannot go with --action decode, which asks nothing", param_hint="--prompt")
    elif skip_decoder:
        raise typer.BadParameter("cannot go with --action decode", param_hint="--skip-decoder")
    for path in paths:
        if not os.path.isfile(path):  # noqa: PTH113 - pathlib's fails for names that no file system takes
            raise InputError(f"{path}: no such latent file")
    check_folder(output_dir)
    sampling = o.Sampling(
        *(num_images, seed, guidance_level, guidance_interval, steps, solver),
        max_new_tokens_qa if action == "qa" else max_new_tokens,
        batch_size,
    )
    bars = Bars()
    choice = o.ModelChoice(model_path, decoder_repo, revision, device, dtype, compile, quantize)
    source = prepare(choice, sampling, bars)
    from scale_rae.checkpoint import load_latent

    latents = [load_latent(path) for path in paths]
    output = o.Output(output_dir, save_latent, skip_decoder, json, debug)
    session = OpenedModel(choice, bars, source=source, decoder=action == "decode", debug=debug)
    for i, path in enumerate(paths):
        try:
            latents[i] = session.model.check_latent(latents[i])
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
    mode = {"mode": "latent", "action": action}
    if action == "decode":
        _decode(session, mode, paths, latents, output, sampling.batch_size)
        return
    assert prompt is not None
    messages = [
        # Every latent is asked about by itself, so each one's images have the noise they would have alone.
        Message(prompt, shown, label=f"-{i:02}" if len(paths) > 1 else "", recorded=input_latents([path]))
        for i, (path, shown) in enumerate(zip(paths, latents, strict=True))
    ]
    outcomes = send(session, mode, messages, sampling, output, bars, draw=action == "continue")
    flag = "--max-new-tokens-qa" if action == "qa" else "--max-new-tokens"
    note_shortcomings(session, outcomes, flag, sampling.max_new_tokens, "have it drawn: --action continue")


def _decode(
    session: OpenedModel,
    mode: dict[str, Any],
    paths: Sequence[Path],
    latents: Sequence[Tensor],
    output: o.Output,
    batch_size: int | None,
) -> None:
    start = time.perf_counter()
    size = batch_size or 32
    images = session.model.decode(latents, size)
    seconds = session.seconds | {"decoding": round(time.perf_counter() - start, 3)}
    manifest = {**mode, "prompt": None, **input_latents(paths), **session.record(), "batch_size": size}
    manifest |= {"output_text": None, "seconds": seconds}
    text = png_text(manifest)
    samples = [
        Sample(image, shown if output.save_latent else None, text | {"latent": str(path)})
        for image, shown, path in zip(images, latents, paths, strict=True)
    ]
    with ThreadPoolExecutor(1) as pool:  # another thread's work is not interrupted
        saved = pool.submit(save_run, output.folder, manifest, samples, timestamp()).result()
    print_results(saved, output)
