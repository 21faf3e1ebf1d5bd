"""Adaptive search on a model: candidates of many prompts are drawn together, looked at early, dropped, finished, accepted.

The rules are acceptance.py's. A round takes each prompt's next wave from noise to its end. At each look, the candidates that
are left, of whichever prompts, are batched anew, so the places of dropped ones are filled with candidates of other prompts
at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from torch import Tensor

from scale_rae import acceptance
from scale_rae.acceptance import Candidate, Look, Rules
from scale_rae.config import ScaleRAEConfig
from scale_rae.errors import OptionError
from scale_rae.flow import SAMPLERS, StepCallback, Times, look_times, steps_until, time_shift, usual_look
from scale_rae.footprint import flops
from scale_rae.options import DEFAULT_ANSWER_TOKENS, SamplingOptions, SearchOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION
from scale_rae.rewards import scores_of_each
from scale_rae.sampling import Trajectory, branches, sampler_times
from scale_rae.scores import Asked, EarlyScore, Score
from scale_rae.student import own_options

if TYPE_CHECKING:
    from scale_rae.rewards import Reward

R = TypeVar("R")
TEXT_TOKENS = 48  # of a question about an image, for what a look costs


@dataclass(eq=False)
class Search:
    """One prompt's search. `seed_of` gives the noise seed of a candidate by its number."""

    asked: Asked
    seed_of: Callable[[int], int]
    candidates: list[Candidate] = field(default_factory=list)  # of finished rounds

    @property
    def evaluations(self) -> float:
        """Network evaluations so far, with looks at their cost."""
        return round(sum(c.evaluations for c in self.candidates), 2)


@dataclass(eq=False)
class Drawn:
    """One candidate of a round, with what was drawn of it: its latent [L, C] and picture, half-formed if it was dropped."""

    search: Search
    candidate: Candidate
    trajectory: Trajectory
    picture: Image.Image | None = None

    @property
    def latent(self) -> Tensor:
        """The latent [L, C], or an estimate of it."""
        assert self.trajectory.latent is not None
        return self.trajectory.latent

    def note(self, picture: Image.Image | None, look: Look) -> None:
        """Takes what a look found."""
        self.picture = picture
        if look.t is None:
            self.candidate.final = look
        else:
            self.candidate.looks.append(look)


@dataclass(frozen=True)
class Batching:
    """How many images are drawn, and how many are read at once; `map` runs the batches, in threads on a CPU."""

    draw: int
    read: int
    map: Callable[[Callable[[list[Any]], Any], Iterable[list[Any]]], Iterable[Any]] = map


@dataclass(frozen=True)
class Stage:
    """What a round's candidates need next: to be drawn up to step `stop` of the sampler or, with no stop, a look.

    Time t is that of an early look, None at the end.
    """

    going: list[Drawn]
    stop: int | None = None
    t: float | None = None


Watch = Callable[[Drawn], None]
Timed = Callable[[str], AbstractContextManager[None]]


