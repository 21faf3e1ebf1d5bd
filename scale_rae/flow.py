"""Rectified flow: schedules, guidance and solvers as plain functions of a velocity function.

x_t = (1 - t) data + t noise and v = noise - data, so dx/dt = v: sampling starts from noise at t = 1 and goes to t = 0.
The state is float32 [B, C, S, S]; `velocity(x, t)` takes it and the time all images share, and returns the same shape.

A schedule is a function `(steps, shift) -> times`, where `times` has the (from, to) times of each step. A solver is a function
`(velocity, x, now, then, memory) -> (x, memory)` that takes one step; `memory` is what a multistep solver keeps from the step
before, None at the first. SAMPLERS names the pairs of solver and schedule that can be chosen. `solve` takes all steps, and
`advance` some of them, so that images can be looked at on their way, and dropped.

`callback(evaluation, evaluations, t, x, v)`, called after each network evaluation with the state that was evaluated, lets a
caller show progress or preview the data estimate x - t v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scale_rae.errors import OptionError
from scale_rae.options import TRAINING_STEPS

Velocity = Callable[[Tensor, float], Tensor]
StepCallback = Callable[[int, int, float, Tensor, Tensor], None]
Times = Sequence[tuple[float, float]]  # (from, to) of each step
# Of a multistep solver: values like x of the step before, and a number that all images share.
Memory = tuple[Tensor, float] | None
Solver = Callable[[Velocity, Tensor, float, float, Memory], tuple[Tensor, Memory]]

USUAL_LOOK = 0.65  # u


def time_shift(channels: int, tokens: int, base_dim: int) -> float:
    """alpha = sqrt(C L / base_dim): how far the time grid leans to noise for a latent of this size (RAE, §4.2)."""
    return math.sqrt(channels * tokens / base_dim)


def shifted(u: Tensor, shift: float) -> Tensor:
    """t(u) = alpha u / (1 + (alpha - 1) u), elementwise on u in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


# --- schedules -------------------------------------------------------------------------------------------------------


def official_grid(steps: int, shift: float) -> Tensor:
    """The published sampler's times t_0 < … < t_steps = 1, float64 [steps + 1]: `steps`+1 of the 1000 training times."""
    k = torch.round(torch.arange(steps + 1, dtype=torch.float64) * (TRAINING_STEPS - 1) / steps)
    return shifted((k + 1) / TRAINING_STEPS, shift)


def official_times(steps: int, shift: float) -> Times:
    """The steps of the published loop on `official_grid`, as published.

    They start at the grid's second highest time although x is pure noise. The last one is an odd one: it starts at that time
    once more and goes the wrong way, to t = 1. Published results were made so.
    """
    t = official_grid(steps, shift).tolist()
    return [*itertools.pairwise(reversed(t[:-1])), (t[-2], t[-1])]


def exact_grid(steps: int, shift: float) -> Tensor:
    """Times from exactly 1 down to exactly 0, float64 [steps + 1], evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def exact_times(steps: int, shift: float) -> Times:
    """The steps between neighbours of `exact_grid`."""
    return list(itertools.pairwise(exact_grid(steps, shift).tolist()))


# --- solvers ---------------------------------------------------------------------------------------------------------


def euler(velocity: Velocity, x: Tensor, now: float, then: float, memory: Memory = None) -> tuple[Tensor, Memory]:
    """Euler's method: x' = x + (t' - t) v."""
    return torch.add(x, velocity(x, now), alpha=then - now), None  # one kernel


def heun(velocity: Velocity, x: Tensor, now: float, then: float, memory: Memory = None) -> tuple[Tensor, Memory]:
    """Heun's second order method: two evaluations a step, but one in a step that ends at t = 0, which is Euler's.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    v = velocity(x, now)
    ahead = x + (then - now) * v
    if then > 0:
        v_then = velocity(ahead, then)
        ahead = x + (then - now) * 0.5 * (v + v_then)
    return ahead, None


def dpmpp_2m(velocity: Velocity, x: Tensor, now: float, then: float, memory: Memory = None) -> tuple[Tensor, Memory]:
    """DPM-Solver++(2M) for a flow: second order, one evaluation a step, multistep in data predictions.

    With alpha = 1 - t, sigma = t, lambda = log(alpha / sigma), h the step in lambda and D = x - t v the data estimate:
    x' = (sigma' / sigma) x + alpha' (1 - e^-h) D̃, where D̃ extrapolates the last two estimates to the step's middle.
    1 - e^-h equals 1 - (sigma' alpha) / (alpha' sigma), which stays finite at both ends. The memory is (D, h). Source: Lu et
    al. 2022 (2211.01095), algorithm 2.
    """
    data = x - now * velocity(x, now)
    estimate = data
    h = math.inf if now == 1 or then == 0 else math.log((1 - then) / then) - math.log((1 - now) / now)
    if memory is not None and math.isfinite(h) and math.isfinite(memory[1]):
        previous, previous_h = memory
        estimate = data + (h / (2 * previous_h)) * (data - previous)
    return (then / now) * x + ((1 - then) - then * (1 - now) / now) * estimate, (data, h)


def ab2(velocity: Velocity, x: Tensor, now: float, then: float, memory: Memory = None) -> tuple[Tensor, Memory]:
    """Adams-Bashforth of second order in v: one evaluation a step, multistep, first step Euler's.

    With d the step and d₀ the one before: x' = x + d (v + d / (2 d₀) (v - v₀)). A straight path, whose v is constant, is
    followed exactly. The memory is (v, d). Source: any text on linear multistep methods, with variable steps.
    """
    v, d = velocity(x, now), then - now
    if memory is None:
        return x + d * v, (v, d)
    previous, previous_d = memory
    return x + d * (v + d / (2 * previous_d) * (v - previous)), (v, d)


def starts(times: Times) -> list[float]:
    """The times at which a solver with one evaluation a step evaluates the velocity, in order."""
    return [now for now, _ in times]


def starts_and_ends(times: Times) -> list[float]:
    """The times at which `heun` evaluates the velocity, in order."""
    return [t for now, then in times for t in ((now, then) if then > 0 else (now,))]


class State(NamedTuple):
    """Images between two steps: x [B, C, S, S], the solver's memory, and how many steps were taken."""

    x: Tensor
    memory: Memory = None
    steps: int = 0

    def __repr__(self) -> str:
        return f"State(x {list(self.x.shape)}, {self.steps} steps)"


