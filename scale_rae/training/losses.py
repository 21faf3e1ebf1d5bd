"""The flow loss and the text loss of Scale-RAE (arXiv 2601.16208), and the times of the former."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.flow import shifted, time_shift
from scale_rae.sampling import NormStats

FLOW_WEIGHT = 2.0  # of the flow loss beside the text's cross-entropy (the official vision_coef)


def flow_loss(dit: DiT, latents: Tensor, conditions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Flow loss [B] float32 of each picture: the mean over channels and places of (v - (noise - x))².

    v is the network's velocity at x_t = (1 - t) x + t noise. Gradients reach the network and the conditions.

    Args:
        latents: x [B, L, C], normalised by the checkpoint's norm stats if it has any.
        conditions: [B, L, Z], after `diff_head_projector`.
        t: [B] in (0, 1], as `sample_times` draws it.
        noise: [B, C, S, S], standard normal.

    Source: rectified flow as in Scale-RAE (arXiv 2601.16208); REFERENCE §13.
    """
    x = latents.float().transpose(1, 2).reshape(noise.shape)  # [B, C, S, S]
    return flow_errors(dit, x, conditions, t, noise.float()).mean(dim=(1, 2, 3))


def flow_errors(
    dit: DiT, x: Tensor, conditions: Tensor, t: Tensor, noise: Tensor, target: Tensor | None = None
) -> Tensor:
    """(v - target)² [B, C, S, S] at x_t = (1 - t) x + t noise, for x and noise [B, C, S, S] float32.

    `target` is the velocity to learn; None means noise - x.
    """
    velocity: Tensor = dit(between(x, t, noise), t, conditions)
    return (velocity - (noise - x if target is None else target)).square()


def normalised(latents: Tensor, norm_stats: NormStats | None) -> Tensor:
    """Latents [N, L, C] as the velocity network sees them: x [N, C, S, S] float32.

    They are normalised by the norm stats, if there are any.
    """
    latents = latents.float()
    if norm_stats is not None:
        mean, std = norm_stats
        latents = (latents - mean) / std
    count, tokens, channels = latents.shape
    side = math.isqrt(tokens)
    return latents.transpose(1, 2).reshape(count, channels, side, side)


def between(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise [B, C, S, S] of data and noise at times t [B]."""
    at = t[:, None, None, None]
    return (1 - at) * x + at * noise


def sample_times(
    count: int, shift: float, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Times [count] float32 of training: shift(sigmoid(n)), n ~ N(0, 1).

    `shift` is `training_shift`.
    """
    return shifted(torch.randn(count, generator=generator, device=device).sigmoid(), shift)


def training_shift(config: ScaleRAEConfig) -> float:
    """The time shift alpha = sqrt(C L / base_dim) of a checkpoint; training and the time grid share it."""
    return time_shift(config.channels, config.tokens, config.base_dim)


def text_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies [N] float32 of logits [N, V] that predict the tokens `targets` [N]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