class Searcher:
    """Takes searches from round to round, on one model with one set of options; `rules` are what they go by.

    Args:
        keep: images to accept per prompt.
        question: a template with `{prompt}`; `post_qa_mode` "image" shows the model decoded pictures, encoded again.
        step: called after each evaluation of the network, as in `ScaleRAE.sample`.
        watch: called with a candidate when it is begun, whenever it was looked at, and when its fate is known.
        timed: `timed(stage)` is a context that the stages "drawing" and "judging" run in.

    Raises:
        OptionError: for looks that are not on the sampler's way, or a threshold that no image's reward can have.
        ConfigError: for a checkpoint that cannot read the latents it draws.
    """

    def __init__(
        self,
        model: ScaleRAE,
        reward: Reward | None,
        keep: int,
        search: SearchOptions,
        sampling: SamplingOptions,
        batching: Batching,
        *,
        question: str = QUESTION,
        post_qa_mode: str = "latent",
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
        step: StepCallback | None = None,
        watch: Watch = lambda drawn: None,
        timed: Timed = lambda stage: nullcontext(),
    ) -> None:
        model.check_reads()
        search.check()
        sampling = model.sampler.chosen(sampling)
        search = with_looks(search, sampling, model.config)
        check_threshold(search, reward)
        self.model, self.reward = model, reward
        self.rules = Rules(keep, search, None if reward is None else reward.name)
        self.search, self.sampling, self.batching = search, sampling, batching
        self._question, self._max_new_tokens = question, max_new_tokens
        self._encodes = post_qa_mode == "image"
        self._step, self._watch, self._timed = step, watch, timed
        times = model.sampler.times(sampling)
        looks = _look_steps(search, sampling, times)
        evaluated = SAMPLERS[sampling.solver].evaluated
        self._stops = [(steps, evaluated(times[:steps])) for steps in (*looks, len(times))]
        self.look_cost = look_cost(model, reward, sampling, self._encodes)

    def next_round(self, searches: Sequence[Search]) -> list[list[Drawn]]:
        """The searches' next waves, one list per search, in the order of their numbers; the searches have them then.

        Raises:
            ScaleRAEError: when a latent or score is not finite, or memory runs out.
        """
        waves = [self.begin(search) for search in searches]
        for stage in self.stages(searches, waves):
            if stage.stop is None:
                self._look(stage.going, stage.t)
            else:
                self._advance(stage.going, stage.stop)
        return waves

    def stages(self, searches: Sequence[Search], waves: Sequence[list[Drawn]]) -> Iterator[Stage]:
        """The stages of a round, for whoever carries them out, in any batches, before asking for the next.

        `waves` are what `begin` gave for the searches, which have the waves' candidates after the last stage. Drawing sets
        a candidate's trajectory; a look is `read`, which `Drawn.note` takes. Revived candidates are drawn once more, with
        no early look: they have had theirs.
        """
        going = [drawn for wave in waves for drawn in wave]
        before = {drawn: drawn.candidate.evaluations for drawn in going}
        for place, (stop, evaluated) in enumerate(self._stops):
            early = place < len(self._stops) - 1
            seen = [drawn for drawn in going if not (early and drawn.candidate.is_revived)]
            if going:
                yield Stage(going, stop=stop)
            if seen:
                yield Stage(seen, t=evaluated[-1] if early else None)
            for drawn in going:
                looks = 0 if drawn.candidate.is_revived else len(drawn.candidate.looks)
                drawn.candidate.evaluations = round(before[drawn] + len(evaluated) + looks * self.look_cost, 2)
            for search, wave in zip(searches, waves, strict=True):
                candidates = [drawn.candidate for drawn in wave]
                (acceptance.drop if early else acceptance.accept)(search.candidates, candidates, self.rules)
            for drawn in seen:
                self._watch(drawn)
            going = [drawn for drawn in going if not drawn.candidate.fate]
        for search, wave in zip(searches, waves, strict=True):
            search.candidates = acceptance.with_wave(search.candidates, [drawn.candidate for drawn in wave])

    def is_over(self, search: Search) -> bool:
        """Whether nothing is left to begin for a search."""
        return not acceptance.next_wave(search.candidates, self.rules)

    def begin(self, search: Search) -> list[Drawn]:
        """The search's next wave, of which nothing is drawn yet. It may be of dropped candidates, which are revived.

        A revived candidate is drawn from its noise once more: what it was when it was dropped may have been drawn by a
        process that was killed, and in another batch, which on a GPU rounds otherwise.
        """
        condition = search.asked.reply.condition
        assert condition is not None
        wave = []
        for number in acceptance.next_wave(search.candidates, self.rules):
            if number < len(search.candidates):
                candidate = search.candidates[number]
                candidate.revive()
            else:
                candidate = Candidate(number, search.seed_of(number))
            wave.append(Drawn(search, candidate, Trajectory(condition, candidate.seed)))
            self._watch(wave[-1])
        return wave

    def _advance(self, going: Sequence[Drawn], stop: int) -> None:
        def advance(some: list[Drawn]) -> list[Trajectory]:
            return self.model.advance([d.trajectory for d in some], stop, self.sampling, len(some), self._step)

        with self._timed("drawing"):
            for drawn, trajectory in self._mapped(advance, going, self.batching.draw):
                drawn.trajectory = trajectory

    def _look(self, going: Sequence[Drawn], t: float | None) -> None:
        """Has the model and the reward look at candidates, early at time t or at the end."""
        with self._timed("judging"):
            if self.model.residency.offloads:  # each part of the model has one turn
                found = self.read(going, t, self.batching.read)
                seen = list(zip(going, found, strict=True))
            else:
                seen = self._mapped(partial(self.read, t=t), going, self.batching.read)
        for drawn, (picture, look) in seen:
            drawn.note(picture, look)

    def read(
        self, some: Sequence[Drawn], t: float | None, at_once: int | None = None
    ) -> list[tuple[Image.Image | None, Look]]:
        """What a look at candidates finds, early at time t or at the end: per candidate its picture, if decoded, and the look.

        They are decoded, rewarded, encoded and scored `at_once` at a time, by default all.
        """
        size = at_once or len(some)
        latents, asked = [d.latent for d in some], [d.search.asked for d in some]
        pictures: Sequence[Image.Image | None] = [None] * len(some)
        rewards: Sequence[float | None] = [None] * len(some)
        needs_pictures = t is None or self.reward is not None or self._encodes or self.search.save_dropped
        if needs_pictures:
            decoded = self.model.decode(latents, batch_size=size)
            pictures = decoded
            if self.reward is not None:
                prompts = [a.prompt for a in asked]
                parts = [slice(i, i + size) for i in range(0, len(some), size)]
                rewards = [
                    value for part in parts for value in scores_of_each(self.reward, decoded[part], prompts[part])
                ]
            if self._encodes:
                latents = self.model.encode(decoded, batch_size=size)
        score: Any = self.model.score_each if t is None else self.model.score_early
        scores: list[Score | EarlyScore] = []
        for i in range(0, len(some), size):
            part = slice(i, i + size)
            scores += score(latents[part], asked[part], self._question, self._max_new_tokens)
        looks = [Look(t, s.judgement(), reward) for s, reward in zip(scores, rewards, strict=True)]
        return list(zip(pictures, looks, strict=True))

    def _mapped(
        self, function: Callable[[list[Drawn]], list[R]], going: Sequence[Drawn], size: int
    ) -> list[tuple[Drawn, R]]:
        batches = [list(going[i : i + size]) for i in range(0, len(going), size)]
        results = self.batching.map(function, batches)
        return [pair for some, found in zip(batches, results, strict=True) for pair in zip(some, found, strict=True)]


