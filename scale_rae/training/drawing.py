"""Draws latents with the plain velocity network during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.noise import draw_noise
from scale_rae.sampling import NormStats
from scale_rae.training.losses import training_shift


@torch.no_grad()
def draw_latents(
    dit: DiT,
    config: ScaleRAEConfig,
    norm_stats: NormStats | None,
    conditions: Tensor,
    seeds: Sequence[int],
    guidance: float,
    steps: int,
    solver: str = "euler",
) -> Tensor:
    """Latents [B, L, C] of conditions [B, L, Z], one noise seed each.

    Without a null embedding there is no guidance.
    """
    device = dit.pos_embed.device
    conditions = conditions.to(device)
    noise = draw_noise(seeds, config.channels, config.dit.side, device)()

    def velocity(given: Tensor) -> flow.Velocity:
        return lambda x, t: dit(x, torch.full((len(x),), t, device=device), given)

    null = dit.null_condition
    if null is None:
        guidance, null = 1.0, conditions
    guided = flow.guided(velocity(conditions), velocity(null.expand_as(conditions)), guidance)
    sampler = flow.SAMPLERS[solver]
    times = sampler.schedule(steps, training_shift(config))
    latents = flow.solve(sampler, guided, noise, times).flatten(2).transpose(1, 2)
    if norm_stats is not None:
        mean, std = norm_stats
        latents = latents * std + mean
    return latents
