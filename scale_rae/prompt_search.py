"""Searches of prompts on a loaded model, each until enough images are accepted: for Python and `t2i --until-accepted`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack, overload

from scale_rae import acceptance
from scale_rae.acceptance import Rules
from scale_rae.adaptive import Batching, Drawn, Search, Searcher, Watch
from scale_rae.clock import StageClock
from scale_rae.errors import InputError, OptionError
from scale_rae.noise import image_seed
from scale_rae.options import (
    AUTO_REWARD,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    POST_QA_MODES,
    PROMPT_PREFIX,
    SamplingOptions,
    SearchOptions,
    check_count,
)
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION, clean_message
from scale_rae.results import FoundImage, SearchResult
from scale_rae.rewards import default_reward, load_reward
from scale_rae.scores import Asked
from scale_rae.wording import as_request, subject

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scale_rae.flow import StepCallback
    from scale_rae.rewards import Reward

MOST_AHEAD = 4  # results that may wait for that of an earlier prompt, per prompt that is searched at a time


@dataclass(frozen=True)
class Sought:
    """One prompt to search: its message to the model, what images are judged against, and its index for noise seeds."""

    request: str
    about: str
    index: int = 0


class SearchCallOptions(TypedDict, total=False):
    """The options of `search`, which says what they are."""

    keep: int
    reward: str | Reward | None
    reward_path: str | None
    search: SearchOptions | None
    options: SamplingOptions | None
    seed: int
    question: str
    post_qa_mode: str
    prompt_prefix: str
    max_new_tokens: int
    max_new_tokens_qa: int
    batch_size: int | None
    watch: Watch | None
    callback: StepCallback | None


@overload
def search(model: ScaleRAE, prompts: str, **options: Unpack[SearchCallOptions]) -> SearchResult: ...  # type: ignore[overload-overlap]
@overload
def search(model: ScaleRAE, prompts: Sequence[str], **options: Unpack[SearchCallOptions]) -> list[SearchResult]: ...
def search(
    model: ScaleRAE,
    prompts: str | Sequence[str],
    *,
    keep: int = 1,
    reward: str | Reward | None = AUTO_REWARD,
    reward_path: str | None = None,
    search: SearchOptions | None = None,
    options: SamplingOptions | None = None,
    seed: int = DEFAULT_SEED,
    question: str = QUESTION,
    post_qa_mode: str = "latent",
    prompt_prefix: str = PROMPT_PREFIX,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    max_new_tokens_qa: int = DEFAULT_ANSWER_TOKENS,
    batch_size: int | None = None,
    watch: Watch | None = None,
    callback: StepCallback | None = None,
) -> SearchResult | list[SearchResult]:
    """One SearchResult per prompt: its candidates are drawn, looked at and dropped until `keep` images are accepted.

    Args:
        prompts: one prompt or several; the result is one SearchResult, or a list in the same order.
        keep: images per prompt. If too few are accepted, the best of the rest are kept too, if need be of the dropped ones.
        reward: the name of a reward, a loaded Reward, None for none, or "auto": the model's own, else imagereward.
            `reward_path` is a folder with its weights.
        search: when candidates are looked at, how many are begun at most, and which reward is enough.
        options: the sampler's options. Candidate j of prompt i has the noise of `image_seed(seed, i, j)`.
        question: what the model is asked about each candidate: a template with `{prompt}`, to be answered with yes or no.
        post_qa_mode: "latent" shows the model latents, "image" decoded pictures, encoded again.
        prompt_prefix: put before each prompt that is not a request already.
        batch_size: images drawn at once (default 8 on the CPU, 32 elsewhere).
        watch: called with each `adaptive.Drawn` when it is begun, after each look at it, and at its end.
        callback: as in `ScaleRAE.generate`.

    Raises:
        OptionError: for an option out of range. InputError: for an empty or too long prompt, or an unknown reward.
        ConfigError: for a checkpoint that cannot read the latents it draws. CheckpointError, HubError: when the reward cannot
            be loaded. ScaleRAEError: when a latent is not finite. DeviceError: when memory runs out.
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    sought = [Sought(as_request(p, prompt_prefix), subject(clean_message(p)), i) for i, p in enumerate(asked)]
    results = list(
        search_each(
            model,
            sought,
            chosen_reward(model, reward, reward_path) if isinstance(reward, str) else reward,
            keep=keep,
            search=search or SearchOptions(),
            options=options or SamplingOptions(),
            seed=seed,
            question=question,
            post_qa_mode=post_qa_mode,
            max_new_tokens=max_new_tokens,
            max_new_tokens_qa=max_new_tokens_qa,
            batch_size=batch_size,
            watch=watch,
            callback=callback,
        )
    )
    return results[0] if isinstance(prompts, str) else results


