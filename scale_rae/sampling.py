"""From conditions, noise seeds and SamplingOptions to latents: a batch is sampled by the DiT as it runs fast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.compiling import CompilePolicy
from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.fast_dit import FastDiT
from scale_rae.footprint import flops
from scale_rae.noise import check_noise, draw_noise
from scale_rae.options import SamplingOptions, Speed, with_values
from scale_rae.residency import Residency
from scale_rae.student import own_options
from scale_rae.toolchain import can_compile, check_compile

LEAST_SHARED = 4  # consecutive images per prompt; in searches, images of fewer name their prompts by number
NormStats = tuple[Tensor, Tensor]  # (mean, std), each float32 broadcastable to [L, C]


@dataclass(frozen=True)
class Trajectory:
    """One image on its way from noise to its latent. `advance` takes it further.

    `state` is None before the first step, and the noise is then drawn from the seed; a state of no steps holds other noise.
    `latent` [L, C] is what the state is on its way to, by its last evaluation; after the last step it is the image's latent.
    """

    condition: Tensor  # [L, Z]
    seed: int
    state: flow.State | None = None
    latent: Tensor | None = None

    def __repr__(self) -> str:
        return f"Trajectory(seed {self.seed}, {0 if self.state is None else self.state.steps} steps)"


def sampler_times(config: ScaleRAEConfig, options: SamplingOptions) -> flow.Times:
    """The (from, to) times of the sampler's steps for latents of a model with this config."""
    if config.student is not None:
        return config.student.windows
    shift = flow.time_shift(config.channels, config.tokens, config.base_dim)
    return flow.SAMPLERS[options.solver].schedule(options.steps, shift)


def branches(config: ScaleRAEConfig, options: SamplingOptions) -> int:
    """Passes per evaluation: 2 with guidance, whose null branch is evaluated too; a student has guidance folded in."""
    return 1 if config.student is not None or options.guidance in (0.0, 1.0) else 2


