"""What happens while a node runs: progress, previews and interruption through ComfyUI's hooks; and pictures as ComfyUI has them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from scale_rae import ScaleRAE
    from scale_rae.adaptive import Drawn

Progress = Callable[[str, int, int], None]
StepCallback = Callable[[int, int, float, Tensor, Tensor], None]
_PREVIEWS = 8  # of one drawing, at most
T = TypeVar("T")
R = TypeVar("R")


def to_comfy(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ComfyUI's IMAGE: [N, H, W, 3] float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(torch.float32) / 255


def from_comfy(images: Tensor) -> list[Image.Image]:
    """The pictures of an IMAGE [N, H, W, 3 or 4], 8-bit RGB."""
    pixels = (images[..., :3].float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def stop_if_interrupted() -> None:
    """Raises ComfyUI's exception when the user has interrupted the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def comfy_device() -> str:
    """The device that ComfyUI computes on, as Scale-RAE names it."""
    return str(comfy.model_management.get_torch_device())


def make_room(device: str) -> None:
    """Frees a GPU's memory of ComfyUI's own models and of what earlier workflows left, such as another Scale-RAE model.

    ComfyUI 0.3.64 drops results of earlier workflows itself before a run; later ones keep them while the host has memory.
    """
    if device != "cpu":
        if release := getattr(getattr(comfy, "memory_management", None), "extra_ram_release", None):
            release(math.inf)  # until the host has all the memory there is; results in use are kept
        gc.collect()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


def in_parts(items: Sequence[T], size: int, work: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """What `work` makes of the items, `size` at once; between parts, the node's bar moves and the run can be interrupted."""
    bar, made = comfy.utils.ProgressBar(len(items)), list[R]()
    for start in range(0, len(items), size):
        stop_if_interrupted()
        made += work(items[start : start + size])
        bar.update_absolute(len(made))
    return made


def loading_progress() -> Progress:
    """A `load` progress callback that moves the node's bar, and can be interrupted."""
    bar = comfy.utils.ProgressBar(100)

    def progress(what: str, done: int, total: int) -> None:
        stop_if_interrupted()
        if (percent := 100 * done // total) != bar.current:
            bar.update_absolute(percent)

    return progress


def drawing_progress(model: ScaleRAE) -> tuple[Progress, StepCallback]:
    """`progress` and `callback` for `ScaleRAE.generate`: they move the node's bar, show previews, and can be interrupted."""
    bar, moved = comfy.utils.ProgressBar(1), (0, 1)
    preview = _wants_previews() and model.residency.mode == "none"  # a preview would swap offloaded weights

    def progress(what: str, done: int, total: int) -> None:
        nonlocal moved
        moved = done, total

    def callback(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:  # after `progress`
        stop_if_interrupted()
        shown = None
        if preview and evaluation < evaluations and evaluation % -(-evaluations // _PREVIEWS) == 0:
            shown = _preview(model.decode(model.estimate(t, x[:1], v[:1]))[0])
        bar.update_absolute(*moved, shown)

    return progress, callback


def searching_progress(candidates: int) -> Callable[[Drawn], None]:
    """A `search` watcher: the node's bar has `candidates` steps, and each look's picture is a preview."""
    bar, decided = comfy.utils.ProgressBar(candidates), set[int]()

    def watch(drawn: Drawn) -> None:
        stop_if_interrupted()
        if drawn.candidate.fate:
            decided.add(drawn.candidate.number)
        shown = _preview(drawn.picture) if drawn.picture is not None and _wants_previews() else None
        bar.update_absolute(len(decided), candidates, shown)

    return watch


def _wants_previews() -> bool:
    return bool(args.preview_method.value != "none")


def _preview(picture: Image.Image) -> tuple[str, Any, int]:
    return "JPEG", picture, args.preview_size
