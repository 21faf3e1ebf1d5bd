"""What PyTorch is asked to choose: compiled functions, and which of its attention kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

MOST_SHAPES = 4096  # that a function is compiled for


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for each shape it meets, whole or with an error.

    Compiled code is kept between runs, in $TORCHINDUCTOR_CACHE_DIR or the user's cache folder.
    """
    import torch._dynamo

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scale_rae" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # Every batch size is a compilation of the same function; torch gives up at 8, and at 256 in all.
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(MOST_SHAPES, getattr(torch._dynamo.config, name)))
    return torch.compile(function, dynamic=False, fullgraph=True)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, what PyTorch may choose from: not cuDNN's attention, which makes a plan for every shape it meets."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)  # type: ignore[no-any-return]
