"""A whole training: from options and records to an adapter, or to a checkpoint in the published layout."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scale_rae.adapters import MergedReader, find_adapters, read_adapter, write_adapter
from scale_rae.config import load_config
from scale_rae.errors import OptionError, TrainingError
from scale_rae.fast_weights import crop_swiglu, pad_swiglu
from scale_rae.hub import Source, weight_files
from scale_rae.language import LanguageModel
from scale_rae.layout import DIT_PREFIX, keeps_float32
from scale_rae.loading import load_dit, load_language, load_tokenizer
from scale_rae.memory import pick_device
from scale_rae.provenance import file_record
from scale_rae.publishing import write_model
from scale_rae.toolchain import can_compile, check_compile
from scale_rae.training.batches import Order, Sample
from scale_rae.training.checkpoints import Checkpoints
from scale_rae.training.lora import LoraLinear, adapter_changes, add_to_networks, pass_gradients, switched_off
from scale_rae.training.objective import FineTune
from scale_rae.training.optim import FlatModel, OptimizerOptions, warmed_up
from scale_rae.training.parallel import Group, join, local_device
from scale_rae.training.prepare import Model, Prepared, Report, forced_conditions, prepare
from scale_rae.training.records import Record
from scale_rae.training.settings import TrainingOptions
from scale_rae.training.trainer import Plan, Progress, Trainer
from scale_rae.training.validation import Validation

PAD_TO = 8  # SwiGLU widths in training, so that matrix products run on aligned memory
MUON_RATE = 0.02  # relative to AdamW's 1e-3


@dataclass(frozen=True)
class Watcher:
    """What hears of a training: notes for the user, what is prepared, and each step."""

    note: Callable[[str], None] = lambda text: None
    report: Report = lambda what, done, total: None
    step: Callable[[Progress], None] = lambda progress: None


def train(options: TrainingOptions, source: Source, records: list[Record], watcher: Watcher) -> Path:
    """Trains, and returns the folder of the result: `options.out`.

    Raises:
        TrainingError: when --out holds another training, or a loss is not finite. ScaleRAEError: for a model, data or options
            that cannot be used, saying what to do.
    """
    device = pick_device(local_device(options.device))
    check_compile(options.compile, device)
    dtype = _dtype(options, device)
    group = join(device)
    watcher = watcher if group.is_first else Watcher()
    try:
        _make_repeatable(device)
        if options.resume is False and Checkpoints(options.out, {}).steps():
            raise TrainingError(
                f"{options.out}: holds checkpoints of a training; go on with --resume, or give another --out"
            )
        model = _open(options, source, device, dtype)
        options.out.mkdir(parents=True, exist_ok=True)
        if group.is_first:
            prepared = prepare(records, options, model, watcher.report)
        group.wait()
        if not group.is_first:
            prepared = prepare(records, options, model, watcher.report)  # finds all of it
        for note in prepared.notes:
            watcher.note(note)
        run = Run(options, model, prepared, group, watcher)
        run.trainer.run(options.out)
        if group.is_first:
            run.write(options.out)
        group.wait()
    finally:
        group.leave()
    return options.out


def _dtype(options: TrainingOptions, device: torch.device) -> torch.dtype:
    precision = options.mixed_precision or ("no" if device.type == "cpu" else "bf16")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _make_repeatable(device: torch.device) -> None:
    """Has PyTorch use kernels that give the same bits each time, so that a resumed run goes on to the bit."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _open(options: TrainingOptions, source: Source, device: torch.device, dtype: torch.dtype) -> Model:
    config = load_config(source.folder)
    found = find_adapters(options.lora)
    adapters = [read_adapter(files, weight) for files, weight in found]
    identity = _identity(file_record(source)), [(_identity(file_record(files)), weight) for files, weight in found]
    tokenizer = load_tokenizer(source, config)
    return Model(source, config, tokenizer, adapters, (*identity, str(dtype)), device, dtype)


def _identity(record: Mapping[str, Any]) -> Any:
    """What a file record says about content, whatever the folder is called."""
    return record.get("revision") or sorted(record["files"].items())


