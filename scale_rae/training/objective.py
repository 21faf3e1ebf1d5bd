"""The loss of a batch, of fine-tuning and of self-reward, and numbers to log.

A new objective is a class with the same methods. `FineTune` learns from records, `SelfReward` from the model's own drawings and
what it makes of them.

A batch's loss is divided by the totals of the whole step, so the result does not depend on the number of devices or of parts of
the step. All random numbers come from the samples' own seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.language import LanguageModel
from scale_rae.sampling import NormStats
from scale_rae.training.batches import Counts, Sample, Scored, embed
from scale_rae.training.losses import (
    FLOW_WEIGHT,
    between,
    flow_errors,
    normalised,
    sample_times,
    text_losses,
    training_shift,
)
from scale_rae.training.optim import FlatModel
from scale_rae.training.passes import read

BINS = 10  # of t, in which the flow loss is logged
LEAST_ERROR = 1e-4  # that a squared error is divided by
_LOGIT_ROWS = 2048  # of a [rows, vocabulary] block of logits


@dataclass(frozen=True)
class Totals:
    """What a whole step has, over all devices: pictures (and those of them that are kept), tokens."""

    pictures: int
    tokens: int
    kept: int


B = TypeVar("B", contravariant=True)


class Objective(Protocol[B]):
    """What a trainer minimises."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the sums to log; the first is the loss."""

    def record(self, sums: Sequence[float], steps: int) -> dict[str, Any]:
        """What the log has of the sums of `steps` steps."""

    def totals(self, records: Sequence[Counts]) -> Totals:
        """The totals of a step whose records have these counts."""

    def __call__(self, batch: B, totals: Totals, /) -> tuple[Tensor, Tensor]:
        """(loss [], sums to log [len(names)]) of a part of a step; both are summed over the parts."""


class _Noisy(NamedTuple):
    """N latents, and the noise that each is mixed with."""

    x: Tensor  # [N, C, S, S], normalised
    t: Tensor  # [N]
    noise: Tensor  # [N, C, S, S]
    without: Tensor  # [N, 1, 1] bool: the null embedding replaces the condition
    kept: list[bool]  # [N], on the host


