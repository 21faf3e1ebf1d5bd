"""scale-rae img: ask about an image."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli import options as o
from scale_rae.cli.drawing import Message, note_shortcomings, prepare, send
from scale_rae.cli.progress import Bars
from scale_rae.opening import OpenedModel
from scale_rae.outputs import check_folder
from scale_rae.prompt import clean_message
from scale_rae.wording import asks_to_draw


def command(
    image: Annotated[Path, typer.Option(help="The image file.")],
    prompt: Annotated[str, typer.Option(help='A question, or a request for another picture: "Make it blue."')],
    draw: Annotated[
        bool | None,
        typer.Option(
            "--draw/--no-draw",
            help="Draw if the model replies by a picture, or never. Default: draw if the prompt is worded as a request.",
            show_default=False,
            rich_help_panel=o.SAMPLING,
        ),
    ] = None,
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
    batch_size: o.BatchSize = None,
    output_dir: o.OutputDir = Path("outputs"),
    save_latent: o.SaveLatent = False,
    skip_decoder: o.SkipDecoder = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Ask about an image, or have it changed.

    Prints the model's answer. A prompt that is worded as a request ("Draw …", "Make it …", "Can you change …?") may be
    answered by an image, which is saved; a question may not.
    """
    sampling = o.Sampling(
        num_images, seed, guidance_level, guidance_interval, steps, solver, max_new_tokens, batch_size
    )
    sampling.check()
    clean_message(prompt)
    from scale_rae.images import decode_image, read_image

    data = read_image(image)  # once: a pipe cannot be read again, and a file may change
    picture = decode_image(data, str(image))
    digest = hashlib.sha256(data).hexdigest()
    check_folder(output_dir)
    bars = Bars()
    choice = o.ModelChoice(model_path, decoder_repo, revision, device, dtype, compile, quantize)
    source = prepare(choice, sampling, bars)
    output = o.Output(output_dir, save_latent, skip_decoder, json, debug)
    session = OpenedModel(choice, bars, source=source, encoder=True, debug=debug)
    message = Message(prompt, session.model.encode([picture])[0])
    mode = {"mode": "img", "image": str(image), "image_sha256": digest}
    may_draw = asks_to_draw(prompt) if draw is None else draw
    outcomes = send(session, mode, [message], sampling, output, bars, draw=may_draw)
    note_shortcomings(session, outcomes, "--max-new-tokens", max_new_tokens, "have it drawn: --draw")
