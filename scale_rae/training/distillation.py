"""Distillation: a student takes one step per window of the teacher's path, guidance folded in.

Times t_0 = 1 > … > t_N = 0 cut the path into N windows. In window k the student evaluates its network once:
x_{k+1} = x_k + (t_{k+1} - t_k) v(x_k, t_k, y). It learns the teacher's mean velocity over the window,
(T_k(x_k) - x_k) / (t_{k+1} - t_k), where T_k follows the guided teacher from x_k in several small steps. No pictures are used.

In the first round, the states x_k are the teacher's own. In later rounds, the student draws them, so it learns what the teacher would
do where the student really arrives (DAgger, arXiv 1011.0686). Targets stay exact: the teacher starts from the student's state.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.compiling import attention_kernels
from scale_rae.dit import DiT
from scale_rae.errors import TrainingError
from scale_rae.noise import image_seed
from scale_rae.training.checkpoints import Checkpoints
from scale_rae.training.log import Log
from scale_rae.training.optim import FlatModel
from scale_rae.training.records import Report, no_report
from scale_rae.training.trainer import LOGGED, Pace, Progress

_SMALL_ERROR = 0.1  # root mean square of a velocity's error, below which the loss is quadratic
_WARMUP_STEPS = 3  # ordinary steps before one is captured: they compile kernels and make the libraries' workspaces


def windows(steps: int, shift: float) -> list[float]:
    """Times 1 > … > 0 [steps + 1] that cut the path into windows, evenly spaced before the shift."""
    times: list[float] = flow.exact_grid(steps, shift).tolist()
    return times


def small_steps(start: float, end: float, count: int, shift: float) -> flow.Times:
    """`count` (from, to) times that lead from `start` to `end`, evenly spaced before the shift."""
    u0, u1 = (t / (shift - (shift - 1) * t) for t in (start, end))
    inner = flow.shifted(torch.linspace(u0, u1, count + 1, dtype=torch.float64), shift).tolist()
    return list(itertools.pairwise([start, *inner[1:-1], end]))


def follow(velocity: flow.Velocity, x: Tensor, times: flow.Times) -> Tensor:
    """Where x arrives after small steps: Heun's method once, then Adams-Bashforth of second order.

    Adams-Bashforth alone would begin each window with a step of Euler's method, whose error is of first order.
    """
    (now, then), *others = times
    v = velocity(x, now)
    memory: flow.Memory = v, then - now
    ahead = x + (then - now) * v
    x = x + (then - now) * 0.5 * (v + velocity(ahead, then)) if then > 0 else ahead
    for now, then in others:
        x, memory = flow.ab2(velocity, x, now, then, memory)
    return x


def guided_velocity(dit: DiT, conditions: Tensor, guidance: float) -> flow.Velocity:
    """The velocity of a network for a batch's conditions [B, L, Z].

    Both branches of guidance run as one batch.
    """
    null = dit.null_condition
    if guidance == 1.0 or null is None:
        return lambda x, t: dit(x, x.new_full((len(x),), t), conditions)
    twice = torch.cat([conditions, null.to(conditions.dtype).expand_as(conditions)])

    def velocity(x: Tensor, t: float) -> Tensor:
        v, v_null = dit(torch.cat([x, x]), x.new_full((2 * len(x),), t), twice).chunk(2)
        return v_null + guidance * (v - v_null)

    return velocity


def pseudo_huber(squares: Tensor) -> Tensor:
    """Losses [B] of states with these mean squared errors [B].

    They are quadratic where errors are small, linear where errors are large. So few states with large errors do not dominate.
    Source: Song and Dhariwal 2023 (arXiv 2310.14189), for consistency models.
    """
    return (squares + _SMALL_ERROR**2).sqrt() - _SMALL_ERROR


class Conditions(NamedTuple):
    """Conditions, and which of them are drawn how often."""

    values: Tensor  # [Q, L, Z], on the device
    numbers: Tensor  # [P] of values; each is drawn equally often, and a condition may be there several times


class DistillationPlan(NamedTuple):
    """The numbers of a distillation. `batch` are evaluations per step, equally many of each window."""

    times: Sequence[float]  # that cut the path into windows
    small_steps: int  # of the teacher in a window
    guidance: float
    trajectories: int  # of a round
    rounds: int
    steps: int
    batch: int
    seed: int
    log_every: int
    save_every: int

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.times) - 1

    def round_of(self, step: int) -> int:
        """The round of a step; both count from 0."""
        return min(self.rounds - 1, step * self.rounds // self.steps)

    def first_step(self, number: int) -> int:
        """The first step of a round."""
        return -(-number * self.steps // self.rounds)


class Pool:
    """A round's states, and the teacher's mean velocity from each, on the device.

    `starts` and `targets` are [windows, trajectories, C, S, S], `prompt` [trajectories] are numbers of conditions.
    """

    def __init__(self, plan: DistillationPlan, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        size = plan.windows, plan.trajectories, *shape
        self.starts, self.targets = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.prompt = torch.zeros(plan.trajectories, dtype=torch.long, device=device)

    @torch.no_grad()
    def fill(
        self,
        plan: DistillationPlan,
        number: int,
        shift: float,
        conditions: Conditions,
        teacher: Callable[[Tensor], flow.Velocity],
        student: Callable[[Tensor], flow.Velocity],
        watch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Draws the trajectories of round `number`.

        `teacher` and `student` make velocities from conditions [B, L, Z].
        """
        count, device = plan.trajectories, self.prompt.device
        generator = torch.Generator().manual_seed(image_seed(plan.seed, number, 0))
        lines = torch.randint(len(conditions.numbers), (count,), generator=generator)
        self.prompt.copy_(conditions.numbers[lines])
        steps = list(itertools.pairwise(plan.times))
        small = [small_steps(now, then, plan.small_steps, shift) for now, then in steps]
        for start in range(0, count, plan.batch):
            watch(start, count)
            rows = slice(start, min(start + plan.batch, count))
            given = conditions.values[self.prompt[rows]]
            noise = torch.Generator(device).manual_seed(image_seed(plan.seed, number, 1 + start))
            x = torch.randn((len(given), *self.starts.shape[2:]), generator=noise, device=device)
            follows, leads = teacher(given), student(given)
            for k, (now, then) in enumerate(steps):
                end = follow(follows, x, small[k])
                self.starts[k, rows], self.targets[k, rows] = x, (end - x) / (then - now)
                x = end if number == 0 else x + (then - now) * leads(x, now)
        watch(count, count)