class LatentSampler:
    """Samples latents with a DiT on its device; `speed` chooses how the network runs.

    `fast_dit` is the network, and `policy` decides which batches compiled code draws.
    """

    def __init__(
        self,
        config: ScaleRAEConfig,
        dit: DiT,
        norm_stats: NormStats | None,
        speed: Speed,
        residency: Residency | None = None,
    ) -> None:
        self.config, self.dit, self.norm_stats, self.speed = config, dit, norm_stats, speed
        self.device = dit.pos_embed.device
        check_compile(speed.compile, self.device)
        self.fast_dit = FastDiT(dit, speed, residency)
        self.policy = CompilePolicy(speed.compile, flops(config.dit), can_compile(self.device))

    def with_speed(self, speed: Speed) -> LatentSampler:
        """The same sampler, sharing its weights, with other choices of `speed`.

        Raises:
            DeviceError: when it is to be compiled, and what that needs is missing.
        """
        check_compile(speed.compile, self.device)
        other = copy.copy(self)
        other.speed, other.policy = speed, self.policy.with_choice(speed.compile)
        if not speed.same_network(self.speed):
            other.fast_dit = FastDiT(self.dit, speed)
        return other

    def check(self, options: SamplingOptions, seeds: Sequence[int] = ()) -> None:
        """Raises InputError for options or seeds that this network cannot use, DeviceError for noise that no GPU draws here."""
        if self.config.student is None:
            options.check()
        else:
            self.config.student.sampling(options)
        check_noise(options.noise)
        if self.config.student is None and options.guidance != 1.0 and not self.config.dit.null_condition:
            raise InputError(
                f"guidance level {options.guidance}: this checkpoint was trained without condition dropout "
                "(diffusion_class_dropout_prob 0) and has no null embedding; only 1.0 works"
            )
        for seed in seeds:
            if not -(2**63) <= seed < 2**64:  # the range of torch's generators
                raise InputError(f"seed {seed}: must be at least -2^63 and below 2^64")

    def chosen(self, options: SamplingOptions | None) -> SamplingOptions:
        """The options, by default the sampler's; for a student, its own steps, guidance and solver.

        Raises:
            OptionError: for an option that differs from its default and from what the student takes.
        """
        return own_options(self.config.student, options or SamplingOptions())

    def called_with(
        self,
        guidance: float | None,
        interval: tuple[float, float] | None,
        steps: int | None,
        solver: str | None,
    ) -> SamplingOptions:
        """The options of a call, in which None is an option's default; for a student, its own values.

        Raises:
            OptionError: for an option that is given, even with its default, and that the student does not take.
        """
        values = {"guidance_level": guidance, "guidance_interval": interval, "steps": steps, "solver": solver}
        given = {name: value for name, value in values.items() if value is not None}
        return own_options(self.config.student, with_values(SamplingOptions(), given), given)

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
        noise = self._noise(seeds, options)
        times = self.times(options)
        velocity = self._velocity(
            condition, len(seeds), options, flow.SAMPLERS[options.solver].evaluated(times), compile
        )
        x = flow.solve(flow.SAMPLERS[options.solver], velocity, noise(), times, callback)
        return self._finished(x, seeds)

    def times(self, options: SamplingOptions) -> flow.Times:
        """The (from, to) times of the sampler's steps for latents of this network."""
        return sampler_times(self.config, options)

    @torch.inference_mode()
    def advance(
        self,
        trajectories: Sequence[Trajectory],
        stop: int,
        options: SamplingOptions,
        callback: flow.StepCallback | None = None,
        compile: bool | None = None,
    ) -> list[Trajectory]:
        """The trajectories after `stop` steps, each with the latent that it is on its way to. All have taken equally many.

        Raises:
            ScaleRAEError: when a latent is not finite.
        """
        wanted, trajectories = len(trajectories), self._padded(trajectories)
        sampler, times = flow.SAMPLERS[options.solver], self.times(options)
        seeds = [t.seed for t in trajectories]
        states = [t.state for t in trajectories if t.state is not None]
        assert len({t.state and t.state.steps for t in trajectories}) == 1, (
            "equally many steps, and given noise for all or none"
        )
        state = flow.joined(states) if states else flow.State(self._noise(seeds, options)())
        conditions = [t.condition for t in trajectories]
        shared, prompt_of = self._prompts(conditions)
        # All of the sampler's times, as when it does not stop: on a CPU, bits of a time's embedding depend on their number.
        velocity = self._velocity(shared, len(seeds), options, sampler.evaluated(times), compile, prompt_of)
        last = 0.0, state.x, state.x  # evaluation: t, x, v

        def see(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
            nonlocal last
            last = t, x, v
            if callback:
                callback(evaluation, evaluations, t, x, v)

        state = flow.advance(sampler, velocity, state, times, stop, see)
        t, x, v = last
        latents = self._finished(state.x if stop == len(times) else x - t * v, seeds)
        self.policy.count(len(seeds), len(shared))
        parts = zip(trajectories, flow.parted(state), latents.unbind(), strict=True)
        return [replace(trajectory, state=part, latent=latent) for trajectory, part, latent in parts][:wanted]

    def _padded(self, trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
        """As many as one of few sizes, where CUDA graphs are captured per size; the last one is repeated.

        The sizes are powers of two and, between them, three quarters of those.
        """
        if not self.has_few_sizes:
            return trajectories
        size = 1 << (len(trajectories) - 1).bit_length()
        if len(trajectories) <= size * 3 // 4:
            size = size * 3 // 4
        return [*trajectories, *[trajectories[-1]] * (size - len(trajectories))]

    @property
    def has_few_sizes(self) -> bool:
        """Whether batches on their way are padded to few sizes, as they are where CUDA graphs are captured per size."""
        return self.device.type == "cuda" and self.speed.graph

    def _prompts(self, conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(conditions [P, L, Z], number of each image's prompt [B]) of images of several prompts; without numbers, P = B.

        Each prompt's condition is there once, and the last one is repeated until P is a quarter or a half of B, so that few
        sizes are captured.
        """
        images = self._images_per_prompt(conditions)
        if images >= LEAST_SHARED:
            return torch.stack(list(conditions[::images])), None
        own = {id(condition): condition for condition in conditions}
        if self.speed.shared and self.has_few_sizes:
            for size in (len(conditions) // 4, len(conditions) // 2):
                if len(own) <= size:
                    number = {key: i for i, key in enumerate(own)}
                    padded = [*own.values(), *[conditions[-1]] * (size - len(own))]
                    return torch.stack(padded), torch.tensor([number[id(c)] for c in conditions])
        return torch.stack(list(conditions)), None

    def _noise(self, seeds: Sequence[int], options: SamplingOptions) -> Callable[[], Tensor]:
        return draw_noise(seeds, self.config.channels, self.config.dit.side, self.device, options.noise)

    def _velocity(
        self,
        condition: Tensor,
        images: int,
        options: SamplingOptions,
        evaluated: Sequence[float],
        compile: bool | None,
        prompt_of: Tensor | None = None,
    ) -> flow.Velocity:
        """The guided velocity of a batch of images, for the times at which it will be evaluated."""
        guided = self.config.student is None and options.guidance != 1.0
        if compile is None:
            is_compiled = self.fast_dit.is_compiled(images, guided, len(condition))
            compile = self.policy.compiles(images, len(condition), len(evaluated), is_compiled)
        conditional, null, both = self.fast_dit.velocities(condition, evaluated, guided, compile, prompt_of)
        if not guided:
            return conditional
        return flow.guided(conditional, null, options.guidance, options.interval or (0.0, 1.0), both)

    def _finished(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Latents [B, L, C] on the CPU of sampled states [B, C, S, S], one seed each.

        Raises:
            ScaleRAEError: when one is not finite.
        """
        latents = self.latents(x)
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
