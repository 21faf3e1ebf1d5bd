"""Rectified flow: time grids, guidance and solvers as plain functions of a velocity function.

x_t = (1 - t) data + t noise and v = noise - data, so dx/dt = v: sampling starts from noise at t = 1 and goes to t = 0.
The state is float32 [B, C, S, S]; `velocity(x, t)` takes it and the time all images share, and returns the same shape.

A solver is one function `(velocity, noise, steps, shift, callback) -> x`; SOLVERS names them. `callback(step, steps, t, x, v)`,
called after each network evaluation with the state before the step, lets a caller show progress or preview the
data estimate x - t v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from scale_rae.options import SOLVERS as NAMES
from scale_rae.options import TRAINING_STEPS

Velocity = Callable[[Tensor, float], Tensor]
StepCallback = Callable[[int, int, float, Tensor, Tensor], None]
Solver = Callable[[Velocity, Tensor, int, float, StepCallback | None], Tensor]


def time_shift(channels: int, tokens: int, base_dim: int) -> float:
    """alpha = sqrt(C L / base_dim): how far the time grid leans to noise for a latent of this size (RAE, §4.2)."""
    return math.sqrt(channels * tokens / base_dim)


def shifted(u: Tensor, shift: float) -> Tensor:
    """t(u) = alpha u / (1 + (alpha - 1) u), elementwise on u in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def official_grid(steps: int, shift: float) -> Tensor:
    """The published sampler's times t_0 < … < t_steps = 1, float64 [steps + 1]: `steps`+1 of the 1000 training times."""
    k = torch.round(torch.arange(steps + 1, dtype=torch.float64) * (TRAINING_STEPS - 1) / steps)
    return shifted((k + 1) / TRAINING_STEPS, shift)


def exact_grid(steps: int, shift: float) -> Tensor:
    """Times from exactly 1 down to exactly 0, float64 [steps + 1], evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def euler(velocity: Velocity, noise: Tensor, steps: int, shift: float, callback: StepCallback | None = None) -> Tensor:
    """The published loop, as published: `steps` evaluations on `official_grid`.

    It starts at the grid's second highest time although x is pure noise, and ends with one more step of the size of
    the first, evaluated there again and taken the wrong way. Published results were made so.
    """
    t = official_grid(steps, shift).tolist()
    last = steps - 1
    moves = [(t[i], t[i - 1] - t[i]) for i in range(last, 0, -1)] + [(t[last], t[last + 1] - t[last])]
    x = noise
    for i, (time, delta) in enumerate(moves):
        v = velocity(x, time)
        if callback:
            callback(i + 1, len(moves), time, x, v)
        x = torch.add(x, v, alpha=delta)  # one kernel
    return x


def heun(velocity: Velocity, noise: Tensor, steps: int, shift: float, callback: StepCallback | None = None) -> Tensor:
    """Heun's second order method on `exact_grid`: 2 steps - 1 evaluations, the last step Euler's (no network at t = 0).

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    t = exact_grid(steps, shift).tolist()
    evaluations, done = 2 * steps - 1, 0
    x = noise
    for now, then in itertools.pairwise(t):
        v = velocity(x, now)
        done += 1
        if callback:
            callback(done, evaluations, now, x, v)
        ahead = x + (then - now) * v
        if then > 0:
            v_then = velocity(ahead, then)
            done += 1
            if callback:
                callback(done, evaluations, then, ahead, v_then)
            ahead = x + (then - now) * 0.5 * (v + v_then)
        x = ahead
    return x


def dpmpp_2m(
    velocity: Velocity, noise: Tensor, steps: int, shift: float, callback: StepCallback | None = None
) -> Tensor:
    """DPM-Solver++(2M) for a flow: second order, one evaluation a step, multistep in data predictions on `exact_grid`.

    With alpha = 1 - t, sigma = t, lambda = log(alpha / sigma), h the step in lambda and D = x - t v the data estimate:
    x' = (sigma' / sigma) x + alpha' (1 - e^-h) D̃, where D̃ extrapolates the last two estimates to the step's middle.
    1 - e^-h equals 1 - (sigma' alpha) / (alpha' sigma), which stays finite at both ends. Source: Lu et al. 2022
    (2211.01095), algorithm 2.
    """
    t = exact_grid(steps, shift).tolist()
    x, previous = noise, None
    previous_h = math.inf
    for i, (now, then) in enumerate(itertools.pairwise(t)):
        v = velocity(x, now)
        if callback:
            callback(i + 1, steps, now, x, v)
        data = x - now * v
        estimate = data
        h = math.inf if now == 1 or then == 0 else math.log((1 - then) / then) - math.log((1 - now) / now)
        if previous is not None and math.isfinite(h) and math.isfinite(previous_h):
            estimate = data + (h / (2 * previous_h)) * (data - previous)
        x = (then / now) * x + ((1 - then) - then * (1 - now) / now) * estimate
        previous, previous_h = data, h
    return x


def ab2(velocity: Velocity, noise: Tensor, steps: int, shift: float, callback: StepCallback | None = None) -> Tensor:
    """Adams-Bashforth of second order in v: one evaluation a step, multistep on `exact_grid`, first step Euler's.

    With d the step and d₀ the one before: x' = x + d (v + d / (2 d₀) (v - v₀)). Made for flows in that a straight path
    has constant v, which it follows exactly. Source: any text on linear multistep methods, with variable steps.
    """
    t = exact_grid(steps, shift).tolist()
    x, previous, previous_d = noise, None, 1.0
    for i, (now, then) in enumerate(itertools.pairwise(t)):
        v = velocity(x, now)
        if callback:
            callback(i + 1, steps, now, x, v)
        d = then - now
        x = x + d * (v if previous is None else v + d / (2 * previous_d) * (v - previous))
        previous, previous_d = v, d
    return x


SOLVERS: dict[str, Solver] = dict(zip(NAMES, (euler, heun, dpmpp_2m, ab2), strict=True))


def evaluation_times(solver: str, steps: int, shift: float) -> tuple[float, ...]:
    """The times at which a solver evaluates the velocity, in order."""
    return _evaluation_times(SOLVERS[solver], steps, shift)


@lru_cache
def _evaluation_times(solver: Solver, steps: int, shift: float) -> tuple[float, ...]:
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    solver(velocity, torch.zeros(1, 1, 1, 1, device="cpu"), steps, shift, None)
    return tuple(times)


def guided(
    conditional: Velocity,
    null: Velocity,
    guidance: float,
    interval: tuple[float, float] = (0.0, 1.0),
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = None,
) -> Velocity:
    """Classifier-free guidance: v_null + g (v_cond - v_null) where t is in [lo, hi], v_cond elsewhere.

    At g = 1 and outside the interval the null branch is not evaluated, at g = 0 the conditional one is not. `both` gives
    (v_cond, v_null) together where that costs less than one after the other.
    Source of the interval: Kynkäänniemi et al. 2024 (2404.07724).
    """
    if guidance == 1.0:
        return conditional
    lo, hi = interval

    def velocity(x: Tensor, t: float) -> Tensor:
        if not lo <= t <= hi:
            return conditional(x, t)
        if guidance == 0.0:
            return null(x, t)
        v_cond, v_null = both(x, t) if both else (conditional(x, t), null(x, t))
        return v_null + guidance * (v_cond - v_null)

    return velocity
