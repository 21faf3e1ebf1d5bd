"""Training on the model's own drawings: it draws, reads, and learns to draw what it finds better.

A round draws several images of each of some prompts with the weights before (`old`), scores them, and takes some steps on them
(`objective.SelfReward`). Then `old` moves towards the weights that were learnt. Drawings need no guidance, and any solver draws
them. In the first rounds, guidance can be folded in: the velocity that guidance gives is learnt from accepted drawings.

A round's drawings depend on the seed, the number of the round and `old`, which checkpoints keep. So a resumed run draws them again.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_rae.checkpoint import writing
from scale_rae.compiling import attention_kernels
from scale_rae.errors import ConfigError, InputError, TrainingError
from scale_rae.hub import Source
from scale_rae.jsonio import parse_json
from scale_rae.loading import load_dit
from scale_rae.noise import image_seed
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord, read_prompts
from scale_rae.sampling import NormStats
from scale_rae.training.batches import Counts, Order, Scored
from scale_rae.training.cache import TensorCache
from scale_rae.training.drawing import draw_latents
from scale_rae.training.learner import Learner
from scale_rae.training.log import Log
from scale_rae.training.losses import between, normalised, sample_times, training_shift
from scale_rae.training.objective import SelfReward
from scale_rae.training.parallel import Group
from scale_rae.training.prepare import Drawable, Model, caches, drawable
from scale_rae.training.reading import Scorer, Scores, load_named, log_odds, optimality, rewards_of, spoilt
from scale_rae.training.run import Run, Watcher, carry_out, make_run
from scale_rae.training.settings import NO_REWARD, SelfRewardOptions, TrainingOptions
from scale_rae.training.validation import FOLDER, Validation

VERIFIED = 64  # prompts that a validation draws, where no file is chosen
LEAST_STANDING = 0.1  # of a prompt's best or worst drawing, for its drawings to be learnt from
TRUSTED = 0.5  # share of spoilt drawings that a reading may say yes to
CHANCE = 0.1  # by how much the share of yes of a validation may fall by chance


def train_on_verdicts(
    options: TrainingOptions, source: Source, prompts: Sequence[PromptRecord], watcher: Watcher
) -> Path:
    """Trains on drawings of prompts, and returns the folder of the result: `options.out`.

    Raises:
        TrainingError: as `run.train`; also when the model accepts none of its drawings. ConfigError: for a checkpoint that cannot
            read what it draws, or has no null embedding for `--fold-guidance`. InputError: for prompts that the model does not draw.
    """
    return carry_out(options, source, functools.partial(_make, options, prompts), watcher)


def _make(options: TrainingOptions, lines: Sequence[PromptRecord], model: Model, group: Group, watcher: Watcher) -> Run:
    """The run of a training on drawings of the prompts in `lines`."""
    own = options.self_reward
    if own.folds and not model.config.dit.null_condition:
        raise ConfigError(
            f"{model.source.folder / 'config.json'}: the checkpoint has no null embedding, so it cannot be guided; leave out "
            "--fold-guidance"
        )
    reader = ScaleRAE.from_pretrained(
        model.source, device=model.device, dtype=model.dtype, compile="off", lora=options.lora
    )
    reader.check_reads()
    prompts = _prompts(options, model, lines, reader, group, watcher)
    dit, norm_stats = load_dit(model.source, model.config, model.place, model.adapters, options.quantize)
    steps = options.steps(records=0, processes=1)
    learner = Learner(options, None, dit, model.device, model.dtype, steps)
    scorer = Scorer(reader, own)
    rounds = Rounds(options, model, learner, norm_stats, prompts.learnt, prompts.conditions, scorer, steps, group)
    objective = SelfReward(dit, learner.flat, rounds.start, rounds.old, own.beta, own.kl_weight, own.fold_guidance)
    validate = _validation(rounds, prompts, watcher) if group.is_first else None
    identity = {"prompts": [(prompt.text, prompt.condition) for prompt in prompts.learnt], "batch": rounds.batch}
    return make_run(learner, model, objective, rounds, steps, identity, group, validate, watcher)


@dataclass(frozen=True)
class _Prompts:
    """The prompts that the model draws: to learn from, to verify, and for the contact sheet."""

    learnt: list[Drawable]
    verified: list[Drawable]
    shown: list[Drawable]
    conditions: TensorCache  # of them all


def _prompts(
    options: TrainingOptions,
    model: Model,
    lines: Sequence[PromptRecord],
    reader: ScaleRAE,
    group: Group,
    watcher: Watcher,
) -> _Prompts:
    """The prompts, once their conditions are in the cache.

    Raises:
        InputError: for a prompt that the model cannot be asked about, or a file of which it draws none.
    """
    own, shown = options.self_reward, Path("--validation-prompts")
    assert own.prompts is not None
    files = {own.prompts: lines}
    if own.verify_prompts is not None:
        files[own.verify_prompts] = read_prompts(own.verify_prompts)
    if options.validation_prompts:
        files[shown] = [PromptRecord(i, text, i) for i, text in enumerate(options.validation_prompts, start=1)]
    for texts in files.values():
        for line in texts:
            reader.check_question(line.prompt)
    found = group.first_then_others(
        lambda: {
            file: drawable(file, texts, options, model, lambda: reader.language, watcher.report)
            for file, texts in files.items()
        }
    )
    for _, notes in found.values():
        for note in notes:
            watcher.note(note)
    drawn = {file: prompts for file, (prompts, _) in found.items()}
    verified = drawn[own.verify_prompts] if own.verify_prompts is not None else drawn[own.prompts][:VERIFIED]
    return _Prompts(drawn[own.prompts], verified, drawn.get(shown, []), caches(options).conditions)


def _validation(rounds: Rounds, prompts: _Prompts, watcher: Watcher) -> Callable[[int], None]:
    """A function that validates a step.

    It writes a contact sheet, if prompts are given for one, and a line of the validation's log.

    Raises:
        InputError: when the model does not draw all prompts of the sheet. ConfigError, CheckpointError, HubError: for a reward
            or a decoder that cannot be used.
    """
    options, model, learner = rounds.options, rounds.model, rounds.learner
    verification = Verification(rounds, prompts.verified, watcher.note)
    for note in _unguarded(options.self_reward, prompts.verified):
        watcher.note(note)
    sheet = None
    if options.validation_prompts:
        sheet = Validation(options, model, learner.dit, rounds.norm_stats, options.out)
    if len(prompts.shown) < len(options.validation_prompts):
        raise InputError("--validation-prompts: the model does not draw all of them; leave out those that it does not")

    def validate(step: int) -> None:
        with torch.no_grad(), learner.flat.averaged():
            if sheet is not None:
                sheet(step, [prompts.conditions.get(prompt.condition)[0] for prompt in prompts.shown])
            verification(step)

    return validate


def _unguarded(own: SelfRewardOptions, verified: Sequence[Drawable]) -> list[str]:
    """What the validation cannot check."""
    found = []
    if own.verify_reward == NO_REWARD:
        found.append("no reward verifies what is learnt; --verify-reward names one that only the validation sees")
    if len({prompt.text for prompt in verified}) == 1:
        found.append(
            "the validation draws one prompt only, so there are no spoilt drawings, which are halves of two prompts' drawings; give "
            "--verify-prompts"
        )
    return found


@dataclass(frozen=True)
class _Round:
    """The drawings of a round.

    `rows` [N] are the places of their prompts in `prompts` and `conditions`; `pool` are the drawings that are learnt from.
    """

    prompts: list[Drawable]
    conditions: Tensor  # [P, L, Z]
    x: Tensor  # [N, C, S, S], normalised
    rows: Tensor
    optimality: Tensor  # [N]
    pool: Tensor
    folds: bool
    numbers: dict[str, Any]


class Rounds:
    """Batches of the model's own drawings (`trainer.Batches`)."""

    def __init__(
        self,
        options: TrainingOptions,
        model: Model,
        learner: Learner,
        norm_stats: NormStats | None,
        prompts: Sequence[Drawable],
        conditions: TensorCache,
        scorer: Scorer,
        steps: int,
        group: Group,
    ) -> None:
        """`conditions` has those of the prompts; `scorer` scores drawings."""
        self.options, self.model, self.learner = options, model, learner
        self.norm_stats, self.scorer = norm_stats, scorer
        self._prompts, self._conditions, self._group = prompts, conditions, group
        own = options.self_reward
        self._per_round = own.steps_per_round
        self._folding = own.folding(steps) // self._per_round  # rounds
        self._parts = options.gradient_accumulation_steps
        self.batch = options.train_batch_size * self._parts * group.size  # drawings of a step
        self._order = Order(len(prompts), own.prompts_per_round, options.seed)
        self.start, self.old = learner.flat.master.clone(), learner.flat.master.clone()
        self._round: _Round | None = None
        self._number = -1  # of that round

    # --- what the trainer asks for -----------------------------------------------------------------------------------

    def counts(self, step: int) -> list[Counts]:
        """One picture per drawing of a step."""
        return [Counts(pictures=1)] * self.batch

    def parts(self, first: int, stop: int) -> Generator[Scored, None, None]:
        """This process's batches; each round is drawn when its first batch is asked for."""
        for number in range(first, stop):
            round_, within = divmod(number, self._per_round * self._parts)
            if round_ != self._number or self._round is None:
                if within == 0 and round_ > 0:
                    self._move_old(round_)
                self._round, self._number = self._drawn(round_), round_
            yield self._batch(self._round, number)

    def where(self, batch: Scored) -> list[str]:
        """The places of the batch's prompts."""
        places = list(dict.fromkeys(batch.where))
        return places if len(places) <= 8 else [*places[:8], f"and {len(places) - 8} more"]

    def numbers(self) -> dict[str, Any]:
        """Of the round: its number, and what the model and the reward make of its drawings."""
        return {} if self._round is None else self._round.numbers

    def state(self) -> Mapping[str, Tensor]:
        """The weights that draw."""
        return {"old": self.old}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with those weights."""
        self.old.copy_(state["old"])

    # --- rounds --------------------------------------------------------------------------------------------------------

    def _move_old(self, round_: int) -> None:
        """Moves the weights that draw, after a round.

        They start from the weights with guidance folded in, once these are learnt.
        """
        flat = self.learner.flat
        if round_ == self._folding:
            self.old.copy_(flat.ema)
        elif round_ > self._folding:
            self.old.lerp_(flat.master, 1 - self.options.self_reward.old_decay)

    @torch.no_grad()
    def _drawn(self, round_: int) -> _Round:
        """A round's drawings and their scores.

        Raises:
            TrainingError: when the model accepts none, while guidance is folded in.
        """
        options, own = self.options, self.options.self_reward
        numbers = [self._order.record(round_ + 1, place) for place in range(own.prompts_per_round)]
        prompts, each = [self._prompts[number] for number in numbers], own.images_per_prompt
        conditions = self._noisy(self.conditions_of(prompts), round_)
        folds = round_ < self._folding
        rows = torch.arange(len(prompts)).repeat_interleave(each)
        seeds = _seeds(options.seed, numbers, round_, each)
        latents, scores = self._drawn_together(prompts, conditions, rows, seeds, folds)
        standings = self.scorer.standings(scores, each)
        accepted = self.scorer.accepted(scores, standings)
        if folds and not accepted.any():
            raise TrainingError(
                f"round {round_ + 1}: the model accepts none of its {len(rows)} drawings with guidance {own.fold_guidance:g}, so it "
                "has nothing to learn; use another --fold-guidance, other --prompts, or --reading-weight 0 with a --reward"
            )
        useful = (standings.abs().view(-1, each).amax(dim=1) >= LEAST_STANDING).repeat_interleave(each)
        chosen = accepted if folds else useful if useful.any() else torch.ones_like(useful)
        pool = chosen.nonzero()[:, 0].cpu()
        logged = {"yes": scores.yes.float(), "reading": scores.reading, "reward": scores.reward}
        logged["accepted"] = accepted.float()
        means = {name: round(float(values.mean()), 4) for name, values in logged.items() if values is not None}
        x = normalised(latents, self.norm_stats)
        return _Round(prompts, conditions, x, rows, optimality(standings), pool, folds, {"round": round_ + 1, **means})

    def _drawn_together(
        self, prompts: Sequence[Drawable], conditions: Tensor, rows: Tensor, seeds: Sequence[int], folds: bool
    ) -> tuple[Tensor, Scores]:
        """Latents [N, L, C] of a round and their scores; each process draws its share of whole prompts."""
        own, group = self.options.self_reward, self._group
        start, stop = (
            index * len(prompts) // group.size * own.images_per_prompt for index in (group.index, group.index + 1)
        )
        share = slice(start, stop)
        weights, guidance = (self.start, own.fold_guidance) if folds else (self.old, 1.0)
        with self.learner.flat.using(weights):
            latents = self.draw(conditions[rows[share].to(conditions.device)], seeds[share], guidance)
        mine = self.scorer(latents, [prompts[row].text for row in rows[share].tolist()])
        latents, reading = (self._everyones(values, share, len(rows)) for values in (latents, mine.reading))
        reward = None if mine.reward is None else self._everyones(mine.reward, share, len(rows))
        return latents, Scores(reading, reward)

    def conditions_of(self, prompts: Sequence[Drawable]) -> Tensor:
        """Conditions [P, L, Z] of prompts, on the device."""
        return torch.cat([self._conditions.get(prompt.condition) for prompt in prompts]).to(self.model.device)

    def draw(self, conditions: Tensor, seeds: Sequence[int], guidance: float) -> Tensor:
        """Latents [N, L, C] of conditions [N, L, Z], by the network as its weights are."""
        own, dit, config = self.options.self_reward, self.learner.dit, self.model.config
        if not seeds:  # a process may have no share
            return torch.zeros(0, config.tokens, config.channels, device=self.model.device)

        def draw(some: Tensor, numbers: Tensor) -> Tensor:
            how = numbers.tolist(), guidance, own.draw_steps, own.draw_solver
            return draw_latents(dit, config, self.norm_stats, some, *how)

        return self.in_batches(draw, conditions, torch.tensor(seeds))

    def in_batches(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """What a function makes of values [N, …], in batches of one size.

        On CUDA, each size would be compiled.
        """
        size, count = self.options.self_reward.draw_batch_size or self.options.train_batch_size, len(values[0])
        lacking = -count % size if self.model.device.type == "cuda" else 0
        filled = [torch.cat([v, v[:1].expand(lacking, *v.shape[1:])]) for v in values]
        starts = range(0, count, size)
        with attention_kernels(self.model.device):
            return torch.cat([function(*(v[start : start + size] for v in filled)) for start in starts])[:count]

    def _everyones(self, mine: Tensor, share: slice, count: int) -> Tensor:
        """The rows of all processes, [count, …]; this process has those of `share`."""
        if self._group.size == 1:
            return mine
        everyone = mine.new_zeros(count, *mine.shape[1:])
        everyone[share] = mine
        self._group.sum(everyone)
        return everyone

    def _noisy(self, conditions: Tensor, round_: int) -> Tensor:
        """Conditions [P, L, Z] with a round's noise, half of it common to a condition's tokens."""
        size = self.options.self_reward.condition_noise
        if not size or len(conditions) < 2:
            return conditions
        generator = torch.Generator().manual_seed(image_seed(self.options.seed, round_ + 1, 0))
        common = torch.randn(len(conditions), 1, conditions.shape[2], generator=generator)
        noise = (common + torch.randn(conditions.shape, generator=generator)) / 2**0.5
        values = conditions.float()
        return (values + size * values.std(dim=0).mean() * noise.to(values.device)).to(conditions.dtype)

    def _batch(self, drawn: _Round, number: int) -> Scored:
        """This process's drawings in a part of a step.

        What is random does not depend on the number of processes.
        """
        options, device = self.options, self.model.device
        step, part = number // self._parts + 1, number % self._parts
        first = (part * self._group.size + self._group.index) * options.train_batch_size
        mine = slice(first, first + options.train_batch_size)
        places = torch.Generator().manual_seed(image_seed(options.seed, step, 1))
        chosen = drawn.pool[torch.randint(len(drawn.pool), (self.batch,), generator=places)[mine]]
        generator = torch.Generator(device).manual_seed(image_seed(options.seed, step, 2))
        t = sample_times(self.batch, training_shift(self.model.config), generator, device)
        dropped = torch.rand(self.batch, generator=generator, device=device) < options.condition_dropout
        noise = torch.randn(self.batch, *drawn.x.shape[1:], generator=generator, device=device)
        if not self.model.config.dit.null_condition:
            dropped = torch.zeros_like(dropped)
        rows = drawn.rows[chosen]
        here = chosen.to(device)
        return Scored(
            [drawn.prompts[row].where for row in rows.tolist()],
            drawn.x[here],
            drawn.conditions[rows.to(device)],
            drawn.optimality[here],
            t[mine],
            noise[mine],
            dropped[mine],
            drawn.folds,
        )


def _seeds(seed: int, numbers: Sequence[int], round_: int, each: int) -> list[int]:
    """The noise seeds of a round's drawings, `each` per prompt.

    A prompt that is in the round again gets other seeds.
    """
    found, seen = [], Counter[int]()
    for number in numbers:
        found += [image_seed(image_seed(seed, number, (round_ + 1) * each + j), seen[number]) for j in range(each)]
        seen[number] += 1
    return found


class Verification:
    """Measures what was learnt, also by a reward that training does not see; writes validation/log.jsonl.

    Prompts are drawn from the same noise each time. A line has: the share that the model says yes to, its mean log-odds; the mean
    reward; the mean of a reward that training never sees; the share of spoilt drawings that the model says yes to; and the mean
    square distance of the velocity to that before training, as a share of the latter's square.
    """

    def __init__(self, rounds: Rounds, prompts: Sequence[Drawable], note: Callable[[str], None]) -> None:
        """Loads the reward that verifies.

        Raises:
            ConfigError, CheckpointError, HubError: when it cannot be used.
        """
        self._rounds, self._prompts, self._note = rounds, prompts, note
        self._folder = rounds.options.out / FOLDER
        own = rounds.options.self_reward
        self._verifier = load_named(own.verify_reward, rounds.scorer.model, own.verify_reward_path)
        self._log: Log | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, Any]:
        """The line of a step, once it is written. The network computes with the weights that are looked at."""
        rounds, options = self._rounds, self._rounds.options
        reader, texts = rounds.scorer.model, [prompt.text for prompt in self._prompts]
        conditions = rounds.conditions_of(self._prompts)
        seeds = [image_seed(options.seed, number, 0) for number in range(len(texts))]
        latents = rounds.draw(conditions, seeds, options.validation_guidance)
        scores = rounds.scorer(latents, texts)
        ruined = spoilt(latents, texts)
        of_spoilt = None if ruined is None else log_odds(reader.language, reader.tokenizer, list(ruined), texts)
        verified = rewards_of(reader, self._verifier, latents, texts)
        means = {
            "yes": scores.yes.float().mean(),
            "reading": scores.reading.mean(),
            "reward": None if scores.reward is None else scores.reward.mean(),
            "verifier": None if verified is None else verified.mean(),
            "yes_to_spoilt": None if of_spoilt is None else (of_spoilt > 0).float().mean(),
            "distance": self._distance(latents, conditions),
        }
        line = {"step": step} | {name: round(float(value), 4) for name, value in means.items() if value is not None}
        first = self._written(line)
        doubt = 2 * float(verified.std()) / len(texts) ** 0.5 if verified is not None and len(texts) > 1 else 0.0
        for warning in warnings(line, first, doubt):
            self._note(f"step {step}: {warning}")
        return line

    def _distance(self, latents: Tensor, conditions: Tensor) -> Tensor:
        """The square distance of the velocities now and before training, relative to the latter's square, []."""
        rounds, device = self._rounds, latents.device
        x, dit = normalised(latents, rounds.norm_stats), rounds.learner.dit
        generator = torch.Generator(device).manual_seed(rounds.options.seed)
        t = sample_times(len(x), training_shift(rounds.model.config), generator, device)
        x = between(x, t, torch.randn(x.shape, generator=generator, device=device))
        now = rounds.in_batches(dit, x, t, conditions)
        with rounds.learner.flat.using(rounds.start):
            before = rounds.in_batches(dit, x, t, conditions)
        return (now - before).square().mean() / before.square().mean()

    def _written(self, line: dict[str, Any]) -> dict[str, Any]:
        """Adds the line of a step to the log, and returns the log's first line."""
        if self._log is None:
            with writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            done = int(line["step"]) - 1  # of a resumed run, too
            self._log = Log(self._folder, done, self._rounds.options.report_to)
        self._log.write(line)
        with (self._folder / "log.jsonl").open(encoding="utf-8") as file:
            return dict(parse_json(file.readline()))


def warnings(line: Mapping[str, Any], first: Mapping[str, Any], doubt: float) -> list[str]:
    """What speaks against believing the model, in the lines of a step and of the first validation.

    `doubt` is by how much the verifier's mean may fall by chance.
    """
    found = []
    if line["step"] == first["step"] and line.get("yes_to_spoilt", 0.0) > TRUSTED:
        found.append(
            f"the model says yes to {line['yes_to_spoilt']:.0%} of spoilt drawings, so its reading is a weak judge; add a --reward"
        )
    if "verifier" in line and line["verifier"] < first["verifier"] - doubt and line["reading"] > first["reading"]:
        found.append(
            f"the model likes its drawings better ({first['reading']:g} to {line['reading']:g}), the verifier less "
            f"({first['verifier']:g} to {line['verifier']:g}): it may learn to please itself; stop, or raise --kl-weight"
        )
    if line["yes"] < min(first["yes"] / 2, first["yes"] - CHANCE):
        found.append(
            f"the model says yes to {line['yes']:.0%} of its drawings, before training to {first['yes']:.0%}: the training comes "
            "apart; begin again with fewer steps, a lower --learning-rate or a higher --kl-weight"
        )
    return found
