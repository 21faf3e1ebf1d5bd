"""The training loop: batches, gradients, steps, logs, checkpoints; a resumed loop has the same bits.

What is learnt is the objective's (`objective`), what it is learnt from the batches': records (`batches.Records`), or the model's own
drawings (`self_reward.Rounds`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

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
_LOGGED = "logged"  # in a checkpoint: the last step in the log, and the sums to log since then


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
class Plan:
    """The numbers of a training."""

    steps: int
    parts: int  # of a step, whose gradients are added up
    log_every: int
    save_every: int
    validate_every: int  # steps between validations


@dataclass(frozen=True)
class Progress:
    """How far a training is. `left` are seconds; `pace` are pictures per second, or what else `unit` names."""

    step: int
    steps: int
    loss: float
    pace: float
    left: float
    unit: str = "images"


class Trainer(Generic[B]):
    """Trains a `FlatModel`'s parameters on an objective; `run` says how."""

    def __init__(
        self,
        model: FlatModel,
        objective: Objective[B],
        batches: Batches[B],
        plan: Plan,
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
            logged, *self._sums = state[_LOGGED].tolist() if _LOGGED in state else (self.done, *self._sums)
            self._logged = int(logged)
        return self.done

    def run(self, folder: Path) -> None:
        """Takes all steps that are left. `folder` gets log.jsonl.

        Raises:
            TrainingError: naming step and records, when a loss or gradient is not finite. The weights of the step before are
                in a checkpoint then, if they are finite.
        """
        plan, first = self.plan, self.group.is_first
        log = self._log(folder, self.done) if first else None
        parts = self.batches.parts(self.done * plan.parts, plan.steps * plan.parts)
        timed = self.done
        if self._validate and self.done == 0:
            self._validate(0)
        since = time.perf_counter()
        pictures, pace = 0, math.nan
        try:
            while self.done < plan.steps:
                step = self.done + 1
                batch = [next(parts) for _ in range(plan.parts)]
                counts = self.batches.counts(step)
                totals = self.objective.totals(counts)
                values, norm = self._gradients(batch, totals)
                *numbers, size = torch.cat([values, norm[None]]).tolist()  # waits for the device
                if not all(map(math.isfinite, (*numbers, size))):
                    self._stop(step, batch, numbers, size)
                self.model.apply(norm)
                self.done = step
                self._sums = [a + b for a, b in zip(self._sums, numbers, strict=True)]
                drawn = sum(count.pictures for count in counts)
                pictures += drawn
                if step % plan.log_every == 0 or step == plan.steps:
                    seconds = time.perf_counter() - since
                    pace = seconds / (step - timed)
                    if log is not None:
                        log.write(self._record(size, pictures / seconds, pace))
                    self._logged, self._sums = step, [0.0] * len(numbers)
                    timed, pictures, since = step, 0, time.perf_counter()
                rate = drawn / pace if pace == pace else math.nan
                self._watch(Progress(step, plan.steps, numbers[0], rate, pace * (plan.steps - step)))
                paused = time.perf_counter()
                if self._validate and (step % plan.validate_every == 0 or step == plan.steps):
                    self._validate(step)
                if step % plan.save_every == 0 or step == plan.steps:
                    self.save()
                since += time.perf_counter() - paused  # validating and saving are not part of a step's time
        finally:
            parts.close()
            if log is not None:
                log.close()

    def save(self, trim: bool = True) -> None:
        """Writes the checkpoint of the steps that are done. With `trim`, removes old ones of which there are too many."""
        logged = torch.tensor([self._logged, *self._sums], dtype=torch.float64)
        state = {**self.model.state(), **self.batches.state(), _LOGGED: logged}  # in all processes, which may share it
        if self.group.is_first:
            self._checkpoints.write(self.done, state, self._write_result, trim)
        self.group.wait()

    # --- a step --------------------------------------------------------------------------------------------------------

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

    def _stop(self, step: int, batch: list[B], numbers: list[float], norm: float) -> None:
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
            f"step {step}: not finite ({what}) for the records {records}; {kept}; begin again{where} with a lower "
            "--learning-rate, or with --mixed-precision no"
        )

    def _is_finite(self) -> bool:
        """Whether the state of the model is, in all processes."""
        own = all(bool(value.isfinite().all()) for value in self.model.state().values())
        broken = torch.tensor(float(not own), device=self.model.device)
        self.group.sum(broken)
        return not broken

    def _record(self, norm: float, pictures: float, pace: float) -> dict[str, Any]:
        return {
            "step": self.done,
            **self.objective.record(self._sums, self.done - self._logged),
            **self.batches.numbers(),
            "gradient_norm": round(norm, 6),
            "learning_rate": float(self.model.learning_rate()) * self.model.options.lr,
            "images_per_second": round(pictures, 3),
            "seconds_per_step": round(pace, 5),
        }