class Run:
    """The networks, the trainer and the files of one training.

    `language` is None where it does not learn: all that is needed of it was prepared.
    """

    def __init__(
        self, options: TrainingOptions, model: Model, prepared: Prepared, group: Group, watcher: Watcher
    ) -> None:
        self.options, self.model, self.prepared = options, model, prepared
        self.alpha = float(options.rank if options.alpha is None else options.alpha)
        self.dit, norm_stats = load_dit(model.source, model.config, model.place, model.adapters, options.quantize)
        self.language: LanguageModel | None = None
        if options.trains_language:
            self.language = load_language(model.source, model.config, model.place, model.adapters, options.quantize)
        if options.quantize is None:
            pad_swiglu(self.dit, PAD_TO)
        self.layers: list[LoraLinear] = []
        learning = self._choose_parameters()
        self._wrap_blocks()
        records = sum(not record.kept for record in prepared.records)
        batch = options.train_batch_size * options.gradient_accumulation_steps * group.size
        steps = options.steps(records, group.size)
        networks: dict[str, nn.Module] = {DIT_PREFIX: self.dit}
        if self.language is not None:
            networks = {"": self.language, **networks}
        self.flat = FlatModel(
            networks,
            model.device,
            model.dtype,
            _optimizer(options, steps),
            steps,
            keep_float32=lambda name: keeps_float32(name) and "lora_" not in name,
            trains=learning.__contains__,
            rate=self._rate,
            schedule=warmed_up(options.lr_scheduler, options.warmup(steps)),  # type: ignore[arg-type]
        )
        objective = FineTune(
            model.config,
            self.language,
            self.dit,
            norm_stats,
            options.condition_dropout,
            options.timesteps_per_sample,
            options.prior_loss_weight,
            lambda: switched_off(self.layers),
        )
        look = None
        if options.validation_prompts and group.is_first:
            self._validation = Validation(options, model, self.dit, norm_stats, options.out)
            look = self._look
        identity = options.identity() | {
            "model": repr(model.identity),
            "records": prepared.identity,
            "steps": steps,
            "warmup": options.warmup(steps),
            "batch": batch,
        }
        self.trainer = Trainer(
            self.flat,
            objective,
            Order(records, batch, options.seed, len(prepared.records) - records),
            [record.counts for record in prepared.records],
            self._sample,
            Plan(
                steps,
                options.train_batch_size,
                options.gradient_accumulation_steps,
                options.logging_steps,
                options.save_steps,
                options.validation_steps,
            ),
            group,
            Checkpoints(options.out, identity, options.checkpoints_total_limit),
            self.write_adapter if not options.full else lambda folder: None,
            look,
            watcher.step,
        )
        if options.resume and (done := self.trainer.resume()):
            watcher.note(f"going on after step {done}")

    def _sample(self, number: int, seed: int) -> Sample:
        return self.prepared.sample(number, seed)

    def _choose_parameters(self) -> set[str]:
        """The names of the parameters that learn, which are made where there is a LoRA."""
        options = self.options
        language = self.language if options.trains_language else None
        dit = self.dit if options.trains_dit else None
        if options.full:
            names = {DIT_PREFIX + name for name, _ in dit.named_parameters()} if dit is not None else set()
            names |= {name for name, _ in language.named_parameters()} if language is not None else set()
        else:
            layers = add_to_networks(language, dit, options.rank, self.alpha, options.seed)
            self.layers = list(layers.values())
            names = {f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
        for network in (self.language, self.dit):
            if network is not None:
                pass_gradients(network)
        for prefix, network in (("", self.language), (DIT_PREFIX, self.dit)):
            for name, parameter in network.named_parameters() if network is not None else ():
                parameter.requires_grad_(prefix + name in names)
        return names

    def _wrap_blocks(self) -> None:
        """Compiles the blocks, and has their activations computed twice, if that is chosen."""
        options = self.options
        blocks: list[nn.Module] = list(self.dit.dit_blocks)
        if self.language is not None:
            blocks += list(self.language.model.layers)
        compiled = options.compile == "on" or (
            options.compile == "auto" and self.model.device.type == "cuda" and can_compile(self.model.device)
        )
        for block in blocks:
            forward: Any = block.forward
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            if options.gradient_checkpointing:
                forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = forward

    def _rate(self, name: str) -> float:
        """The learning rate of a parameter, relative to --learning-rate."""
        options = self.options
        if options.language_learning_rate is None or name.startswith(DIT_PREFIX):
            return 1.0
        return options.language_learning_rate / options.learning_rate if options.learning_rate else 1.0

    # --- what is written ---------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Writes the result and training.json, which says how it was made."""
        if self.options.full:
            self._write_checkpoint(folder / "model")
        else:
            self.write_adapter(folder)
        record = {"options": self.options.identity(), "model": self.model.source.address, "steps": self.trainer.done}
        (folder / "training.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")

    def _write_checkpoint(self, folder: Path) -> None:
        """Writes the moving average of the weights as a checkpoint in the published layout."""
        model = self.model
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed after its end
        reader = MergedReader(weight_files(model.source.folder), model.adapters)
        write_model(model.source, reader, folder, replaced=crop_swiglu(self.flat.tensors()))

    def write_adapter(self, folder: Path) -> None:
        """Writes the moving average of the adapter in PEFT's form."""
        changes = adapter_changes(self.flat.tensors())
        write_adapter(folder, changes, self.options.rank, self.alpha, self.model.source.address)

    # --- validation --------------------------------------------------------------------------------------------------

    def _look(self, step: int) -> None:
        with torch.no_grad(), self.flat.averaged():
            self._validation(step, self._look_conditions())

    def _look_conditions(self) -> Sequence[Tensor]:
        looks = self.prepared.looks
        if self.language is None:
            return [self.prepared.conditions.get(look.condition)[0] for look in looks]
        return list(forced_conditions(self.language, [look.layout for look in looks], []).unbind())


def _optimizer(options: TrainingOptions, steps: int) -> OptimizerOptions:
    if options.optimizer == "adamw8bit":
        raise OptionError("--optimizer adamw8bit: is not there yet; use adamw")
    return OptimizerOptions(
        kind=options.optimizer,  # type: ignore[arg-type]
        lr=options.learning_rate,
        muon_lr=MUON_RATE * options.learning_rate / 1e-3,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=0.0,
        warmup=options.warmup(steps),
        clip=options.max_grad_norm,
        ema=options.ema_decay,
    )
