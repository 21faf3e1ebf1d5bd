"""AdamW with its two moments in 8 bits each instead of 32, by bitsandbytes.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale; bitsandbytes' kernels know no other number


class EightBitMoments:
    """The moments of AdamW for the elements of one buffer, and the update of its weights.

    `runs` are (start, stop, rate) of the parts of the buffer, as `FlatModel` has them: one update each, with its rate.
    """

    def __init__(self, runs: Sequence[tuple[int, int, float]], size: int, device: torch.device) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that only its products need
        from bitsandbytes.functional import create_dynamic_map

        self._runs = list(runs)
        self._codes = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        # Zero in both codes stands at another place than 0, but a scale of 0 makes every code 0.
        self._values = torch.zeros(2, size, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(2, sum(_blocks(start, stop) for start, stop, _ in runs), device=device)

    def update(
        self, weights: Tensor, gradient: Tensor, step: int, lr: float, clip: float, betas: tuple[float, float]
    ) -> None:
        """Moves the weights by the gradients times `clip`; the first step is 1. There is no weight decay."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        at = 0
        for start, stop, rate in self._runs:
            scales = self._scales[:, at : at + _blocks(start, stop)]
            at += _blocks(start, stop)
            optimizer_update_8bit_blockwise(
                "adam",
                gradient[start:stop],
                weights[start:stop],
                self._values[0, start:stop],
                self._values[1, start:stop],
                beta1=betas[0],
                beta2=betas[1],
                beta3=0.0,
                alpha=0.0,
                eps=1e-8,
                step=step,
                lr=lr * rate,
                qmap1=self._codes[0],
                qmap2=self._codes[1],
                absmax1=scales[0],
                absmax2=scales[1],
                gnorm_scale=clip,
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps."""
        return {"moments": self._values, "moment_scales": self._scales}


def _blocks(start: int, stop: int) -> int:
    return -(-(stop - start) // BLOCK)