def search_each(
    model: ScaleRAE,
    sought: Sequence[Sought],
    reward: Reward | None,
    *,
    keep: int,
    search: SearchOptions,
    options: SamplingOptions,
    seed: int,
    question: str,
    post_qa_mode: str,
    max_new_tokens: int,
    max_new_tokens_qa: int,
    batch_size: int | None,
    watch: Watch | None = None,
    callback: StepCallback | None = None,
) -> Iterator[SearchResult]:
    """Yields one SearchResult per prompt, in order, as soon as it is there. Arguments are those of `search`.

    As many prompts are searched together as fill a batch. When one is over, the next takes its place.
    """
    check_count("images to keep", keep)
    search.check_keep(keep)
    if post_qa_mode not in POST_QA_MODES:
        raise OptionError(f"post qa mode {post_qa_mode!r}: use one of {', '.join(POST_QA_MODES)}")
    check_count("batch size", batch_size)
    model.sampler.check(options)
    size = batch_size or model.batch_size
    clock = StageClock()
    searcher = Searcher(
        model,
        reward,
        keep,
        search,
        options,
        Batching(draw=size, read=size),
        question=question,
        post_qa_mode=post_qa_mode,
        max_new_tokens=max_new_tokens_qa,
        step=callback,
        watch=watch or (lambda drawn: None),
        timed=clock.timed,
    )
    for prompt in sought:
        model.check_question(prompt.about, question)
    model.expect(len(sought) * min(search.max_candidates, 2 * keep))
    at_once = prompts_at_once(size, keep)
    waiting, going, over = deque(enumerate(sought)), list[_Going](), dict[int, SearchResult]()
    yielded = 0
    while yielded < len(sought):
        begun: list[tuple[int, Sought]] = []
        while waiting and len(going) + len(begun) < at_once and waiting[0][0] < yielded + MOST_AHEAD * at_once:
            begun.append(waiting.popleft())
        before = clock.seconds()
        if begun:
            with clock.timed("reply"):
                replies = model.reply([prompt.request for _, prompt in begun], max_new_tokens=max_new_tokens)
            for (place, prompt), reply in zip(begun, replies, strict=True):
                result = SearchResult(prompt.about, prompt.request, model.tokenizer.decode(reply.ids), reply)
                asked = Asked(prompt.about, prompt.request, reply)
                going.append(
                    _Going(
                        place,
                        Search(asked, partial(image_seed, seed, prompt.index)),
                        result,
                        before,
                        searcher.rules,
                    )
                )
        drawing = [one for one in going if one.result.reply.condition is not None]
        waves = searcher.next_round([one.search for one in drawing]) if drawing else []
        for one, wave in zip(drawing, waves, strict=True):
            one.add(wave)
        for one in list(going):
            if one.result.reply.condition is None or searcher.is_over(one.search):
                going.remove(one)
                over[one.place] = one.finished(clock)
        while yielded in over:
            yield over.pop(yielded)
            yielded += 1


def prompts_at_once(batch_size: int, keep: int) -> int:
    """How many prompts are searched together."""
    return max(1, batch_size // keep)


@dataclass
class _Going:
    """A prompt that is being searched."""

    place: int
    search: Search
    result: SearchResult
    before: dict[str, float]  # seconds
    rules: Rules
    pictures: dict[int, tuple[Tensor, Image.Image]] = field(default_factory=dict)  # of finished candidates

    def add(self, wave: Sequence[Drawn]) -> None:
        """Keeps what is needed of a wave, not what the sampler remembers of it."""
        for drawn in wave:
            number = drawn.candidate.number
            if drawn.picture is None:
                continue
            if drawn.candidate.fate != acceptance.DROPPED:
                self.pictures[number] = drawn.latent, drawn.picture
                self.result.dropped.pop(number, None)  # of a revived one
            elif self.rules.options.save_dropped:
                self.result.dropped[number] = drawn.picture

    def finished(self, clock: StageClock) -> SearchResult:
        """The result, once the search is over."""
        candidates, result = self.search.candidates, self.result
        for number in acceptance.kept(candidates, self.rules):
            one, (latent, picture) = candidates[number], self.pictures[number]
            assert one.final is not None
            accepted = one.fate == acceptance.ACCEPTED
            final = one.final
            result.images.append(FoundImage(latent, picture, one.seed, number, accepted, final.judgement, final.reward))
        result.candidates = candidates
        result.accepted = sum(image.accepted for image in result.images)
        result.evaluations = self.search.evaluations
        spent = {stage: value - self.before.get(stage, 0.0) for stage, value in clock.seconds().items()}
        # Under the names that `ScaleRAE.generate` has for them.
        result.seconds = {"sampling" if stage == "drawing" else stage: value for stage, value in spent.items()}
        return result


def chosen_reward(model: ScaleRAE, name: str, path: str | None = None) -> Reward | None:
    """The reward called `name`; "auto" is `default_reward`, "none" is None.

    Raises:
        InputError, ConfigError, CheckpointError, HubError, DeviceError: as `load_reward` does.
    """
    if name == "none":
        if path is not None:
            raise InputError(f"reward path {path}: there is no reward to load from it")
        return None
    return load_reward(default_reward(model) if name == AUTO_REWARD else name, model, path)