class Distiller:
    """The loop: rounds of trajectories, steps on them, logs, checkpoints.

    A resumed loop has the same bits. On CUDA a whole step is one CUDA graph. A checkpoint also has the weights that drew its
    round's trajectories (`drew`), from which they are drawn again.
    """

    def __init__(
        self,
        plan: DistillationPlan,
        flat: FlatModel,
        dit: DiT,
        shift: float,
        conditions: Conditions,
        teacher: Callable[[Tensor], flow.Velocity],
        checkpoints: Checkpoints,
        write_result: Callable[[Path], None],
        graph: bool = True,
        watch: Callable[[Progress], None] = lambda progress: None,
        report: Report = no_report,
    ) -> None:
        """`dit` is the student, whose parameters `flat` has."""
        self.plan, self.flat, self.dit, self.shift, self.conditions = plan, flat, dit, shift, conditions
        self._teacher, self._checkpoints, self._write_result = teacher, checkpoints, write_result
        self._watch, self._report = watch, report
        self._captures = graph and flat.device.type == "cuda"
        config, device = dit.config, flat.device
        self.pool = Pool(plan, (config.channels, config.side, config.side), flat.dtype, device)
        self.done = 0
        self._logged = 0  # the last step in the log
        self._round = -1
        self._drew = flat.ema.clone()
        longest = max(plan.first_step(r + 1) - plan.first_step(r) for r in range(plan.rounds))
        shape = longest, plan.windows, plan.batch // plan.windows
        self._order = torch.zeros(shape, dtype=torch.long, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._window = torch.arange(plan.windows, device=device)[:, None]
        self._times = torch.tensor(plan.times[:-1], device=device).repeat_interleave(shape[2])
        self._sums = torch.zeros(plan.windows + 2, device=device)  # squared errors by window, loss, gradient norm
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    def resume(self) -> int:
        """Takes the newest checkpoint's state, if there is one; returns its step.

        Raises:
            TrainingError, CheckpointError: see `Checkpoints.newest`.
        """
        found = self._checkpoints.newest()
        if found is not None:
            self.done, state = found
            self._drew.copy_(state["drew"])
            self.flat.load_state(state)
            logged, *sums = state[LOGGED].tolist() if LOGGED in state else (self.done, *self._sums.tolist())
            self._logged = int(logged)
            self._sums.copy_(torch.tensor(sums))
            number = self.plan.round_of(self.done - 1)
            if self.done < self.plan.steps and number == self.plan.round_of(self.done):  # within a round
                self._begin(number, self._drew)
        return self.done

    def run(self, folder: Path) -> None:
        """Takes all steps that are left. `folder` gets log.jsonl.

        Raises:
            TrainingError: naming the steps, when a loss, gradient or weight is not finite. Checkpoints have finite ones only.
        """
        plan = self.plan
        log = Log(folder, self.done)
        pace = Pace()
        with attention_kernels(self.flat.device), contextlib.closing(log):
            while self.done < plan.steps:
                if (number := plan.round_of(self.done)) != self._round:
                    with pace.paused():
                        self._begin(number, self.flat.ema)
                self._one()
                self.done += 1
                pace.add(plan.batch)
                if self.done % plan.log_every == 0 or self.done == plan.steps:
                    values = (self._sums / (self.done - self._logged)).tolist()
                    self._sums.zero_()
                    self._check(values)
                    pace.measure()
                    log.write(self._record(values, pace))
                    left = pace.seconds_per_step * (plan.steps - self.done)
                    self._watch(Progress(self.done, plan.steps, values[-2], pace.per_second, left, "states"))
                    self._logged = self.done
                if self.done % plan.save_every == 0 or self.done == plan.steps:
                    with pace.paused():
                        sums = self._sums.tolist()
                        self._check([*sums, float(self.flat.master.abs().max())])
                        logged = torch.tensor([self._logged, *sums], dtype=torch.float64)
                        state = self.flat.state() | {"drew": self._drew, LOGGED: logged}
                        self._checkpoints.write(self.done, state, self._write_result)

    # --- rounds --------------------------------------------------------------------------------------------------------

    def _begin(self, number: int, weights: Tensor) -> None:
        """Draws the trajectories of a round with these weights of the student."""
        plan, flat = self.plan, self.flat
        if weights is not self._drew:
            self._drew.copy_(weights)
        what = f"drawing trajectories, round {number + 1} of {plan.rounds}"
        with attention_kernels(flat.device), flat.using(self._drew):
            self.pool.fill(
                *(plan, number, self.shift, self.conditions, self._teacher),
                lambda given: guided_velocity(self.dit, given, 1.0),
                lambda done, total: self._report(what, done, total),
            )
        generator = torch.Generator().manual_seed(image_seed(plan.seed, number, 2))
        steps, _, count = self._order.shape
        for k in range(plan.windows):
            needed = steps * count
            epochs = [
                torch.randperm(plan.trajectories, generator=generator) for _ in range(-(-needed // plan.trajectories))
            ]
            self._order[:, k] = torch.cat(epochs)[:needed].view(steps, count).to(self._order.device)
        self._place.fill_(self.done - plan.first_step(number))
        self._round = number

    # --- a step --------------------------------------------------------------------------------------------------------

    def _one(self) -> None:
        """Takes a step.

        On CUDA, the first few steps run as they are; then one is captured, and the others replay its graph.
        """
        if self._graph is not None:
            self._graph.replay()
        elif not self._captures:
            self._step()
        elif self._warm < _WARMUP_STEPS:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self._warm += 1
        else:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
            self._graph.replay()

    def _step(self) -> None:
        """Forward, backward, update; adds this step's numbers to the sums. Nothing is read on the host."""
        rows = self._order[self._place][0]  # [windows, trajectories of a window]
        x = self.pool.starts[self._window, rows].flatten(0, 1).float()
        target = self.pool.targets[self._window, rows].flatten(0, 1).float()
        given = self.conditions.values[self.pool.prompt[rows]].flatten(0, 1)
        velocity: Tensor = self.dit(x, self._times, given)
        squares = (velocity - target).square().mean(dim=(1, 2, 3))
        loss = pseudo_huber(squares).mean()
        gradients = torch.autograd.grad(loss, self.flat.parameters, allow_unused=True, materialize_grads=True)
        norm = self.flat.update(gradients)
        by_window = squares.detach().view(rows.shape).mean(dim=1)
        self._sums.add_(torch.cat([by_window, loss.detach()[None], norm[None]]))
        self._place.add_(1)

    def _check(self, values: Sequence[float]) -> None:
        """Raises TrainingError unless all values of the steps since the log's last line are finite."""
        if not all(map(math.isfinite, values)):
            first = min(self._logged + 1, self.done)
            which = f"step {first}" if first == self.done else f"steps {first} to {self.done}"
            raise TrainingError(
                f"{which}: a loss, gradient or weight is not finite; begin again, in another --out, with a lower "
                "--learning-rate, or with --mixed-precision no"
            )

    def _record(self, values: Sequence[float], pace: Pace) -> dict[str, Any]:
        """The line of the log; `values` are means over the steps since the line before."""
        *windows, loss, norm = values
        return {
            "step": self.done,
            "loss": round(loss, 6),
            "by_window": [round(value, 6) for value in windows],
            "round": self._round + 1,
            "gradient_norm": round(norm, 6),
            "learning_rate": float(self.flat.learning_rate()) * self.flat.options.lr,
            "seconds_per_step": round(pace.seconds_per_step, 5),
        }
