"""Networks of random weights."""

from __future__ import annotations

import torch

from scale_rae.config import DiTConfig
from scale_rae.dit import DiT


def made_dit(config: DiTConfig) -> DiT:
    """A velocity network of random weights, the same each time."""
    generator = torch.Generator().manual_seed(3)
    dit = DiT(config)
    for parameter in dit.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.15
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return dit.requires_grad_(False).eval()
