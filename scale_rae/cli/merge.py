"""The command `scale-rae merge`: a checkpoint of a model with LoRA adapters merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scale_rae.cli.app import show
from scale_rae.cli.options import Debug
from scale_rae.cli.progress import Bars
from scale_rae.cli.signature import expanded, one_of
from scale_rae.errors import OptionError
from scale_rae.hub import find
from scale_rae.options import DEFAULT_MODEL, DTYPES, Lora, lora_parts
from scale_rae.training.settings import Model, Revision


@expanded
def command(
    *,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    lora: Lora = (),
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoint: a new or an empty one.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=one_of(*DTYPES),
            help="float32, bfloat16 or float16. Default: each weight's stored dtype.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Merge LoRA adapters into a model; write a checkpoint in the published layout.

    The official code loads this checkpoint, too."""
    for text in lora:
        lora_parts(text)
    source = find(model, "model", revision=revision)
    if not lora and source.student is None:
        raise OptionError("--lora: give at least one adapter to merge")
    import torch

    from scale_rae.adapters import find_adapters, model_reader, read_adapter
    from scale_rae.publishing import write_model

    adapters = [read_adapter(files, weight) for files, weight in find_adapters(lora)]
    reader = model_reader(source, adapters)
    bars = Bars()
    try:
        target = write_model(
            source,
            reader,
            out,
            getattr(torch, dtype) if dtype else None,
            progress=lambda done, total: bars.load("and merging", done, total),
        )
    finally:
        bars.stop()
    show(str(target))
