"""Scale-RAE (arXiv 2601.16208): one model that draws and looks, and judges what it drew.

    import scale_rae
    model = scale_rae.load("shapes")
    model.generate("Can you generate a photo of a red circle?").images[0].image.show()

Importing this package loads no torch; `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scale_rae.errors import ScaleRAEError
from scale_rae.version import __version__

if TYPE_CHECKING:
    from scale_rae.pipeline import ScaleRAE

__all__ = ["ScaleRAE", "ScaleRAEError", "__version__", "load"]


def load(name: str = "shapes", **options: Any) -> ScaleRAE:
    """The model `name`: "shapes" (bundled), a folder, or a hub id. See `ScaleRAE.from_pretrained` for options."""
    from scale_rae.pipeline import ScaleRAE

    return ScaleRAE.from_pretrained(name, **options)


def __getattr__(name: str) -> Any:
    if name == "ScaleRAE":
        from scale_rae.pipeline import ScaleRAE

        return ScaleRAE
    raise AttributeError(f"module 'scale_rae' has no attribute {name!r}")
