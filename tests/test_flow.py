"""Solvers against flows whose solution is known, guidance as a formula, and options no sampler can use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scale_rae import flow, options
from scale_rae.errors import InputError
from scale_rae.flow import ab2, dpmpp_2m, euler, exact_grid, exact_times, guided, heun, official_grid
from scale_rae.options import SamplingOptions

MEAN, SPREAD = 1.5, 0.3
NOISE = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).view(1, 1, 1, 41)


def gaussian(x: Tensor, t: float) -> Tensor:
    """The velocity when data are N(MEAN, SPREAD²): the flow keeps x a fixed number of deviations from the mean."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    slope = (t - (1 - t) * SPREAD**2) / variance  # d/dt of log deviation
    return -MEAN + slope * (x - (1 - t) * MEAN)


def mixture(x: Tensor, t: float) -> Tensor:
    """The velocity when data are N(MEAN, SPREAD²) or N(-MEAN, SPREAD²), two to one."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    means = torch.tensor([MEAN, -MEAN], dtype=x.dtype)
    logits = -((x[..., None] - (1 - t) * means) ** 2) / (2 * variance) + torch.tensor([2.0, 1.0], dtype=x.dtype).log()
    slope = (t - (1 - t) * SPREAD**2) / variance
    velocities = -means + slope * (x[..., None] - (1 - t) * means)
    return (logits.softmax(-1) * velocities).sum(-1)


def solve(
    name: str,
    velocity: flow.Velocity,
    noise: Tensor,
    steps: int,
    shift: float,
    callback: flow.StepCallback | None = None,
) -> Tensor:
    """The sampler of that name, on its own schedule."""
    sampler = flow.SAMPLERS[name]
    return flow.solve(sampler, velocity, noise, sampler.schedule(steps, shift), callback)


def on_exact_grid(solver: flow.Solver, velocity: flow.Velocity, steps: int, shift: float) -> Tensor:
    """What a solver makes of NOISE on the exact schedule."""
    return flow.solve(flow.Sampler(solver, exact_times), velocity, NOISE, exact_times(steps, shift))


def order(solver: flow.Solver, velocity: flow.Velocity, exact: Tensor, shift: float) -> float:
    """The slope of log error over log steps on the exact schedule."""
    steps = [256, 512, 1024, 2048]
    errors = [float((on_exact_grid(solver, velocity, n, shift) - exact).abs().max()) for n in steps]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# DPM-Solver++(2M) steps in log(alpha / sigma), which no grid in t makes small at both ends: n^-2 log n is its rate here.
ORDERS = [(euler, 0.95, 1.05), (heun, 1.9, 2.1), (dpmpp_2m, 1.5, 2.1), (ab2, 1.9, 2.2)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "least", "most"), ORDERS)
def test_order_of_convergence(solver: Any, least: float, most: float, shift: float) -> None:
    assert least <= order(solver, gaussian, MEAN + SPREAD * NOISE, shift) <= most


@pytest.mark.parametrize(("solver", "least", "most"), ORDERS)
def test_order_of_convergence_on_a_mixture(solver: Any, least: float, most: float) -> None:
    exact = on_exact_grid(heun, mixture, 8192, 3.0)
    assert least <= order(solver, mixture, exact, 3.0) <= most


@pytest.mark.parametrize("solver", [heun, dpmpp_2m, ab2])
def test_second_order_pays(solver: flow.Solver) -> None:
    exact = MEAN + SPREAD * NOISE
    for steps in (32, 64, 256):
        evaluations = 2 * steps - 1 if solver is heun else steps
        error = (on_exact_grid(solver, gaussian, steps, 3.0) - exact).abs().max()
        assert error < (on_exact_grid(euler, gaussian, evaluations, 3.0) - exact).abs().max()


def test_published_loop_comes_near() -> None:
    """It stops short of t = 0 and ends with a step the wrong way, so it has a floor; it falls to it."""
    exact = MEAN + SPREAD * NOISE
    errors = [float((solve("euler", gaussian, NOISE, n, 3.0) - exact).abs().max()) for n in (10, 49, 200, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_published_loop_as_published() -> None:
    """REFERENCE §6, written out."""
    t = official_grid(49, 3.0)
    seen: list[float] = []

    def velocity(x: Tensor, time: float) -> Tensor:
        seen.append(time)
        return gaussian(x, time)

    x = NOISE
    for i in range(48, 0, -1):
        x = x + (t[i - 1] - t[i]) * gaussian(x, float(t[i]))
    x = x + (t[49] - t[48]) * gaussian(x, float(t[48]))
    torch.testing.assert_close(solve("euler", velocity, NOISE, 49, 3.0), x, rtol=1e-12, atol=1e-12)
    assert len(seen) == 49
    assert seen[0] == seen[-1] == float(t[48])


@pytest.mark.parametrize("name", sorted(flow.SAMPLERS))
@pytest.mark.parametrize("steps", [2, 3, 7, 49])
def test_callback_sees_every_evaluation(name: str, steps: int) -> None:
    calls = 0

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian(x, t)

    seen: list[tuple[int, int, float]] = []

    def callback(i: int, n: int, t: float, x: Tensor, v: Tensor) -> None:
        assert torch.equal(v, gaussian(x, t))
        seen.append((i, n, t))

    result = solve(name, velocity, NOISE, steps, 2.0, callback)
    expected = 2 * steps - 1 if name == "heun" else steps
    assert calls == expected
    assert [(i, n) for i, n, _ in seen] == [(i + 1, expected) for i in range(expected)]
    assert all(0 < t <= 1 for *_, t in seen)
    assert torch.equal(result, solve(name, gaussian, NOISE, steps, 2.0))


@pytest.mark.parametrize("name", sorted(flow.SAMPLERS))
@pytest.mark.parametrize("steps", [2, 7])
def test_times_at_which_a_solver_evaluates(name: str, steps: int) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return gaussian(x, t)

    solve(name, velocity, NOISE, steps, 3.0)
    sampler = flow.SAMPLERS[name]
    assert sampler.evaluated(sampler.schedule(steps, 3.0)) == seen


@pytest.mark.parametrize("name", sorted(flow.SAMPLERS))
def test_any_solver_works_on_any_schedule(name: str) -> None:
    times = [(1.0, 0.7), (0.7, 0.25), (0.25, 0.0)]
    assert flow.solve(flow.SAMPLERS[name], gaussian, NOISE, times).isfinite().all()


@pytest.mark.parametrize("name", sorted(flow.SAMPLERS))
@pytest.mark.parametrize("stops", [(3,), (1, 2, 6)])
def test_stopping_on_the_way_changes_nothing(name: str, stops: tuple[int, ...]) -> None:
    sampler = flow.SAMPLERS[name]
    times = sampler.schedule(7, 3.0)
    whole: list[tuple[int, int, float]] = []
    parts: list[tuple[int, int, float]] = []
    result = flow.solve(sampler, gaussian, NOISE, times, lambda i, n, t, x, v: whole.append((i, n, t)))
    state = flow.State(NOISE)
    for stop in (*stops, len(times)):
        state = flow.advance(sampler, gaussian, state, times, stop, lambda i, n, t, x, v: parts.append((i, n, t)))
    assert torch.equal(state.x, result)
    assert parts == whole


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_one_step_ends_at_the_mean_of_the_data(name: str) -> None:
    """One evaluation at t = 1 and straight to the data estimate, which for pure noise is the mean of the data."""
    result = solve(name, gaussian, NOISE, 1, 3.0)
    torch.testing.assert_close(result, torch.full_like(NOISE, MEAN))


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(2, 1000), shift=st.floats(0.5, 20))
def test_time_grids_are_monotonic_and_end_where_they_should(steps: int, shift: float) -> None:
    official, exact = official_grid(steps, shift), exact_grid(steps, shift)
    assert len(official) == len(exact) == steps + 1
    assert (official.diff() >= 0).all()  # 1000 steps want 1001 of the 1000 training times
    assert steps == 1000 or (official.diff() > 0).all()
    assert (exact.diff() < 0).all()
    assert float(official[-1]) == pytest.approx(1)
    assert (float(exact[0]), float(exact[-1])) == (1.0, 0.0)


def test_the_shift_leaves_the_ends_of_time() -> None:
    assert flow.time_shift(1152, 256, 4096) == pytest.approx(math.sqrt(72))
    t = flow.shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    assert t.tolist() == [0.0, 0.75, 1.0]


# --- guidance ---------------------------------------------------------------------------------------------------------


class Counted:
    """A velocity that is `value` everywhere and counts its calls."""

    def __init__(self, value: float) -> None:
        self.value, self.times = value, list[float]()

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return torch.full_like(x, self.value)


@given(guidance=st.floats(0, 20), conditional=st.floats(-5, 5), null=st.floats(-5, 5))
def test_guidance_formula(guidance: float, conditional: float, null: float) -> None:
    v = guided(Counted(conditional), Counted(null), guidance)(torch.zeros(1, dtype=torch.float64), 0.5)
    assert v.item() == pytest.approx(null + guidance * (conditional - null), abs=1e-9)


def test_guidance_costs_only_what_it_needs() -> None:
    for guidance, calls in ((1.0, (1, 0)), (0.0, (0, 1)), (2.0, (1, 1)), (0.5, (1, 1))):
        conditional, null = Counted(1.0), Counted(0.0)
        guided(conditional, null, guidance)(torch.zeros(1), 0.5)
        assert (len(conditional.times), len(null.times)) == calls


def test_guidance_interval() -> None:
    conditional, null = Counted(1.0), Counted(0.0)
    velocity = guided(conditional, null, 3.0, (0.25, 0.5))
    for t, expected in ((1.0, 1.0), (0.51, 1.0), (0.5, 3.0), (0.3, 3.0), (0.25, 3.0), (0.2, 1.0)):
        assert velocity(torch.zeros(1), t).item() == expected
    assert null.times == [0.5, 0.3, 0.25]
    assert len(conditional.times) == 6


@pytest.mark.parametrize("guidance", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_bad_guidance(guidance: float) -> None:
    with pytest.raises(InputError, match=r"guidance level .*: must be a finite number of at least 0"):
        SamplingOptions(guidance=guidance).check()


@pytest.mark.parametrize(("solver", "steps"), [("heun", 0), ("heun", -3), ("euler", 1), ("euler", 1001), ("euler", 0)])
def test_bad_steps(solver: str, steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps {steps}: "):
        SamplingOptions(steps=steps, solver=solver).check()


def test_unknown_solver() -> None:
    with pytest.raises(InputError, match="solver 'rk4' is unknown; choose one of euler, heun, dpmpp_2m"):
        SamplingOptions(steps=10, solver="rk4").check()


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)])
def test_bad_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="guidance interval"):
        SamplingOptions(steps=10, solver="heun", interval=interval).check()


@settings(max_examples=200)
@given(
    guidance=st.floats(),
    steps=st.integers(-5, 2000),
    solver=st.sampled_from([*flow.SAMPLERS, "x", ""]),
    interval=st.none() | st.tuples(st.floats(), st.floats()),
)
def test_options_are_refused_or_work(guidance: float, steps: int, solver: str, interval: Any) -> None:
    try:
        SamplingOptions(guidance=guidance, steps=steps, solver=solver, interval=interval).check()
    except InputError:
        return
    velocity = guided(Counted(1.0), Counted(0.0), min(guidance, 1e6), interval or (0.0, 1.0))
    x = solve(solver, velocity, torch.zeros(1, 1, 1, 1), min(steps, 20), 3.0)
    assert x.isfinite().all()


def test_every_solver_that_can_be_chosen_is_there() -> None:
    assert tuple(flow.SAMPLERS) == options.SOLVERS


@pytest.mark.parametrize(
    ("channels", "tokens", "base", "t"), [(96, 64, 768, 0.84), (1152, 256, 4096, 0.94), (1024, 256, 4096, 0.94)]
)
def test_the_usual_look_is_after_equally_many_evaluations_whatever_the_shift(
    channels: int, tokens: int, base: int, t: float
) -> None:
    shift = flow.time_shift(channels, tokens, base)
    assert flow.usual_look(shift) == t
    assert flow.steps_until("ab2", flow.SAMPLERS["ab2"].schedule(20, shift), t) == 8
