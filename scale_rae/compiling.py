"""torch.compile: how functions are compiled and when compiling pays; and which of PyTorch's attention kernels run."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

MOST_SHAPES = 4096  # shapes per compiled function
COMPILE_PAYS = 8e15  # operations from which compiling pays: those of 130 images with the 2.4B DiT


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for each shape that it is called with; if it cannot be compiled as a whole, it raises.

    Compiled code is kept between runs, in $TORCHINDUCTOR_CACHE_DIR or the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scale_rae" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    import torch._dynamo  # sets the variable to a folder in /tmp if it is not set yet

    # Each batch size is compiled; by default, torch stops compiling a function after 8 shapes, and after 256 in all.
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(MOST_SHAPES, getattr(torch._dynamo.config, name)))
    return torch.compile(function, dynamic=False, fullgraph=True)


class CompilePolicy:
    """Decides which batches of images compiled code draws: none ("off"), all ("on"), or, where `possible`, if that pays ("auto").

    `operations` are those of one evaluation of one image. Each size of batch is compiled once, so "auto" compiles a size
    once the images that are expected, or that were drawn in that size already, repay the seconds that compiling takes.
    """

    def __init__(self, choice: str, operations: float, possible: bool) -> None:
        self.choice, self.operations, self.possible = choice, operations, possible
        self.expected = 0  # images still to be drawn
        self.drawn = Counter[tuple[int, int]]()  # images so far, by batch size (images, prompts)

    def with_choice(self, choice: str) -> CompilePolicy:
        """The same policy, with its counts, for another choice."""
        other = copy.copy(self)
        other.choice = choice
        return other

    def expect(self, images: int) -> None:
        """Sets how many images are to be drawn from now on."""
        self.expected = images

    def count(self, images: int, prompts: int) -> None:
        """Counts a batch that was drawn."""
        self.expected -= images
        self.drawn[images, prompts] += images

    def compiles(self, images: int, prompts: int, evaluations: int, is_compiled: bool) -> bool:
        """Whether compiled code is to draw a batch; `is_compiled` says that there is code for its size already."""
        if self.choice != "auto":
            return self.choice == "on"
        # A program that has drawn many images will draw more.
        expected = max(self.expected, self.drawn[images, prompts])
        return self.possible and (is_compiled or expected * evaluations * self.operations >= COMPILE_PAYS)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """For a `with`: on CUDA, PyTorch does not use cuDNN's attention, which makes a plan for every new shape."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)