def with_looks(search: SearchOptions, sampling: SamplingOptions, config: ScaleRAEConfig) -> SearchOptions:
    """The options; if they give no time of a look, with the default time for that config and sampler.

    A sampler of few steps ends before that time; its look is before its last step. With one step there is no look.
    """
    if search.check_at:
        return search
    sampling = own_options(config.student, sampling)
    possible = look_times(sampling.solver, sampler_times(config, sampling))
    if not possible:
        return search
    return replace(search, check_at=(max(usual_look(_shift(config)), possible[-1]),))


def check_looks(search: SearchOptions, sampling: SamplingOptions, config: ScaleRAEConfig) -> None:
    """Raises OptionError for looks that are not on the way of a sampler of the model with that config."""
    sampling = own_options(config.student, sampling)
    _look_steps(with_looks(search, sampling, config), sampling, sampler_times(config, sampling))


def _shift(config: ScaleRAEConfig) -> float:
    return time_shift(config.channels, config.tokens, config.base_dim)


def _look_steps(search: SearchOptions, sampling: SamplingOptions, times: Times) -> list[int]:
    """After how many steps each look is.

    Raises:
        OptionError: for looks that are not on the sampler's way, or are at the same evaluation.
    """
    looks = [steps_until(sampling.solver, times, t) for t in search.check_at]
    if len(set(looks)) < len(looks):
        both = " and ".join(f"{t:g}" for t in search.check_at)
        raise OptionError(f"--check-at {both}: are at the same evaluation of {sampling.steps} steps; give one of them")
    return looks


def check_threshold(search: SearchOptions, reward: Reward | None) -> None:
    """Raises OptionError for an `accept_reward` without a reward, or outside of the reward's range."""
    if reward is None:
        search.check_without_reward()
    if reward is None or search.accept_reward is None:
        return
    low, high = reward.range
    if not low <= search.accept_reward <= high:
        raise OptionError(
            f"--accept-reward {search.accept_reward:g}: the reward {reward.name} is between {low:.4g} and {high:.4g}"
        )


def look_cost(model: ScaleRAE, reward: Reward | None, sampling: SamplingOptions, encodes: bool) -> float:
    """What an early look costs, in evaluations of the network for one image, by floating-point operations.

    A look reads the latent with the language model; a reward also needs the decoded picture. An operation count does not
    depend on the machine, so neither do the numbers in metadata.jsonl. docs/scaling.md says how it compares with seconds.
    """
    config, language = model.config, model.language
    operations = 2.0 * _weights(language.model.layers) * (config.tokens + TEXT_TOKENS)
    if reward is not None or encodes:
        operations += 2.0 * _weights(model.decoder) * config.tokens
    if reward is not None:
        operations += reward.operations
    if encodes:
        operations += 2.0 * _weights(model.encoder.model) * config.tokens
    return round(operations / (branches(config, sampling) * flops(config.dit)), 2)


def _weights(network: Any) -> int:
    """Elements of a network's matrices."""
    return sum(p.numel() for p in network.parameters() if p.dim() > 1)
