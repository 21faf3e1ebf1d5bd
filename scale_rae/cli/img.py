"""The command `scale-rae img`: ask about an image, or have it changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.options import OutputOptions
from scale_rae.cli.progress import Bars
from scale_rae.cli.runs import ModelInput, note_seed, note_shortcomings, prepare, send
from scale_rae.cli.signature import expanded, given_options
from scale_rae.opening import OpenedModel
from scale_rae.options import SAMPLING, ModelChoice, Sampling
from scale_rae.prompt import clean_message
from scale_rae.wording import asks_to_draw


@expanded
def command(
    ctx: typer.Context,
    *,
    positional: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE PROMPT", help="The image and the prompt, if no options give them.", show_default=False
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The image file; required.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help='A question, or a request for another picture: "Make it blue."; required.')
    ] = None,
    draw: Annotated[
        bool | None,
        typer.Option(
            "--draw/--no-draw",
            help="Draw if the model replies by a picture, or never. Default: draw if the prompt is worded as a request.",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    choice: ModelChoice,
    sampling: Sampling,
    output: OutputOptions,
) -> None:
    """Ask about an image, or have it changed.

    Prints the model's answer. A prompt that is worded as a request ("Draw …", "Make it …", "Can you change …?") may be
    answered by an image, which is saved; a question may not.
    """
    rest = list(positional or [])
    image = Path(rest.pop(0)) if image is None and rest else image
    prompt = rest.pop(0) if prompt is None and rest else prompt
    for missing, flag in ((image is None, "--image"), (prompt is None, "--prompt")):
        if missing:
            raise typer.BadParameter("is missing", param_hint=flag)
    if rest:
        raise typer.BadParameter(f"{rest[0]!r} is one argument too many; put the prompt in quotes", param_hint="PROMPT")
    assert image is not None
    assert prompt is not None
    sampling.check()
    given = given_options(ctx)
    output.check(given)
    clean_message(prompt)
    from scale_rae.images import decode_image, read_image

    data = read_image(image)  # once: a pipe cannot be read again, and a file may change
    picture = decode_image(data, str(image))
    digest = hashlib.sha256(data).hexdigest()
    output.check_place()
    bars = Bars(output.quiet)
    note_seed(ctx, sampling, bars)
    source, sampling = prepare(choice, sampling, bars, given)
    opened = OpenedModel(choice, bars, source=source, encoder=True, debug=output.debug)
    asked = ModelInput(prompt, opened.model.encode([picture])[0])
    mode = {"mode": "img", "image": str(image), "image_sha256": digest}
    may_draw = asks_to_draw(prompt) if draw is None else draw
    outcomes = send(opened, mode, [asked], sampling, output, bars, draw=may_draw)
    note_shortcomings(opened, outcomes, bars, "--max-new-tokens", sampling.max_new_tokens, "have it drawn: --draw")