def joined(states: Sequence[State]) -> State:
    """Images that took equally many steps as one batch."""
    memories = [state.memory for state in states if state.memory is not None]
    memory = (torch.cat([values for values, _ in memories]), memories[0][1]) if memories else None
    return State(torch.cat([state.x for state in states]), memory, states[0].steps)


def parted(state: State) -> list[State]:
    """The images of a batch, one each: the opposite of `joined`."""
    rows = [slice(i, i + 1) for i in range(len(state.x))]
    if state.memory is None:
        return [State(state.x[row], None, state.steps) for row in rows]
    values, number = state.memory
    return [State(state.x[row], (values[row], number), state.steps) for row in rows]


class Sampler(NamedTuple):
    """A solver, the schedule that goes with it, and at which of a schedule's times it evaluates the velocity."""

    solver: Solver
    schedule: Callable[[int, float], Times]
    evaluated: Callable[[Times], list[float]] = starts


SAMPLERS = {
    "euler": Sampler(euler, official_times),
    "heun": Sampler(heun, exact_times, starts_and_ends),
    "dpmpp_2m": Sampler(dpmpp_2m, exact_times),
    "ab2": Sampler(ab2, exact_times),
}


def evaluation_times(name: str, steps: int, shift: float) -> list[float]:
    """The times at which the sampler called `name` evaluates the velocity, in order."""
    sampler = SAMPLERS[name]
    return sampler.evaluated(sampler.schedule(steps, shift))


def usual_look(shift: float) -> float:
    """The default t, to two digits, of the look at a half-formed image, for a network with this shift.

    At the same u (t before the shift), images of all sizes are equally far formed; this is the purpose of the shift
    (RAE, §4.2). The u was chosen on the bundled model, where t is 0.84: the 8th of 20 evaluations.
    """
    return round(shift * USUAL_LOOK / (1 + (shift - 1) * USUAL_LOOK), 2)


def look_times(name: str, times: Times) -> list[float]:
    """The times, falling, at which a half-formed image can be looked at: of the last evaluation in each step but the last."""
    return [SAMPLERS[name].evaluated(times[:steps])[-1] for steps in range(1, len(times))]


def steps_until(name: str, times: Times, t: float) -> int:
    """How many steps of the sampler called `name` end with the evaluation whose time is nearest to t, not the last step.

    Raises:
        OptionError: when there is but one step, or all but the last are over before t.
    """
    ends = look_times(name, times)
    if not ends:
        raise OptionError(f"--check-at {t:g}: a sampler of one step has nothing to look at on the way; leave it out")
    if t < ends[-1]:
        raise OptionError(
            f"--check-at {t:g}: later than the last step but one, which evaluates at t = {ends[-1]:.3g}; choose a larger t"
        )
    return 1 + min(range(len(ends)), key=lambda i: abs(ends[i] - t))


def advance(
    sampler: Sampler, velocity: Velocity, state: State, times: Times, stop: int, callback: StepCallback | None = None
) -> State:
    """The state after `stop` of the steps `times`."""
    evaluations, done = len(sampler.evaluated(times)), len(sampler.evaluated(times[: state.steps]))

    def heard(x: Tensor, t: float) -> Tensor:
        nonlocal done
        v = velocity(x, t)
        done += 1
        if callback:
            callback(done, evaluations, t, x, v)
        return v

    x, memory = state.x, state.memory
    for now, then in times[state.steps : stop]:
        x, memory = sampler.solver(heard, x, now, then, memory)
    return State(x, memory, stop)


def solve(
    sampler: Sampler, velocity: Velocity, noise: Tensor, times: Times, callback: StepCallback | None = None
) -> Tensor:
    """The data x [B, C, S, S] that noise becomes by all steps of `times`."""
    return advance(sampler, velocity, State(noise), times, len(times), callback).x


# --- guidance --------------------------------------------------------------------------------------------------------


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
