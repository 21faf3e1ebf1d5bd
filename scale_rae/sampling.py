"""From conditions and noise seeds to latents: a batch is sampled by the DiT as it runs fast."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.compiling import CompilePolicy
from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT, flops
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.fast_dit import FastDiT
from scale_rae.noise import draw_noise
from scale_rae.options import SamplingOptions, Speed

NormStats = tuple[Tensor, Tensor]  # (mean, std), each float32 broadcastable to [L, C]


class LatentSampler:
    """Samples latents with a DiT on its device; `speed` chooses how the network runs.

    `fast_dit` is the network, and `policy` decides which batches compiled code draws.
    """

    def __init__(self, config: ScaleRAEConfig, dit: DiT, norm_stats: NormStats | None, speed: Speed) -> None:
        self.config, self.dit, self.norm_stats, self.speed = config, dit, norm_stats, speed
        self.device = dit.pos_embed.device
        self.fast_dit = FastDiT(dit, speed)
        self.policy = CompilePolicy(speed.compile, flops(config.dit), self.device.type == "cuda")

    def with_speed(self, speed: Speed) -> LatentSampler:
        """The same sampler, sharing its weights, with other choices of `speed`."""
        other = copy.copy(self)
        other.speed, other.policy = speed, self.policy.with_choice(speed.compile)
        if not speed.same_network(self.speed):
            other.fast_dit = FastDiT(self.dit, speed)
        return other

    def check(self, options: SamplingOptions, seeds: Sequence[int] = ()) -> None:
        """Raises InputError for options or seeds that this network cannot use."""
        options.check()
        if options.guidance != 1.0 and not self.config.dit.null_condition:
            raise InputError(
                f"guidance level {options.guidance}: this checkpoint was trained without condition dropout "
                "(diffusion_class_dropout_prob 0) and has no null embedding; only 1.0 works"
            )
        for seed in seeds:
            if not -(2**63) <= seed < 2**64:  # the range of torch's generators
                raise InputError(f"seed {seed}: must be at least -2^63 and below 2^64")

    def whole_prompts(self, conditions: Sequence[Tensor], size: int) -> int:
        """The largest batch size, at most `size`, with which each batch has equally many images of each prompt."""
        images = self._images_per_prompt(conditions)
        return size - size % images if 1 < images < size else size

    def draw(
        self,
        conditions: Sequence[Tensor],
        seeds: Sequence[int],
        options: SamplingOptions,
        callback: flow.StepCallback | None = None,
        compile: bool | None = None,
    ) -> list[Tensor]:
        """Latents [L, C] of one batch: conditions [L, Z] and one noise seed each. `compile` None asks `policy`."""
        # Images that share a condition share its modulations.
        shared = torch.stack(list(conditions[:: self._images_per_prompt(conditions)]))
        latents = list(self.sample_batch(shared, seeds, options, callback, compile).unbind())
        self.policy.count(len(latents), len(shared))
        return latents

    def _images_per_prompt(self, conditions: Sequence[Tensor]) -> int:
        """How many times in a row each condition occurs (the very same tensor); 1 where that number varies."""
        if not self.speed.shared:
            return 1
        counts = {len(list(run)) for _, run in groupby(conditions, id)}
        return counts.pop() if len(counts) == 1 else 1

    @torch.inference_mode()
    def sample_batch(
        self,
        condition: Tensor,
        seeds: Sequence[int],
        options: SamplingOptions,
        callback: flow.StepCallback | None,
        compile: bool | None,
    ) -> Tensor:
        """Latents [B, L, C] of conditions [P, L, Z], with B / P consecutive seeds per condition."""
        config = self.config
        noise = draw_noise(seeds, config.channels, config.dit.side, self.device)
        shift = flow.time_shift(config.channels, config.tokens, config.base_dim)
        sampler = flow.SAMPLERS[options.solver]
        times = sampler.schedule(options.steps, shift)
        evaluated = sampler.evaluated(times)
        guided = options.guidance != 1.0
        if compile is None:
            is_compiled = self.fast_dit.is_compiled(len(seeds), guided, len(condition))
            compile = self.policy.compiles(len(seeds), len(condition), len(evaluated), is_compiled)
        conditional, null, both = self.fast_dit.velocities(condition, evaluated, guided, compile)
        velocity = flow.guided(conditional, null, options.guidance, options.interval or (0.0, 1.0), both)
        latents = self.latents(flow.solve(sampler, velocity, noise(), times, callback))
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        for seed, is_finite in zip(seeds, finite, strict=True):
            if not is_finite:
                raise ScaleRAEError(
                    f"the image of seed {seed} came out with values that are not finite; try --dtype float32"
                )
        return latents.cpu()

    def latents(self, x: Tensor) -> Tensor:
        """Latents [B, L, C] float32 of sampled states [B, C, S, S]."""
        latents = x.flatten(2).transpose(1, 2)
        if self.norm_stats is not None:
            mean, std = self.norm_stats
            latents = latents * std + mean
        return latents.float()
