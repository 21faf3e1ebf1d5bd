"""Objectives: the loss of a batch, and numbers to log. A new objective is a class with the same methods.

A batch's loss is divided by the totals of the whole step, so the result does not depend on the number of devices or of parts of
the step. All random numbers come from the samples' own seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.language import LanguageModel
from scale_rae.sampling import NormStats
from scale_rae.training.batches import Sample, embed
from scale_rae.training.losses import FLOW_WEIGHT, between, sample_times, text_losses, training_shift
from scale_rae.training.passes import hidden_states, positions

BINS = 10  # of t, in which the flow loss is logged
_LOGIT_ROWS = 2048  # of a [rows, vocabulary] block of logits


@dataclass(frozen=True)
class Totals:
    """What a whole step has, over all devices: pictures (and those of them that are kept), tokens."""

    pictures: int
    tokens: int
    kept: int


class Objective(Protocol):
    """What a trainer minimises."""

    def totals(self, records: Sequence[tuple[int, int, bool]]) -> Totals:
        """The totals of a step whose records have these numbers of pictures and tokens, and are kept or not."""

    def __call__(self, samples: Sequence[Sample], totals: Totals) -> tuple[Tensor, Tensor]:
        """(loss [], sums to log [len(NAMES)]) of a part of a step; both are summed over the parts."""


NAMES = ("loss", "flow", "text", "kept", *(f"flow {i}" for i in range(BINS)), *(f"count {i}" for i in range(BINS)))
"""What is logged: the step's loss and what it has of flow, text and kept records; sums and numbers of flow losses by bin of t."""


class FineTune:
    """The official loss: 2 · flow loss + cross-entropy of the text; without a language model, the flow loss.

    The target of kept samples is the base model's velocity for its own condition, instead of noise - x.
    """

    def __init__(
        self,
        config: ScaleRAEConfig,
        language: LanguageModel | None,
        dit: DiT,
        norm_stats: NormStats | None,
        dropout: float,
        timesteps: int = 1,
        kept_weight: float = 1.0,
        base: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`dropout` is how often a condition is the null embedding; `timesteps` the noisy latents of each picture.

        Within `base()`, the networks compute as before training.
        """
        self.kept_weight, self.base = kept_weight, base
        self.config, self.language, self.dit, self.norm_stats = config, language, dit, norm_stats
        self.dropout = dropout if config.dit.null_condition else 0.0
        self.timesteps = timesteps
        self.shift = training_shift(config)
        self.device = dit.pos_embed.device

    def totals(self, records: Sequence[tuple[int, int, bool]]) -> Totals:
        pictures = sum(count for count, _, _ in records) * self.timesteps
        kept = sum(count for count, _, is_kept in records if is_kept) * self.timesteps
        return Totals(pictures, sum(tokens for _, tokens, _ in records), kept)

    def __call__(self, samples: Sequence[Sample], totals: Totals) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), device=self.device)
        text = zero
        if self.language is not None:
            conditions, text = self._read(self.language, samples)
            text = text / max(1, totals.tokens)
        else:
            given = [sample.condition for sample in samples if sample.condition is not None]
            conditions = torch.cat(given).to(self.device) if given else zero[None, None, None]
        flow, kept, times = self._flow(samples, conditions)
        mean, keeping = flow.sum() / max(1, totals.pictures - totals.kept), kept.sum() / max(1, totals.kept)
        both = mean + self.kept_weight * keeping
        loss = both if self.language is None else FLOW_WEIGHT * both + text
        bins = (times * BINS).long().clamp(max=BINS - 1)
        by_bin = torch.zeros(2, BINS, device=self.device)
        by_bin[0].index_add_(0, bins, flow.detach())
        by_bin[1].index_add_(0, bins, torch.ones_like(flow))
        return loss, torch.cat([torch.stack([loss, mean, text, keeping]).detach().float(), by_bin.flatten()])

    def _read(self, language: LanguageModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """(conditions [pictures, L, Z], sum of the text's cross-entropies)."""
        shown = [latent for sample in samples for latent in sample.shown]
        sequences = embed(language, [sample.layout for sample in samples], shown)
        rotary = positions(language, sequences.embeds.shape[1], language.dtype)
        hidden = hidden_states(language, sequences.embeds, rotary)
        at, targets = hidden[sequences.learnt], sequences.targets
        text = torch.zeros((), device=self.device)
        for start in range(0, len(targets), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            text = text + text_losses(language.lm_head(at[rows]), targets[rows]).sum()
        conditions = language.condition(hidden[sequences.queries])
        return conditions.view(-1, self.config.tokens, conditions.shape[-1]), text

    def _flow(self, samples: Sequence[Sample], conditions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(flow losses [N], losses of kept pictures [M], times [N]) of all pictures that are drawn, `timesteps` of each."""
        side = self.config.dit.side
        pictures: list[Tensor] = []
        times, dropped, noise = [], [], []
        kept: list[bool] = []
        for sample in samples:
            generator = torch.Generator(self.device).manual_seed(sample.seed)
            for latent in sample.drawn:
                pictures.append(latent)
                kept += [sample.kept] * self.timesteps
                times.append(sample_times(self.timesteps, self.shift, generator, self.device))
                dropped.append(torch.rand(self.timesteps, generator=generator, device=self.device) < self.dropout)
                shape = (self.timesteps, self.config.channels, side, side)
                noise.append(torch.randn(shape, generator=generator, device=self.device))
        none = torch.zeros(0, device=self.device)
        if not pictures:
            return none, none, none
        latents = torch.stack(pictures).to(self.device).float()  # [P, L, C]
        if self.norm_stats is not None:
            mean, std = self.norm_stats
            latents = (latents - mean) / std
        t, noises, without = torch.cat(times), torch.cat(noise), torch.cat(dropped)[:, None, None]
        x = latents.repeat_interleave(self.timesteps, dim=0).transpose(1, 2).reshape(noises.shape)  # [N, C, S, S]
        target = noises - x
        if any(kept):
            rows = torch.tensor(kept, device=self.device).nonzero()[:, 0]
            base = torch.cat([s.condition for s in samples if s.kept and s.condition is not None]).to(self.device)
            with torch.no_grad(), self.base():
                given = self._dropped(base, without[rows])
                target[rows] = self.dit(between(x[rows], t[rows], noises[rows]), t[rows], given)
        velocity: Tensor = self.dit(between(x, t, noises), t, self._dropped(conditions, without))
        losses = (velocity - target).square().mean(dim=(1, 2, 3))
        if not any(kept):
            return losses, none, t
        is_kept = torch.tensor(kept, device=self.device)
        return losses[~is_kept], losses[is_kept], t[~is_kept]

    def _dropped(self, conditions: Tensor, without: Tensor) -> Tensor:
        """Conditions [N, L, Z] per noisy latent, from [P, L, Z]; the null embedding replaces those `without`."""
        conditions = conditions.repeat_interleave(self.timesteps, dim=0)
        null = self.dit.null_condition
        if null is None or not self.dropout:
            return conditions
        return torch.where(without, null.to(conditions.dtype), conditions)
