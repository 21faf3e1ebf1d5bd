"""Scale-RAE (arXiv 2601.16208): one model that draws images, reads them, and scores what it drew.

    import scale_rae
    model = scale_rae.load("shapes")
    model.generate("Can you generate a photo of a red circle?").images[0].image.show()

`search` draws until images are accepted. Importing this package loads no torch; `load` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from scale_rae.errors import ScaleRAEError
from scale_rae.version import __version__

if TYPE_CHECKING:
    import torch

    from scale_rae.loading import LoadProgress
    from scale_rae.options import CompileMode, Dtype, OffloadMode, QuantizeKind
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.prompt_search import search

__all__ = ["ScaleRAE", "ScaleRAEError", "__version__", "load", "search"]


def load(
    name: str | os.PathLike[str] = "shapes",
    decoder: str | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype | torch.dtype | None = None,
    revision: str | None = None,
    progress: LoadProgress | None = None,
    compile: CompileMode = "auto",
    quantize: QuantizeKind | Literal["none"] | None = None,
    split_batches: bool = True,
    offload: OffloadMode = "none",
    memory: str | None = None,
    lora: Sequence[str] = (),
) -> ScaleRAE:
    """The model `name`: "shapes" (bundled), a folder, or a hub id. See `ScaleRAE.from_pretrained` for the options."""
    from scale_rae.pipeline import ScaleRAE

    return ScaleRAE.from_pretrained(
        name, decoder, device, dtype, revision, progress, compile, quantize, split_batches, offload, memory, lora
    )


def __getattr__(name: str) -> Any:
    if name == "ScaleRAE":
        from scale_rae.pipeline import ScaleRAE

        return ScaleRAE
    if name == "search":
        from scale_rae.prompt_search import search

        return search
    raise AttributeError(f"module 'scale_rae' has no attribute {name!r}")
