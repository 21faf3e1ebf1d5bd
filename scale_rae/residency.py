"""Which weights are on the device, and when: all of them always, each part in its turn, or blocks one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


class Residency:
    """Where the weights of a model's parts wait, and what brings a part to the device for its turn.

    `mode` is one of `options.OFFLOAD`:

    - none: all weights are on the device.
    - model: weights wait in the host's memory; a part's weights are on the device while it has its turn.
    - stream: the same, but the blocks of the two large networks are copied to the device one after the other.

    A part computes only inside of `use(part)`.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode, self.device = mode, device

    @property
    def home(self) -> torch.device:
        """Where the weights of parts are loaded to."""
        return self.device if self.mode == "none" else torch.device("cpu")

    def use(self, part: str) -> AbstractContextManager[None]:
        """For a `with`: `part` has its turn on the device."""
        return nullcontext()
