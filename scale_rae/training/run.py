"""A whole training: from options and records to an adapter, or to a checkpoint (published layout)."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from scale_rae.adapters import CONFIG, WEIGHTS, find_adapters, model_reader, read_adapter, write_adapter
from scale_rae.checkpoint import writing
from scale_rae.config import load_config
from scale_rae.errors import ConfigError
from scale_rae.fast_weights import crop_swiglu
from scale_rae.hub import TRAINED, Source
from scale_rae.language import LanguageModel
from scale_rae.loading import load_dit, load_language, load_tokenizer
from scale_rae.memory import pick_device
from scale_rae.provenance import file_record
from scale_rae.publishing import write_model
from scale_rae.sampling import NormStats
from scale_rae.toolchain import check_compile
from scale_rae.training.batches import Order, Records
from scale_rae.training.checkpoints import Checkpoints, check_out, write_record
from scale_rae.training.learner import Learner, make_repeatable
from scale_rae.training.log import Log
from scale_rae.training.lora import adapter_changes
from scale_rae.training.objective import FineTune, Objective
from scale_rae.training.parallel import Group, join, local_device
from scale_rae.training.prepare import Model, Prepared, forced_conditions, prepare
from scale_rae.training.records import Record, Report, no_report
from scale_rae.training.settings import TrainingOptions
from scale_rae.training.trainer import Batches, Progress, Trainer, TrainingPlan
from scale_rae.training.validation import Validation

B = TypeVar("B")


@dataclass(frozen=True)
class Watcher:
    """Callbacks of a training: notes for the user, progress of the preparation, each step."""

    note: Callable[[str], None] = lambda text: None
    report: Report = no_report
    step: Callable[[Progress], None] = lambda progress: None


def train(options: TrainingOptions, source: Source, records: list[Record], watcher: Watcher) -> Path:
    """Trains on records, and returns the folder of the result: `options.out`.

    Raises:
        TrainingError: when --out holds another training or result, or a loss is not finite. ScaleRAEError: for a model, data or options
            that cannot be used, saying what to do.
    """
    return carry_out(options, source, functools.partial(_fine_tuning, options, records), watcher)


@dataclass(frozen=True)
class Result:
    """What a training writes: an adapter, or with --full a checkpoint."""

    options: TrainingOptions
    model: Model
    learner: Learner
    group: Group

    def write(self, folder: Path, steps: int) -> None:
        """Writes the result of so many steps, and training.json, which says how it was made.

        All processes must call it; the first writes.
        """
        tensors = self.learner.flat.tensors()
        if not self.group.is_first:
            return
        if self.options.full:
            self._write_checkpoint(folder / TRAINED, tensors)
        else:
            self.write_adapter(folder)
        with writing(folder):
            write_record(folder, self._how(steps), self.model.source.address, steps)

    def _how(self, steps: int) -> dict[str, Any]:
        """The options that decide the result, and the number of processes."""
        adapters = [{"name": one.source.address, "weight": one.weight} for one in self.model.adapters]
        return {**self.options.decisive(steps), "processes": self.group.size, "lora": adapters}

    def write_adapter(self, folder: Path) -> None:
        """Writes the moving average of the adapter in PEFT's form."""
        changes = adapter_changes(self.learner.flat.tensors())
        write_adapter(folder, changes, self.options.rank, self.learner.alpha, self.model.source.address)

    def _write_checkpoint(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes the moving average of the weights as a checkpoint in the published layout."""
        model = self.model
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed after its end
        reader = model_reader(model.source, model.adapters)
        write_model(model.source, reader, folder, replaced=crop_swiglu(tensors))


@dataclass(frozen=True)
class Run:
    """A training that is ready to begin, and what it writes."""

    trainer: Trainer[Any]
    result: Result


def carry_out(
    options: TrainingOptions, source: Source, make: Callable[[Model, Group, Watcher], Run], watcher: Watcher
) -> Path:
    """Makes a run of a model, trains, writes the result, and returns its folder: `options.out`.

    Raises:
        TrainingError, ScaleRAEError: as `train` does.
    """
    device = pick_device(local_device(options.device))
    check_compile(options.compile, device)
    dtype = compute_dtype(options, device)
    group = join(device)
    watcher = watcher if group.is_first else Watcher()
    try:
        make_repeatable(device)
        check_out(options.out, options.resume, (TRAINED,) if options.full else (CONFIG, WEIGHTS))
        model = open_model(options, source, device, dtype)
        with writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        run = make(model, group, watcher)
        run.trainer.run(options.out)
        run.result.write(options.out, run.trainer.done)
        group.wait()
    finally:
        group.leave()
    return options.out


def make_run(
    learner: Learner,
    model: Model,
    objective: Objective[B],
    batches: Batches[B],
    steps: int,
    identity: Mapping[str, Any],
    group: Group,
    validate: Callable[[int], None] | None,
    watcher: Watcher,
) -> Run:
    """A run of so many steps.

    `identity` is what a resumed run must have the same of, besides the options; `validate(step)` validates.
    """
    options = learner.options
    result = Result(options, model, learner, group)
    everything = {**options.identity(), "model": repr(model.identity), "steps": steps, "warmup": options.warmup(steps)}
    trainer = Trainer(
        learner.flat,
        objective,
        batches,
        TrainingPlan(
            steps,
            options.gradient_accumulation_steps,
            options.logging_steps,
            options.save_steps,
            options.validation_steps,
        ),
        group,
        Checkpoints(options.out, {**everything, **identity}, options.checkpoints_total_limit),
        result.write_adapter if not options.full else lambda folder: None,
        validate,
        watcher.step,
        functools.partial(Log, report_to=options.report_to, config=options.identity()),
    )
    if options.resume:
        done = trainer.resume()
        watcher.note(f"continuing after step {done}" if done else f"{options.out}: no checkpoint yet; from step 1")
    return Run(trainer, result)


def compute_dtype(options: TrainingOptions, device: torch.device) -> torch.dtype:
    """The dtype that networks compute in (--mixed-precision)."""
    precision = options.mixed_precision or ("no" if device.type == "cpu" else "bf16")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def open_model(options: TrainingOptions, source: Source, device: torch.device, dtype: torch.dtype) -> Model:
    """The model's files with the options' adapters.

    Raises:
        ConfigError: for a student, which is no velocity network any more. ScaleRAEError: for files that cannot be used.
    """
    config = load_config(source.config_folder)
    if config.student is not None:
        where = source.config_folder / "config.json"
        raise ConfigError(
            f"{where}: is a student, which predicts mean velocities; train or distil {config.student.base or 'its base model'} instead"
        )
    found = find_adapters(options.lora)
    adapters = [read_adapter(files, weight) for files, weight in found]
    identity = _identity(file_record(source)), [(_identity(file_record(files)), weight) for files, weight in found]
    tokenizer = load_tokenizer(source, config)
    return Model(source, config, tokenizer, adapters, (*identity, str(dtype)), device, dtype)


def _identity(record: Mapping[str, Any]) -> Any:
    """What a file record says about content, whatever the folder is called."""
    return record.get("revision") or sorted(record["files"].items())


def _fine_tuning(options: TrainingOptions, data: list[Record], model: Model, group: Group, watcher: Watcher) -> Run:
    """The run of a training on records.

    The language model is not loaded if it is frozen: the cache has its replies and conditions.
    """
    prepared = group.first_then_others(lambda: prepare(data, options, model, watcher.report))
    for note in prepared.notes:
        watcher.note(note)
    dit, norm_stats = load_dit(model.source, model.config, model.place, model.adapters, options.quantize)
    language: LanguageModel | None = None
    if options.trains_language:
        language = load_language(model.source, model.config, model.place, model.adapters, options.quantize)
    records = sum(not record.kept for record in prepared.records)
    batch = options.train_batch_size * options.gradient_accumulation_steps * group.size
    steps = options.steps(records, group.size)
    learner = Learner(options, language, dit, model.device, model.dtype, steps, group)
    objective = FineTune(
        model.config,
        language,
        dit,
        norm_stats,
        options.condition_dropout,
        options.timesteps_per_sample,
        options.prior_loss_weight,
        learner.without_lora,
    )

    validate = _validation(learner, model, norm_stats, prepared, group) if options.validation_prompts else None
    order = Order(records, batch, options.seed, len(prepared.records) - records)
    batches = Records(
        order,
        [record.counts for record in prepared.records],
        prepared.sample,
        options.train_batch_size,
        options.gradient_accumulation_steps,
        group.index,
        group.size,
    )
    identity = {"records": prepared.identity, "batch": batch}
    return make_run(learner, model, objective, batches, steps, identity, group, validate, watcher)


def _validation(
    learner: Learner, model: Model, norm_stats: NormStats | None, prepared: Prepared, group: Group
) -> Callable[[int], None]:
    """A function that draws the validation prompts at a step.

    All processes must call it, since they may share the weights.
    """
    language = learner.language
    sheet = Validation(learner.options, model, learner.dit, norm_stats, learner.options.out) if group.is_first else None

    def conditions() -> Sequence[Tensor]:
        if language is None:
            return [prepared.conditions.get(one.condition)[0] for one in prepared.validation]
        return list(forced_conditions(language, [one.sequence for one in prepared.validation], []).unbind())

    def validate(step: int) -> None:
        with torch.no_grad(), learner.flat.averaged():
            if sheet is not None:
                sheet(step, conditions())

    return validate
