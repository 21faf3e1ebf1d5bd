"""Scale-RAE nodes for ComfyUI. ComfyUI imports this folder and calls `comfy_entrypoint`."""

from __future__ import annotations

try:
    import scale_rae  # noqa: F401
except ImportError as e:
    raise ImportError(
        "the Scale-RAE nodes need the package scale-rae in the Python that runs ComfyUI; docs/comfyui.md says how to install it"
    ) from e

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