class FineTune:
    """The official loss: 2 · flow loss + cross-entropy of the text.

    Without a language model that learns, it is the flow loss. The target of kept samples is the base model's velocity for its
    own condition, instead of noise - x.
    """

    names = ("loss", "flow", "text", "kept", *(f"flow {i}" for i in range(BINS)), *(f"count {i}" for i in range(BINS)))
    """The step's loss and what it has of flow, text and kept records; sums and numbers of flow losses by bin of t."""

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
        """`dropout` is how often the null embedding replaces a condition.

        `timesteps` are the noisy latents of each picture. Within `base()`, the networks compute as before training.
        """
        self.kept_weight, self.base = kept_weight, base
        self.config, self.language, self.dit, self.norm_stats = config, language, dit, norm_stats
        self.dropout = dropout if config.dit.null_condition else 0.0
        self.timesteps = timesteps
        self.shift = training_shift(config)
        self.device = dit.pos_embed.device

    def record(self, sums: Sequence[float], steps: int) -> dict[str, Any]:
        """The means of `steps` steps' numbers; "flow_by_t" by tenths of t, None where none was drawn."""
        values = dict(zip(self.names, sums, strict=True))
        flow = [values[f"flow {i}"] for i in range(BINS)]
        count = [values[f"count {i}"] for i in range(BINS)]
        return {
            "loss": round(values["loss"] / steps, 6),
            "flow": round(values["flow"] / steps, 6),
            "text": round(values["text"] / steps, 6),
            "kept": round(values["kept"] / steps, 6),
            "flow_by_t": [round(f / n, 6) if n else None for f, n in zip(flow, count, strict=True)],
        }

    def totals(self, records: Sequence[Counts]) -> Totals:
        pictures = sum(record.pictures for record in records) * self.timesteps
        kept = sum(record.pictures for record in records if record.kept) * self.timesteps
        return Totals(pictures, sum(record.tokens for record in records), kept)

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
        embedded = embed(language, [sample.sequence for sample in samples], shown)
        hidden = read(language, embedded.embeds)
        at, targets = hidden[embedded.learnt], embedded.targets
        text = torch.zeros((), device=self.device)
        for start in range(0, len(targets), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            text = text + text_losses(language.lm_head(at[rows]), targets[rows]).sum()
        conditions = language.condition(hidden[embedded.queries])
        return conditions.view(-1, self.config.tokens, conditions.shape[-1]), text

    def _flow(self, samples: Sequence[Sample], conditions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(flow losses [N], losses of kept pictures [M], times [N]), `timesteps` of each picture."""
        none = torch.zeros(0, device=self.device)
        if not any(sample.drawn for sample in samples):
            return none, none, none
        x, t, noise, without, kept = self._noisy(samples)
        target = noise - x
        if any(kept):
            rows = torch.tensor(kept, device=self.device).nonzero()[:, 0]
            base = torch.cat([s.condition for s in samples if s.kept and s.condition is not None]).to(self.device)
            with torch.no_grad(), self.base():
                given = self._dropped(base, without[rows])
                target[rows] = self.dit(between(x[rows], t[rows], noise[rows]), t[rows], given)
        given = self._dropped(conditions, without)
        losses = flow_errors(self.dit, x, given, t, noise, target).mean(dim=(1, 2, 3))
        if not any(kept):
            return losses, none, t
        is_kept = torch.tensor(kept, device=self.device)
        return losses[~is_kept], losses[is_kept], t[~is_kept]

    def _noisy(self, samples: Sequence[Sample]) -> _Noisy:
        """The pictures that samples draw, `timesteps` times each, and what is random about each time."""
        side, count = self.config.dit.side, self.timesteps
        pictures: list[Tensor] = []
        times, dropped, noise = [], [], []
        kept: list[bool] = []
        for sample in samples:
            generator = torch.Generator(self.device).manual_seed(sample.seed)
            for latent in sample.drawn:
                pictures.append(latent)
                kept += [sample.kept] * count
                times.append(sample_times(count, self.shift, generator, self.device))
                dropped.append(torch.rand(count, generator=generator, device=self.device) < self.dropout)
                shape = (count, self.config.channels, side, side)
                noise.append(torch.randn(shape, generator=generator, device=self.device))
        x = normalised(torch.stack(pictures).to(self.device), self.norm_stats).repeat_interleave(count, dim=0)
        return _Noisy(x, torch.cat(times), torch.cat(noise), torch.cat(dropped)[:, None, None], kept)

    def _dropped(self, conditions: Tensor, without: Tensor) -> Tensor:
        """Conditions [N, L, Z] per noisy latent, from [P, L, Z]; the null embedding replaces those `without`."""
        conditions = conditions.repeat_interleave(self.timesteps, dim=0)
        null = self.dit.null_condition
        if null is None or not self.dropout:
            return conditions
        return torch.where(without, null.to(conditions.dtype), conditions)


class SelfReward:
    """DiffusionNFT's loss on the model's own drawings: from the worse of a prompt to the better.

    At x_t of a drawing x of the policy before (`old`), with target v = noise - x and the two velocities
    v+ = (1 - β) v_old + β v_θ and v- = (1 + β) v_old - β v_θ, the loss is r |v+ - v|² + (1 - r) |v- - v|², where r is the drawing's
    optimality. Each square is divided by its own mean error and multiplied by t, which is the paper's self-normalised error of the
    data estimate. Where a batch folds guidance in, the target is the guided velocity of the model before training (`start`). The
    null embedding's velocity stays that of `start`, so that guidance keeps working.

    Source: Zheng et al. 2025 (2509.16117), equations 5 and 6 and appendix; no guidance and no stochastic solver is needed.
    """

    names = ("loss", "policy", "null", "distance")
    """The step's loss, what it has of drawings and of null embeddings; mean square distance to the velocity of `start`."""

    def __init__(
        self, dit: DiT, model: FlatModel, start: Tensor, old: Tensor, beta: float, kl_weight: float, guidance: float
    ) -> None:
        """`start` and `old` are weights in the order of `model`'s buffer; `old` may change in place.

        `guidance` is what is folded in.
        """
        self.dit, self.model, self.start, self.old = dit, model, start, old
        self.beta, self.kl_weight, self.guidance = beta, kl_weight, guidance

    def record(self, sums: Sequence[float], steps: int) -> dict[str, Any]:
        """The means of `steps` steps' numbers."""
        return {name: round(value / steps, 6) for name, value in zip(self.names, sums, strict=True)}

    def totals(self, records: Sequence[Counts]) -> Totals:
        return Totals(len(records), 0, 0)

    def __call__(self, batch: Scored, totals: Totals) -> tuple[Tensor, Tensor]:
        x_t, t, target = between(batch.x, batch.t, batch.noise), batch.t, batch.noise - batch.x
        given, null = batch.conditions, self.dit.null_condition
        if null is not None:
            given = torch.where(batch.dropped[:, None, None], null.detach().to(given.dtype), given)
        with torch.no_grad(), self.model.using(self.start):
            start = self.dit(x_t, t, given)
            if batch.folds:
                assert null is not None
                without = self.dit(x_t, t, null.to(given.dtype).expand_as(given))
                target = without + self.guidance * (start - without)
        if batch.folds:
            velocity = self.dit(x_t, t, given)
            losses = (velocity - target).square().mean(dim=(1, 2, 3))
        else:
            with torch.no_grad(), self.model.using(self.old):
                old = self.dit(x_t, t, given)
            velocity = self.dit(x_t, t, given)
            losses = self._improving(velocity, old, target, batch)
        distance = (velocity - start).square().mean(dim=(1, 2, 3))
        dropped = batch.dropped.float()
        policy = ((1 - dropped) * (losses + self.kl_weight * distance)).sum() / totals.pictures
        kept = (dropped * distance).sum() / totals.pictures
        far = ((1 - dropped) * distance).sum() / totals.pictures
        loss = policy + kept
        return loss, torch.stack([loss, policy, kept, far]).detach().float()

    def _improving(self, velocity: Tensor, old: Tensor, target: Tensor, batch: Scored) -> Tensor:
        """DiffusionNFT's losses [B]."""
        better = (1 - self.beta) * old + self.beta * velocity
        worse = (1 + self.beta) * old - self.beta * velocity
        to_better, to_worse = (_normalised(v - target, batch.t) for v in (better, worse))
        return (batch.optimality * to_better + (1 - batch.optimality) * to_worse) / self.beta


def _normalised(error: Tensor, t: Tensor) -> Tensor:
    """t · mean(error²) / mean(|error|) [B] of errors [B, C, S, S], without a gradient of the divisor."""
    scale = error.detach().abs().mean(dim=(1, 2, 3)).clamp(min=LEAST_ERROR)
    return t * error.square().mean(dim=(1, 2, 3)) / scale
