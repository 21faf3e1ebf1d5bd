"""The training loop: batches, gradients, steps, logs, checkpoints; a resumed loop has the same bits.

What is learnt is the objective's (`objective`), what it is learnt from the batches': records (`batches.Records`), or the model's own
drawings (`self_reward.Rounds`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from scale_rae.compiling import attention_kernels
from scale_rae.errors import TrainingError
from scale_rae.training.batches import Counts
from scale_rae.training.checkpoints import Checkpoints
from scale_rae.training.log import Log
from scale_rae.training.objective import Objective, Totals
from scale_rae.training.optim import FlatModel
from scale_rae.training.parallel import Group

B = TypeVar("B")
LOGGED = "logged"  # in a checkpoint: the last step in the log, and the sums to log since then


class Batches(Protocol[B]):
    """What a trainer learns from: the batches of all steps, in parts whose gradients are added up."""

    def counts(self, step: int) -> Sequence[Counts]:
        """The counts of each record of a step, over all devices."""

    def parts(self, first: int, stop: int) -> Generator[B, None, None]:
        """This process's parts from number `first` to `stop` - 1; parts count from 0 over all steps."""

    def where(self, batch: B) -> Sequence[str]:
        """Where the records of a batch come from, for messages."""

    def numbers(self) -> dict[str, Any]:
        """Further numbers to log."""

    def state(self) -> Mapping[str, Tensor]:
        """What checkpoints keep of the batches."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a checkpoint's state."""


