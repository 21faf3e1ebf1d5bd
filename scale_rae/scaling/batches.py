"""A prompt's images, a batch at a time: drawn, decoded, scored. Nothing is written here."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scale_rae.clock import StageClock
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.options import SamplingOptions
from scale_rae.promptfile import PromptRecord
from scale_rae.rewards import scores_of
from scale_rae.scaling.settings import Settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scale_rae.adaptive import Batching, Searcher
    from scale_rae.language import Reply
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.rewards import Reward

Turn = Callable[[str], AbstractContextManager[None]]
SPARE = 0.1  # share of a GPU's memory that `--batch-size auto` leaves free: prompts differ in length


@dataclass(frozen=True)
class Replied:
    """A prompt with the message that asks for its images, and the model's reply to that message."""

    prompt: PromptRecord
    request: str
    reply: Reply


class BatchMaker:
    """Draws and scores batches of images on the model's device, as an experiment's settings say."""

    def __init__(
        self, settings: Settings, model: ScaleRAE, reward: Reward | None = None, clock: StageClock | None = None
    ) -> None:
        self.settings, self.model = settings, model
        self.clock = clock or StageClock()
        self.options = settings.options
        self._reward = reward
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends what other threads draw: their next evaluation of the network raises."""
        self._stopped.set()

    def _step(self, *evaluation: object) -> None:
        if self._stopped.is_set():
            raise ScaleRAEError("stopped")

    def reply(self, prompt: PromptRecord) -> Replied:
        """The prompt with the model's reply. `reply.condition` is None when the reply asks for no image."""
        request = self.settings.request(prompt.prompt)
        reply = self.model.reply([request], max_new_tokens=self.settings.max_new_tokens)[0]
        return Replied(prompt, request, reply)

    def replies(self, prompts: Sequence[PromptRecord]) -> list[Replied]:
        """Each prompt with the model's reply: all at once, but on a CPU one by one.

        There, one by one gives the bits of one alone.
        """
        if self.model.device.type == "cpu":
            return [self.reply(prompt) for prompt in prompts]
        requests = [self.settings.request(prompt.prompt) for prompt in prompts]
        replies = self.model.reply(requests, max_new_tokens=self.settings.max_new_tokens)
        return [Replied(*parts) for parts in zip(prompts, requests, replies, strict=True)]

    def searcher(self, batching: Batching | None = None, turn: Turn | None = None) -> Searcher:
        """What carries out adaptive searches; by default it draws and reads one image at a time.

        `turn(stage)` is a context that the stages "drawing" and "judging" run in, outside of their seconds.

        Raises:
            OptionError: for looks that are not on the sampler's way, or a threshold outside of the reward's range.
            ConfigError: for a checkpoint that cannot read the latents it draws.
        """
        from scale_rae.adaptive import Batching, Searcher

        @contextlib.contextmanager
        def timed(stage: str) -> Iterator[None]:
            with nullcontext() if turn is None else turn(stage), self.clock.timed(stage):
                yield

        settings = self.settings
        return Searcher(
            self.model,
            self._reward,
            settings.n_samples,
            settings.adaptive,
            self.options,
            batching or Batching(1, 1),
            question=settings.question,
            post_qa_mode=settings.post_qa_mode,
            max_new_tokens=settings.post_qa_max_new_tokens,
            step=self._step,
            timed=timed,
        )

    def draw(
        self,
        replied: Replied,
        seeds: Sequence[int],
        decoded_at_once: int,
        options: SamplingOptions | None = None,
        compile: bool | None = None,
    ) -> tuple[list[Tensor], list[Image.Image]]:
        """Latents [L, C] and decoded images, one per seed, all drawn in one batch."""
        condition = replied.reply.condition
        assert condition is not None
        with self.clock.timed("drawing"):
            latents = self.model.sample(
                [condition] * len(seeds), seeds, options or self.options, len(seeds), self._step, compile
            )
        with self.clock.timed("decoding"):
            return latents, self.model.decode(latents, batch_size=decoded_at_once)

    def score(
        self, replied: Replied, latents: Sequence[Tensor], images: Sequence[Image.Image]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Entries of text_responses, and rewards (none without a reward model), per image of one batch."""
        settings, model, prompt = self.settings, self.model, replied.prompt.prompt
        # The reward first: where weights are offloaded, the language model then has the next prompt's reply in the same turn.
        rewards: list[float] = []
        if self._reward is not None:
            with self.clock.timed("reward"):
                rewards = scores_of(self._reward, images, prompt)
        with self.clock.timed("judging"):
            scores = model.score(
                model.encode(images, batch_size=len(images)) if settings.post_qa_mode == "image" else latents,
                prompt,
                request=replied.request,
                request_reply=replied.reply,
                question=settings.question,
                max_new_tokens=settings.post_qa_max_new_tokens,
            )
        return [score.judgement() for score in scores], rewards

    def largest_batch(self, prompts: Sequence[PromptRecord]) -> int:
        """How many images of one prompt this device has memory to draw and score at once.

        Each number is tried with two steps. The first of `prompts` whose reply asks for an image is used.
        """
        from scale_rae import memory

        for prompt in prompts[:8]:
            try:
                replied = self.reply(prompt)
            except InputError:
                continue  # this prompt will fail in its turn
            if replied.reply.condition is not None:
                break
        else:
            return min(8, self.settings.total)
        options = self.options if self.model.config.student else dataclasses.replace(self.options, steps=2)

        def attempt(size: int) -> None:
            self.score(replied, *self.draw(replied, range(size), size, options, compile=False))

        model = self.model
        try:
            return memory.largest_batch(
                self.settings.total, attempt, model.release_memory, lambda: memory.spare_memory(model.device), SPARE
            )
        finally:
            model.release_memory()
