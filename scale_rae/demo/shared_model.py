"""The model behind the demo page: draw, ask, best of N, search, as generators of progress. Independent of gradio.

If a generator is closed, as when a visitor stops or leaves, its work ends at the next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import shlex
import shutil
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from scale_rae.acceptance import Rules
from scale_rae.adaptive import Batching, Search, Searcher, with_looks
from scale_rae.checkpoint import load_latent
from scale_rae.demo.best_of import BestOf
from scale_rae.demo.candidates import Candidates
from scale_rae.demo.limits import (
    ANSWER_TOKENS,
    LARGEST_FILE,
    check_length,
    check_sampling,
    check_search,
    without_folder,
)
from scale_rae.demo.results import DrawResult, Preview, RankingState, SavedImage, SearchState
from scale_rae.demo.streams import Emitter, Stopped, streamed
from scale_rae.errors import InputError, ScaleRAEError, counted
from scale_rae.flow import StepCallback
from scale_rae.images import load_image
from scale_rae.manifest import drawing_manifest, input_latents, png_text
from scale_rae.noise import image_seed
from scale_rae.opening import OpenedModel
from scale_rae.options import PROMPT_PREFIX, ModelChoice, Sampling, SamplingOptions, SearchOptions
from scale_rae.outputs import Sample, save_run, timestamp
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION, clean_message
from scale_rae.ranking import metric_named
from scale_rae.rewards import Reward, load_reward
from scale_rae.scores import Asked
from scale_rae.wording import after_no_drawing, as_request, is_bundled, subject

PREVIEWS = 12  # pictures shown of an image that forms


class SharedModel:
    """One model for all visitors, who use it one at a time; drawn images are saved in `folder`.

    `shown` gets copies, each in a folder whose name cannot be guessed. The page serves everything in `shown` and nothing in
    `folder`, which may hold other files. Without `shown`, the page shows the files in `folder`.
    """

    def __init__(self, opened: OpenedModel, choice: ModelChoice, folder: Path, shown: Path | None = None) -> None:
        self._opened, self.choice, self.folder, self.shown = opened, choice, folder, shown
        self.model: ScaleRAE = opened.model
        self._turn = threading.Lock()
        self._rewards: dict[str, Reward] = {}
        self._under_way: weakref.WeakSet[Emitter[Any]] = weakref.WeakSet()
        self._closed = False

    def close(self, patience: float = 20.0) -> None:
        """Ends the work under way at its next step, and waits for its end."""
        self._closed = True
        for emit in list(self._under_way):
            emit.stop()
        if self._turn.acquire(timeout=patience):
            self._turn.release()

    @contextlib.contextmanager
    def _alone(self, emit: Emitter[Any]) -> Iterator[None]:
        """A block that has the model to itself; raises Stopped when the visitor leaves while waiting."""
        self._under_way.add(emit)
        while not self._turn.acquire(timeout=0.2):
            emit.check()
        try:
            if self._closed:
                raise Stopped
            emit.check()
            yield
        finally:
            self._turn.release()

    @property
    def busy(self) -> bool:
        """Whether a visitor has the model."""
        return self._turn.locked()

    @property
    def guides(self) -> bool:
        """Whether the checkpoint has a null embedding, without which there is no guidance."""
        return self.model.config.dit.null_condition

    @property
    def bundled(self) -> bool:
        """Whether the model is the bundled one."""
        return is_bundled(self.model.source)

    def _checked(self, sampling: Sampling) -> Sampling:
        """The sampling, checked; for a student, with its own options, whatever the page's fixed fields send."""
        if (student := self.model.config.student) is not None:
            sampling = dataclasses.replace(sampling, options=student.sampling(SamplingOptions()))
        check_sampling(sampling)
        return sampling

    # --- drawing -------------------------------------------------------------------------------------------------

    def draw(
        self, prompt: str, sampling: Sampling, latent_file: Path | None = None
    ) -> Generator[Preview, None, DrawResult]:
        """Draws what a prompt asks for; after a latent, sends the prompt as it is and draws if the reply asks for it.

        Raises:
            ScaleRAEError: for a prompt, latent or setting that cannot be used, or a reply without a drawing (unless there
                is a latent, after which text is an answer too).
        """
        shown = self.latent(latent_file) if latent_file is not None else None
        request = prompt.strip() if shown is not None else self.request(prompt)
        check_length(request, "message")
        sampling = self._checked(sampling)

        def work(emit: Emitter[Preview]) -> DrawResult:
            with self._alone(emit):
                start = time.perf_counter()
                watch = _Previews(self.model, emit, sampling.num_images)
                result = self.model.generate(
                    request,
                    num_images=sampling.num_images,
                    seed=sampling.seeds[0],
                    options=sampling.options,
                    max_new_tokens=sampling.max_new_tokens,
                    latents=None if shown is None else [shown],
                    callback=watch.step,
                )
                if not result.images and shown is None:
                    raise InputError(self._no_drawing(result.text))
                mode: dict[str, Any] = {"mode": "t2i"}
                if latent_file is not None:
                    mode = {"mode": "latent", "action": "continue", **input_latents([latent_file])}
                saved = [
                    self._save(request, drawn.image, drawn.latent, drawn.seed, sampling, mode, result.text)
                    for drawn in result.images
                    if drawn.image is not None
                ]
                command = self.command(request, sampling, latent_file)
                return DrawResult(result.text, saved, command, time.perf_counter() - start)

        return (yield from streamed(work))

    def request(self, prompt: str) -> str:
        """The message that asks for a drawing of the prompt."""
        if not prompt.strip():
            raise InputError("Write a prompt first: what is to be drawn?")
        check_length(prompt, "prompt")
        return as_request(prompt.strip(), PROMPT_PREFIX)

    def command(self, request: str, sampling: Sampling, latent_file: Path | None = None) -> str:
        """The command line that draws the same images."""
        choice = self.choice
        words = ["scale-rae", "t2i"]
        if latent_file is not None:
            words = ["scale-rae", "latent", "--action", "continue", "--latent", latent_file.name]
        options: dict[str, Any] = {
            "--model-path": choice.model_path,
            "--prompt": request,
            "--num-images": sampling.num_images if sampling.num_images > 1 else None,
            "--seed": sampling.seeds[0],
            **({} if self.model.config.student else _flags(sampling.options)),
            "--decoder-repo": choice.decoder_repo,
            "--revision": choice.revision,
            "--device": choice.device,
            "--dtype": choice.dtype,
            "--quantize": self.model.speed.quantize,  # also where --memory chose it
            "--offload": self.model.residency.mode if self.model.residency.offloads else None,
        }
        for name, value in options.items():
            if value is not None:
                words += [name, str(value)]
        for adapter in choice.lora:
            words += ["--lora", adapter]
        return shlex.join([*words, "--save-latent"])

    def _save(
        self,
        request: str,
        image: Image.Image,
        latent: Tensor,
        seed: int,
        sampling: Sampling,
        mode: dict[str, Any],
        text: str,
    ) -> SavedImage:
        alone = dataclasses.replace(sampling, num_images=1, seed=seed)
        described = self._opened.record()
        # Of one image, which does not depend on the images drawn with it.
        manifest = drawing_manifest(mode, request, {}, described, alone, [seed], 1, 1, text, self._opened.seconds)
        saved = save_run(self.folder, manifest, [Sample(image, latent, png_text(manifest, seed))], timestamp())
        png, latent_file = Path(saved["output_images"][0]), Path(saved["latent_path"])
        source = Path(mode["input_latents"][0]) if "input_latents" in mode else None
        return SavedImage(
            image,
            latent,
            seed,
            request,
            self.command(request, alone, source),
            *self._copies(png, latent_file, png.with_name(f"{png.stem}_manifest.json")),
        )

    def _copies(self, *files: Path) -> list[Path]:
        """The files that the page serves."""
        if self.shown is None:
            return list(files)
        folder = self.shown / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        return [Path(shutil.copyfile(file, folder / file.name)) for file in files]

    # --- looking -------------------------------------------------------------------------------------------------

    def ask(
        self, question: str, latent: Tensor | None = None, image: Path | None = None
    ) -> Generator[str, None, tuple[str, bool]]:
        """Yields the answer as it grows; returns it, and whether it was cut off.

        Each question is asked without the earlier ones: checkpoints are trained on one turn.

        Raises:
            InputError: without a question, or an image that cannot be read.
        """
        if not question.strip():
            raise InputError("Write a question first.")
        check_length(question, "question")
        if latent is None and image is None:
            raise InputError("Choose a picture first: drop one, or pick one that was drawn.")

        def work(emit: Emitter[str]) -> tuple[str, bool]:
            def listen(_: int, text: str) -> bool:
                emit(text)
                return True

            with self._alone(emit):
                shown = latent if latent is not None else self._encoded(image)
                (answer,) = self.model.answer(
                    question.strip(), latents=shown, max_new_tokens=ANSWER_TOKENS, listen=listen
                )
            return answer.text, len(answer.reply.ids) >= ANSWER_TOKENS

        return (yield from streamed(work))

    def picture(self, file: Path) -> Image.Image:
        """The picture in a file that a visitor uploaded.

        Raises:
            InputError: naming the file, when it cannot be read as an image.
        """
        try:
            return load_image(file)
        except InputError as e:
            raise InputError(without_folder(str(e), file)) from e

    def _encoded(self, image: Path | None) -> Tensor:
        assert image is not None
        self.model.check_reads()
        return self.model.encode([self.picture(image)])[0]

    # --- latents -------------------------------------------------------------------------------------------------

    def latent(self, file: Path) -> Tensor:
        """A latent file's tensor [L, C].

        Raises:
            InputError: naming the file, when it is not a latent of this model.
        """
        try:
            if file.is_file() and file.stat().st_size > LARGEST_FILE:
                raise InputError(f"{file}: larger than {LARGEST_FILE >> 20} MB; no latent of one image is")
            loaded = load_latent(file)
        except InputError as e:
            raise InputError(without_folder(str(e), file)) from e
        try:
            return self.model.check_latent(loaded)
        except InputError as e:
            raise InputError(f"{file.name}: {e}") from e

    def decode(self, latent: Tensor) -> Image.Image:
        """A latent's picture."""
        with self._turn:
            return self.model.decode([latent])[0]

    # --- best of N -----------------------------------------------------------------------------------------------

    def best_of(
        self, prompt: str, sampling: Sampling, keep: int, metric: str, reward_name: str | None
    ) -> Generator[RankingState, None, RankingState]:
        """Draws `sampling.num_images`, a few at a time, and yields the ranking of the images so far after each few.

        Raises:
            ScaleRAEError: for settings that cannot be used, or a reward that cannot be loaded.
        """
        metric = metric_named(metric)
        request = self.request(prompt)
        sampling = self._checked(sampling)
        total = sampling.num_images
        if not 1 <= keep <= total:
            raise InputError(f"Of {counted(total, 'image')}, {keep} cannot be kept: keep 1 to {total}.")
        if metric == "image_reward" and reward_name is None:
            raise InputError("Ranking by reward needs a reward model: choose one, or rank by something else.")
        self.model.check_reads()
        text = prompt.strip()

        def work(emit: Emitter[RankingState]) -> RankingState:
            with self._alone(emit):
                reward = self.reward(reward_name)
                reply = self.model.reply([request], max_new_tokens=sampling.max_new_tokens)[0]
                said = self.model.tokenizer.decode(reply.ids)
                if reply.condition is None:
                    raise InputError(self._no_drawing(said))
                ranking = BestOf(total, keep, metric, with_reward=reward is not None)
                options = sampling.options
                at_once = self._at_once
                self.model.expect(total)
                while (start := len(ranking.seeds)) < total:
                    count = min(at_once, total - start)
                    seeds = [image_seed(sampling.seeds[0], 0, start + j) for j in range(count)]

                    def step(done: int, of: int, *_: object, first: int = start, last: int = start + count) -> None:
                        emit.check()
                        if done % max(1, of // 6) == 0:
                            emit(ranking.now(f"Drawing {first + 1} to {last} of {total}: {done} of {of}"))

                    latents = self.model.sample([reply.condition] * count, seeds, options, callback=step)
                    images = self.model.decode(latents)
                    emit(ranking.now(f"Judging {start + 1} to {start + count} of {total}"))
                    scores = self.model.score(latents, text, request=request, request_reply=reply)
                    rewards = reward.score(images, text) if reward is not None else None
                    ranking.add(seeds, latents, images, [score.judgement() for score in scores], rewards)
                    emit(ranking.now(f"{len(ranking.seeds)} of {total} drawn and judged"))
                done = ranking.now(f"{total} drawn, the best {keep} kept")
                saved = [
                    self._save(request, ranked.image, ranked.latent, ranked.seed, sampling, {"mode": "t2i"}, said)
                    for ranked in done.images
                ]
                return dataclasses.replace(done, saved=saved)

        return (yield from streamed(work))

    def search(
        self, prompt: str, sampling: Sampling, keep: int, most: int, reward_name: str | None
    ) -> Generator[SearchState, None, SearchState]:
        """Begins candidates until `keep` are accepted or `most` are begun, and yields all of them as they form.

        `sampling.num_images` has no effect. Candidate j has the noise of image j of `best_of`.

        Raises:
            ScaleRAEError: for settings that cannot be used, or a reward that cannot be loaded.
        """
        request = self.request(prompt)
        sampling = self._checked(dataclasses.replace(sampling, num_images=1))
        check_search(keep, most)
        about = subject(clean_message(prompt.strip()))
        self.model.check_reads()
        self.model.check_question(about, QUESTION)

        def work(emit: Emitter[SearchState]) -> SearchState:
            with self._alone(emit):
                reward = self.reward(reward_name)
                options = SearchOptions(max_candidates=most, save_dropped=True)  # the page shows dropped ones too
                options = with_looks(options, sampling.options, self.model.config)
                cards = Candidates(Rules(keep, options, reward.name if reward is not None else None))
                searcher = self._searcher(cards, reward, sampling)
                reply = self.model.reply([request], max_new_tokens=sampling.max_new_tokens)[0]
                said = self.model.tokenizer.decode(reply.ids)
                if reply.condition is None:
                    raise InputError(self._no_drawing(said))
                self.model.expect(min(most, 2 * keep))
                search = Search(Asked(about, request, reply), functools.partial(image_seed, sampling.seeds[0], 0))
                while not searcher.is_over(search):
                    self._search_round(searcher, search, cards, emit)
                done, kept = cards.finished()
                saved = [
                    self._save(request, image, latent, seed, sampling, {"mode": "t2i"}, said)
                    for image, latent, seed in kept
                ]
                return dataclasses.replace(done, saved=saved)

        return (yield from streamed(work))

    def _searcher(self, cards: Candidates, reward: Reward | None, sampling: Sampling) -> Searcher:
        """What takes a search further."""
        rules, batching = cards.rules, Batching(draw=self._at_once, read=self._at_once)
        return Searcher(self.model, reward, rules.keep, rules.options, sampling.options, batching, watch=cards.update)

    def _search_round(self, searcher: Searcher, search: Search, cards: Candidates, emit: Emitter[SearchState]) -> None:
        """Takes a search's next wave to its end, a few candidates at a time, and emits the cards."""

        def show(progress: str) -> None:
            emit(cards.now(progress))

        wave = searcher.begin(search)
        show(f"Begins {cards.names(wave)}")
        for stage in searcher.stages([search], [wave]):
            for start in range(0, len(stage.going), self._at_once):
                some = stage.going[start : start + self._at_once]
                if stage.stop is None:
                    show(f"Looking at {cards.names(some)}")
                    for drawn, seen in zip(some, searcher.read(some, stage.t), strict=True):
                        drawn.note(*seen)
                    continue
                form = cards.forming(some, self.model, show)

                def step(i: int, of: int, t: float, x: Tensor, v: Tensor, form: StepCallback = form) -> None:
                    emit.check()
                    form(i, of, t, x, v)

                on_their_way = [drawn.trajectory for drawn in some]
                advanced = self.model.advance(on_their_way, stage.stop, searcher.sampling, len(some), step)
                for drawn, trajectory in zip(some, advanced, strict=True):
                    drawn.trajectory = trajectory
        show(f"Looked at {cards.names(wave)}")

    @property
    def _at_once(self) -> int:
        """Images that best of N draws in one batch."""
        return 2 if self.model.device.type == "cpu" else 8

    def _no_drawing(self, text: str) -> str:
        said = f' ("{text.strip()}")' if text.strip() else ""
        return f"The model answered without drawing{said}; {after_no_drawing(self.model.source)}"

    def reward(self, name: str | None) -> Reward | None:
        if name is None:
            return None
        if name not in self._rewards:
            self._rewards[name] = load_reward(name, self.model)
        return self._rewards[name]


def _flags(options: SamplingOptions) -> dict[str, Any]:
    """The flags of the options that the page's fields set."""
    return {"--guidance-level": f"{options.guidance:g}", "--steps": options.steps, "--solver": options.solver}


class _Previews:
    """The sampler's callback: emits the forming images every few evaluations."""

    def __init__(self, model: ScaleRAE, emit: Emitter[Preview], images: int) -> None:
        self._model, self._emit, self._images = model, emit, images
        self._finished: list[Image.Image] = []
        self._forming: list[Image.Image] = []
        self._lowest = 1.0

    def step(self, evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        self._emit.check()
        if evaluation == 1:  # the next batch begins
            self._finished += self._forming
            self._forming = []
            self._lowest = t
        every = max(1, evaluations // PREVIEWS)
        if evaluation % every == 0 or evaluation == evaluations:
            try:
                if t <= self._lowest:  # not the published loop's odd last step, whose estimate is far off
                    self._forming = self._model.decode(self._model.estimate(t, x, v))
                    self._lowest = t
            except ScaleRAEError:
                return  # the sampler raises an error that says more
            of = (len(self._finished) * evaluations + len(x) * evaluation) / (self._images * evaluations)
            text = f"Step {evaluation} of {evaluations}"
            if self._images > len(x):
                text += f", images {len(self._finished) + 1} to {len(self._finished) + len(x)} of {self._images}"
            self._emit(Preview(min(of, 1.0), text, self._finished + self._forming))
