"""The training loop: batches, gradients, steps, logs, checkpoints; a resumed loop has the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_rae.compiling import attention_kernels
from scale_rae.errors import TrainingError
from scale_rae.training.batches import Order, Sample, ahead
from scale_rae.training.checkpoints import Checkpoints
from scale_rae.training.log import Log, losses
from scale_rae.training.objective import NAMES, Objective, Totals
from scale_rae.training.optim import FlatModel
from scale_rae.training.parallel import Group


@dataclass(frozen=True)
class Plan:
    """The numbers of a training."""

    steps: int
    batch: int  # records of a part of a step on one device
    parts: int  # of a step, whose gradients are added up
    log_every: int
    save_every: int
    look_every: int  # steps between validations


@dataclass(frozen=True)
class Progress:
    """How far a training is. `left` are seconds; `pictures` are those per second."""

    step: int
    steps: int
    loss: float
    pictures: float
    left: float


class Trainer:
    """Trains a `FlatModel`'s parameters on an objective; `run` says how."""

    def __init__(
        self,
        model: FlatModel,
        objective: Objective,
        order: Order,
        counts: Sequence[tuple[int, int, bool]],
        load: Callable[[int, int], Sample],
        plan: Plan,
        group: Group,
        checkpoints: Checkpoints,
        write_result: Callable[[Path], None],
        look: Callable[[int], None] | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`counts` are `PreparedRecord.counts` of each record; `load(record, seed)` reads a sample;
        `write_result(folder)` writes what was learnt; `look(step)` validates."""
        self.model, self.objective, self.order, self.plan, self.group = model, objective, order, plan, group
        self._counts, self._load, self._checkpoints, self._write_result = counts, load, checkpoints, write_result
        self._look, self._watch = look, watch
        self.done = 0  # steps

    def resume(self) -> int:
        """Takes the newest checkpoint's state, if there is one; returns its step.

        Raises:
            TrainingError, CheckpointError: see `Checkpoints.newest`.
        """
        found = self._checkpoints.newest()
        if found is not None:
            self.done, state = found
            self.model.load_state(state)
        return self.done

    def run(self, folder: Path) -> None:
        """Takes all steps that are left. `folder` gets log.jsonl.

        Raises:
            TrainingError: naming step and records, when a loss or gradient is not finite. The weights of the step before are
                in a checkpoint then.
        """
        plan, first = self.plan, self.group.is_first
        log = Log(folder, self.done) if first else None
        parts = ahead(self._part, self.done * plan.parts, plan.steps * plan.parts)
        sums, logged = [0.0] * len(NAMES), self.done
        if first and self._look and self.done == 0:
            self._look(0)
        since = time.perf_counter()
        pictures, pace = 0, math.nan
        try:
            while self.done < plan.steps:
                step = self.done + 1
                batch = [next(parts) for _ in range(plan.parts)]
                totals = self._totals(step)
                values, norm = self._gradients(batch, totals)
                *numbers, size = torch.cat([values, norm[None]]).tolist()  # waits for the device
                if not all(map(math.isfinite, (*numbers[:4], size))):
                    self._stop(step, batch, numbers, size)
                self.model.apply(norm)
                self.done = step
                sums = [a + b for a, b in zip(sums, numbers, strict=True)]
                pictures += totals.pictures
                if step % plan.log_every == 0 or step == plan.steps:
                    seconds = time.perf_counter() - since
                    pace = seconds / (step - logged)
                    if log is not None:
                        log.write(self._record(sums, step - logged, size, pictures / seconds, pace))
                    sums, logged, pictures, since = [0.0] * len(NAMES), step, 0, time.perf_counter()
                rate = totals.pictures / pace if pace == pace else math.nan
                self._watch(Progress(step, plan.steps, numbers[0], rate, pace * (plan.steps - step)))
                paused = time.perf_counter()
                if first and self._look and (step % plan.look_every == 0 or step == plan.steps):
                    self._look(step)
                if step % plan.save_every == 0 or step == plan.steps:
                    self.save()
                since += time.perf_counter() - paused  # validating and saving are not part of a step's time
        finally:
            parts.close()  # type: ignore[attr-defined]

    def save(self) -> None:
        """Writes the checkpoint of the steps that are done."""
        if self.group.is_first:
            self._checkpoints.write(self.done, self.model.state(), self._write_result)
        self.group.wait()

    # --- a step --------------------------------------------------------------------------------------------------------

    def _places(self, part: int) -> list[int]:
        """The places in their step of this process's records of a part of it."""
        start = (part % self.plan.parts * self.group.size + self.group.rank) * self.plan.batch
        return list(range(start, start + self.plan.batch))

    def _part(self, number: int) -> list[Sample]:
        """This process's samples of a part of a step; parts count from 0 over all steps."""
        step = number // self.plan.parts + 1
        order = self.order
        return [self._load(order.record(step, place), order.sample_seed(step, place)) for place in self._places(number)]

    def _totals(self, step: int) -> Totals:
        return self.objective.totals([self._counts[self.order.record(step, i)] for i in range(self.order.batch)])

    def _gradients(self, batch: list[list[Sample]], totals: Totals) -> tuple[Tensor, Tensor]:
        """(numbers to log, gradient norm), once the gradients of a step are in the model's buffer."""
        values = torch.zeros(len(NAMES), device=self.model.device)
        for i, samples in enumerate(batch):
            with attention_kernels(self.model.device):
                loss, numbers = self.objective(samples, totals)
                gradients = torch.autograd.grad(loss, self.model.parameters, allow_unused=True, materialize_grads=True)
            self.model.collect(gradients, add=i > 0)
            values += numbers
        self.group.sum(self.model.gradient)
        self.group.sum(values)
        return values, self.model.gradient_norm()

    def _stop(self, step: int, batch: list[list[Sample]], numbers: list[float], norm: float) -> None:
        if self.done:
            self.save()
        records = "; ".join(sample.where for samples in batch for sample in samples)
        what = f"flow loss {numbers[1]:g}, text loss {numbers[2]:g}, gradient norm {norm:g}"
        kept = f"the weights of step {self.done} are kept" if self.done else "nothing was learnt yet"
        raise TrainingError(
            f"step {step}: not finite ({what}) for the records {records}; {kept}; try a lower --learning-rate, or "
            "--mixed-precision no"
        )

    def _record(self, sums: list[float], steps: int, norm: float, pictures: float, pace: float) -> dict[str, Any]:
        return {
            "step": self.done,
            **losses(sums, steps),
            "gradient_norm": round(norm, 6),
            "learning_rate": float(self.model.learning_rate()) * self.model.options.lr,
            "images_per_second": round(pictures, 3),
            "seconds_per_step": round(pace, 5),
        }
