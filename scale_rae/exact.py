"""How many drawings may be made at once on one thread of a CPU without changing a bit of any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scale_rae.memory import out_of_memory

if TYPE_CHECKING:
    from scale_rae.options import SamplingOptions
    from scale_rae.pipeline import ScaleRAE


def exact_batch(model: ScaleRAE, most: int, options: Sequence[SamplingOptions], one_prompt: bool) -> int:
    """The largest of `most` and smaller powers of two whose drawings are, to the bit, those made one by one on one thread.

    Tried in two steps of each of `options`, of `one_prompt` or of as many as drawings; what there is no memory for will not do.
    Call it with one thread of arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (model.config.tokens, model.config.dit.condition_width)
    conditions = [torch.randn(shape, generator=generator).to(model.dtype) for _ in range(most)]
    conditions = conditions[:1] * most if one_prompt else conditions

    def draw(option: SamplingOptions, size: int) -> list[Tensor]:
        return model.sample(conditions, range(most), replace(option, steps=2), size)

    alone: list[list[Tensor]] = []
    size = most
    while size > 1:
        try:
            alone = alone or [draw(option, 1) for option in options]
            # Every size up to this one is drawn in.
            if all(
                torch.equal(x, y)
                for option, expected in zip(options, alone, strict=True)
                for some in range(2, size + 1)
                for x, y in zip(draw(option, some), expected, strict=True)
            ):
                return size
        except Exception as e:
            if not out_of_memory(e):
                raise
        size //= 2
    return 1