@dataclass(frozen=True)
class TrainingPlan:
    """How many steps a training takes, and how often it logs, saves and validates."""

    steps: int
    parts: int  # of a step, whose gradients are added up
    log_every: int
    save_every: int
    validate_every: int  # steps between validations


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    `left` are seconds; `pace` are pictures per second, or what else `unit` names.
    """

    step: int
    steps: int
    loss: float
    pace: float
    left: float
    unit: str = "images"


class Pace:
    """Seconds per step, and pictures per second or what else is counted, as last measured.

    They are NaN before the first measurement.
    """

    def __init__(self) -> None:
        self.seconds_per_step = self.per_second = math.nan
        self._steps = self._counted = 0
        self._since = time.perf_counter()

    def add(self, count: int) -> None:
        """Adds a step, which learnt from so many pictures."""
        self._steps, self._counted = self._steps + 1, self._counted + count

    def measure(self) -> None:
        """Measures the steps since the last measurement."""
        seconds = time.perf_counter() - self._since
        self.seconds_per_step, self.per_second = seconds / self._steps, self._counted / seconds
        self._steps, self._counted, self._since = 0, 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not a part of the steps."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class Trainer(Generic[B]):
    """Trains a `FlatModel`'s parameters on an objective; `run` says how."""

    def __init__(
        self,
        model: FlatModel,
        objective: Objective[B],
        batches: Batches[B],
        plan: TrainingPlan,
        group: Group,
        checkpoints: Checkpoints,
        write_result: Callable[[Path], None],
        validate: Callable[[int], None] | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
        log: Callable[[Path, int], Log] = Log,
    ) -> None:
        """`write_result(folder)` writes what was learnt; `validate(step)` validates."""
        self.model, self.objective, self.batches, self.plan, self.group = model, objective, batches, plan, group
        self._checkpoints, self._write_result = checkpoints, write_result
        self._validate, self._watch, self._log = validate, watch, log
        self.done = 0  # steps
        self._logged, self._sums = 0, [0.0] * len(objective.names)  # the last step in the log, and sums since then

    def resume(self) -> int:
        """Takes the newest checkpoint's state, if there is one; returns its step.

        Raises:
            TrainingError, CheckpointError: see `Checkpoints.newest`.
        """
        found = self._checkpoints.newest()
        if found is not None:
            self.done, state = found
            self.model.load_state(state)
            self.batches.load_state(state)
            logged, *self._sums = state[LOGGED].tolist() if LOGGED in state else (self.done, *self._sums)
            self._logged = int(logged)
        return self.done

    def run(self, folder: Path) -> None:
        """Takes all steps that are left. `folder` gets log.jsonl.

        Raises:
            TrainingError: naming step and records, when a loss or gradient is not finite. The weights of the step before are
                in a checkpoint then, if they are finite.
        """
        plan = self.plan
        log = self._log(folder, self.done) if self.group.is_first else None
        parts = self.batches.parts(self.done * plan.parts, plan.steps * plan.parts)
        if self._validate and self.done == 0:
            self._validate(0)
        pace = Pace()
        try:
            while self.done < plan.steps:
                numbers, norm, pictures = self._step(parts)
                pace.add(pictures)
                if self._is_due(plan.log_every):
                    pace.measure()
                    if log is not None:
                        log.write(self._record(norm, pace))
                    self._logged, self._sums = self.done, [0.0] * len(numbers)
                rate, left = pictures / pace.seconds_per_step, pace.seconds_per_step * (plan.steps - self.done)
                self._watch(Progress(self.done, plan.steps, numbers[0], rate, left))
                with pace.paused():
                    if self._validate and self._is_due(plan.validate_every):
                        self._validate(self.done)
                    if self._is_due(plan.save_every):
                        self.save()
        finally:
            parts.close()
            if log is not None:
                log.close()

    def _is_due(self, every: int) -> bool:
        """Whether the steps that are done are a multiple of `every`, or all."""
        return self.done % every == 0 or self.done == self.plan.steps

    def save(self, trim: bool = True) -> None:
        """Writes the checkpoint of the steps that are done.

        With `trim`, removes old ones of which there are too many.
        """
        logged = torch.tensor([self._logged, *self._sums], dtype=torch.float64)
        state = {**self.model.state(), **self.batches.state(), LOGGED: logged}  # in all processes, which may share it
        if self.group.is_first:
            self._checkpoints.write(self.done, state, self._write_result, trim)
        self.group.wait()

    # --- a step --------------------------------------------------------------------------------------------------------

    def _step(self, parts: Iterator[B]) -> tuple[list[float], float, int]:
        """(the objective's numbers, gradient norm, pictures) of the next step, once it is taken.

        Raises:
            TrainingError: when a number is not finite; the step is not taken then.
        """
        batch = [next(parts) for _ in range(self.plan.parts)]
        counts = self.batches.counts(self.done + 1)
        values, norm = self._gradients(batch, self.objective.totals(counts))
        *numbers, size = torch.cat([values, norm[None]]).tolist()  # waits for the device
        if not all(map(math.isfinite, (*numbers, size))):
            self._stop(batch, numbers, size)
        self.model.apply(norm)
        self.done += 1
        self._sums = [a + b for a, b in zip(self._sums, numbers, strict=True)]
        return numbers, size, sum(count.pictures for count in counts)

    def _gradients(self, batch: list[B], totals: Totals) -> tuple[Tensor, Tensor]:
        """(numbers to log, gradient norm), once the gradients of a step are in the model's buffer."""
        values = torch.zeros(len(self.objective.names), device=self.model.device)
        for i, part in enumerate(batch):
            with attention_kernels(self.model.device):
                loss, numbers = self.objective(part, totals)
                gradients = torch.autograd.grad(loss, self.model.parameters, allow_unused=True, materialize_grads=True)
            self.model.collect(gradients, add=i > 0)
            values += numbers
        self.group.sum(self.model.gradient)
        self.group.sum(values)
        return values, self.model.gradient_norm()

    def _stop(self, batch: list[B], numbers: list[float], norm: float) -> NoReturn:
        """Raises the TrainingError of a step that is not finite.

        The weights before it are in a checkpoint then.
        """
        kept = "nothing was learnt yet"
        if self.done and self._is_finite():
            self.save(trim=False)
            kept = self._checkpoints.use(self.done)
        elif self.done:
            kept = f"those of step {self.done} are not finite, either, and not kept"
        records = "; ".join(where for part in batch for where in self.batches.where(part))
        losses = {name: x for name, x in self.objective.record(numbers, 1).items() if isinstance(x, float)}
        what = ", ".join(f"{name} {x:g}" for name, x in {**losses, "gradient norm": norm}.items())
        where = " in another --out" if self._checkpoints.steps() else ""
        raise TrainingError(
            f"step {self.done + 1}: not finite ({what}) for the records {records}; {kept}; begin again{where} with a lower "
            "--learning-rate, or with --mixed-precision no"
        )

    def _is_finite(self) -> bool:
        """Whether the state of the model is, in all processes."""
        own = all(bool(value.isfinite().all()) for value in self.model.state().values())
        broken = torch.tensor(float(not own), device=self.model.device)
        self.group.sum(broken)
        return not broken

    def _record(self, norm: float, pace: Pace) -> dict[str, Any]:
        """The line of the log for the steps since the line before."""
        return {
            "step": self.done,
            **self.objective.record(self._sums, self.done - self._logged),
            **self.batches.numbers(),
            "gradient_norm": round(norm, 6),
            "learning_rate": float(self.model.learning_rate()) * self.model.options.lr,
            "images_per_second": round(pace.per_second, 3),
            "seconds_per_step": round(pace.seconds_per_step, 5),
        }
