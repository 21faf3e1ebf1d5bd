"""A whole distillation: from options to a student's folder, which every command takes as --model-path.

The folder has config.json (the base model's, with the field "student") and the student's weights: a LoRA in PEFT's format, or with
--full the velocity network alone as model.safetensors, in the published layout. All other files are the base model's.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.adapters import CONFIG, WEIGHTS, write_adapter
from scale_rae.checkpoint import save_tensors, writing
from scale_rae.dit import DiT
from scale_rae.errors import InputError, TrainingError, counted, shorten
from scale_rae.fast_weights import crop_swiglu
from scale_rae.files import replacing
from scale_rae.hub import BUNDLED, Source
from scale_rae.jsonio import read_json
from scale_rae.layout import keeps_float32
from scale_rae.loading import load_dit, load_language
from scale_rae.memory import pick_device
from scale_rae.options import PROMPT_PREFIX
from scale_rae.promptfile import read_prompts
from scale_rae.student import FIELD, Student
from scale_rae.toolchain import can_compile, check_compile
from scale_rae.training.cache import key_of, stored_dtype
from scale_rae.training.checkpoints import Checkpoints, check_out, write_record
from scale_rae.training.distill_settings import DistillOptions
from scale_rae.training.distillation import Conditions, DistillationPlan, Distiller, guided_velocity, windows
from scale_rae.training.exchange import exchanges
from scale_rae.training.learner import Learner, compile_blocks, make_repeatable
from scale_rae.training.lora import adapter_changes
from scale_rae.training.losses import training_shift
from scale_rae.training.parallel import started_processes
from scale_rae.training.prepare import REPLY_AT_ONCE, Model, caches, left_out, own_replies, too_long
from scale_rae.training.records import Record, Report
from scale_rae.training.run import Watcher, compute_dtype, open_model
from scale_rae.training.sequences import PICTURE, Message
from scale_rae.wording import as_request

_OWN_PROMPTS = 2000  # of each kind, in the bundled model's world
_FULL = "model.safetensors"
_AGREE = 0.1  # of the norm: the most by which two estimates of an exchanged condition differ
_MOST_TRIED = 10  # exchanges per condition that is wanted
_EXCHANGED_AT_ONCE = 256


def prompts_of(options: DistillOptions) -> list[str]:
    """The requests to draw: those of --prompts, or of the bundled model's world.

    What is held out there is left out. Those that repeat are drawn more often; in the bundled model's world, so each kind of
    prompt is drawn equally often.

    Raises:
        InputError: when there are none. PromptFileError: naming file and line, for one that cannot be used.
    """
    if options.prompts is not None:
        return [as_request(line.prompt, options.prompt_prefix) for line in read_prompts(options.prompts)]
    if options.model not in BUNDLED:
        raise InputError("--prompts: give a file of prompts, like those that the student will be asked to draw")
    from scale_rae.shapes import world

    draw = random.Random(options.seed)
    usual = f"{PROMPT_PREFIX}{{prompt}}"  # a third of all
    wordings = [*world.REQUEST_WORDINGS, *[usual] * (len(world.REQUEST_WORDINGS) // 2)]
    found = world.prompts(_OWN_PROMPTS, "exclude", options.seed)
    return [world.request(draw.choice(wordings), p["prompt"]) for p in found]


def distill(options: DistillOptions, source: Source, requests: Sequence[str], watcher: Watcher) -> Path:
    """Distils, and returns the folder of the student: `options.out`.

    Raises:
        TrainingError: when --out holds another training or result, a loss is not finite, or torchrun started several processes.
            ScaleRAEError: for a model, prompts or options that cannot be used, saying what to do.
    """
    if (processes := started_processes()) > 1:
        raise TrainingError(f"{processes} processes were started, and distill runs in one; start it without torchrun")
    device = pick_device(options.device)
    check_compile(options.compile, device)
    training = options.training()
    dtype = compute_dtype(training, device)
    make_repeatable(device)
    check_out(options.out, options.resume, (CONFIG, WEIGHTS, _FULL, "config.json", "training.json"))
    model = open_model(training, source, device, dtype)
    if options.guidance != 1.0 and not model.config.dit.null_condition:
        raise InputError(
            f"--guidance {options.guidance:g}: this checkpoint was trained without condition dropout and has no null embedding; only "
            "1 works"
        )
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    conditions, notes = conditions_of(requests, options, model, watcher.report)
    for note in notes:
        watcher.note(note)
    run = Distillation(options, model, conditions, key_of(list(requests)), watcher)
    if options.resume:
        done = run.distiller.resume()
        watcher.note(f"continuing after step {done}" if done else f"{options.out}: no checkpoint yet; from step 1")
    run.distiller.run(options.out)
    run.write(options.out)
    return options.out


def conditions_of(
    requests: Sequence[str], options: DistillOptions, model: Model, report: Report
) -> tuple[Conditions, list[str]]:
    """(conditions on the device, notes for the user).

    The conditions are those of the requests that the model draws, and exchanged ones. The former are cached on disk.

    Raises:
        InputError: when the model draws none of them; naming the prompt, for one that is too long.
    """
    texts = list(dict.fromkeys(requests))
    for text in texts:
        conversation = Message("user", text), Message("assistant", PICTURE)
        if problem := too_long(Record(f"prompt {shorten(text)!r}", conversation, ()), model):
            raise InputError(problem)
    cache, stored = caches(options.training()).conditions, stored_dtype(model.dtype)
    key = key_of(model.identity, "distillation", texts)
    if not (cache.has(key) and cache.has(f"{key}-drawn")):
        language = load_language(model.source, model.config, model.place, model.adapters)
        found: dict[int, Tensor] = {}
        for start in range(0, len(texts), REPLY_AT_ONCE):
            report("asking the model", start, len(texts))
            replies = own_replies(model, language, texts[start : start + REPLY_AT_ONCE])
            for number, reply in enumerate(replies, start=start):
                if reply.condition is not None:
                    found[number] = reply.condition.to("cpu", stored)
        report("asking the model", len(texts), len(texts))
        if not found:
            raise InputError("--prompts: the model draws none of these prompts; give prompts that it draws")
        cache.add(key, torch.stack(list(found.values())))
        cache.add(f"{key}-drawn", torch.tensor(list(found)))
    values, drawn = cache.get(key).to(model.device, model.dtype), cache.get(f"{key}-drawn").tolist()
    others = sorted(set(range(len(texts))) - set(drawn))
    notes = [left_out([texts[number] for number in others], len(texts))] if others else []
    row = {texts[number]: i for i, number in enumerate(drawn)}
    lines = [text for text in requests if text in row]
    numbers = torch.tensor([row[text] for text in lines])
    if options.exchanged:
        new = exchanged_conditions(lines, values, numbers, options.exchanged, options.seed)
        if len(new) < options.exchanged:
            notes.append(
                f"--exchanged {options.exchanged}: only {counted(len(new), 'condition')} made, since too few prompts differ in one word, or their "
                "conditions do not add up"
            )
        numbers = torch.cat([numbers, torch.arange(len(values), len(values) + len(new))])
        values = torch.cat([values, new])
    return Conditions(values, numbers), notes


def exchanged_conditions(lines: Sequence[str], values: Tensor, numbers: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` conditions [X, L, Z] of new texts (`exchanges`).

    They are made of the conditions `values[numbers]` of given texts. Each is the mean of two estimates, which must agree.
    """
    found: list[Tensor] = [values[:0]]
    pairs = exchanges(lines, seed)
    tried = made = 0
    while made < count and tried < _MOST_TRIED * count and (part := list(itertools.islice(pairs, _EXCHANGED_AT_ONCE))):
        i, j, k = (
            values[rows] for rows in numbers[torch.tensor(part)].to(values.device).unbind(dim=2)
        )  # each [P, 2, L, Z]
        estimates = i.float() + j.float() - k.float()
        one, another = estimates.unbind(dim=1)
        mean = estimates.mean(dim=1)
        agree = (one - another).flatten(1).norm(dim=1) < _AGREE * mean.flatten(1).norm(dim=1)
        found.append(mean[agree].to(values.dtype))
        tried, made = tried + len(part), made + len(found[-1])
    return torch.cat(found)[:count]


class Distillation:
    """Teacher, student, the loop and the files of one distillation.

    With a LoRA, the teacher is the same network without it; with --full, a network of its own.
    """

    def __init__(
        self, options: DistillOptions, model: Model, conditions: Conditions, records: str, watcher: Watcher
    ) -> None:
        """`records` is a key for the prompts that the conditions are of."""
        self.options, self.model = options, model
        shift = training_shift(model.config)
        self.student = Student(
            tuple(windows(options.steps, shift)), options.guidance, model.source.address, model.source.revision
        )
        training = options.training()
        dit, _ = load_dit(model.source, model.config, model.place, model.adapters, options.quantize)
        self.learner = Learner(training, None, dit, model.device, model.dtype, options.max_train_steps)
        teacher = self._teacher(dit)
        plan = DistillationPlan(
            times=self.student.times,
            small_steps=options.small_steps,
            guidance=options.guidance,
            trajectories=options.trajectories,
            rounds=options.rounds,
            steps=options.max_train_steps,
            batch=options.batch,
            seed=options.seed,
            log_every=options.logging_steps,
            save_every=options.save_steps,
        )
        identity = options.identity() | {
            "model": repr(model.identity),
            "records": records,
            "warmup": training.warmup(plan.steps),
        }
        self.distiller = Distiller(
            plan,
            self.learner.flat,
            dit,
            shift,
            conditions,
            teacher,
            Checkpoints(options.out, identity, options.checkpoints_total_limit),
            self.write,
            # adamw8bit reads the step on the host
            can_compile(model.device) and not options.gradient_checkpointing and options.optimizer != "adamw8bit",
            watcher.step,
            watcher.report,
        )

    def _teacher(self, dit: DiT) -> Callable[[Tensor], flow.Velocity]:
        """A function that makes the guided teacher's velocity of conditions [B, L, Z]; `dit` is the student."""
        guidance, model = self.options.guidance, self.model
        if self.options.full:
            teacher, _ = load_dit(model.source, model.config, model.place, model.adapters)
            compile_blocks(teacher, self.options.training(), model.device)
            return lambda given: guided_velocity(teacher, given, guidance)
        return lambda given: _within(self.learner.without_lora, guided_velocity(dit, given, guidance))

    def write(self, folder: Path) -> None:
        """Writes the student so far: config.json and the moving average of its weights."""
        source, tensors = self.model.source, self.learner.flat.tensors()
        raw = read_json(source.config_folder / "config.json")
        with writing(folder):
            if self.options.full:
                kept = {
                    n: t.to(torch.float32 if keeps_float32(n) else self.model.dtype).cpu().contiguous()
                    for n, t in crop_swiglu(tensors).items()
                }
                with replacing(folder / _FULL) as fresh:
                    save_tensors(kept, fresh, metadata={"format": "pt"})
            else:
                write_adapter(folder, adapter_changes(tensors), self.options.rank, self.learner.alpha, source.address)
            config = json.dumps(raw | {FIELD: self.student.record()}, indent=1) + "\n"
            with replacing(folder / "config.json") as fresh:
                fresh.write_text(config, encoding="utf-8")
            write_record(folder, self.options.decisive(), source.address, self.distiller.done)


def _within(context: Callable[[], AbstractContextManager[None]], velocity: flow.Velocity) -> flow.Velocity:
    """The velocity, each evaluation of which is in a context of its own."""

    def evaluated(x: Tensor, t: float) -> Tensor:
        with context():
            return velocity(x, t)

    return evaluated
