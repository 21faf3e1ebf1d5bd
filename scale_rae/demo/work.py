"""What the page asks for, as generators that tell how it goes: draw, ask, best of N. Nothing here knows gradio.

Closing a generator (a visitor who stops, or has gone) ends the work behind it at its next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import shlex
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from scale_rae.checkpoint import load_latent
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.images import load_image
from scale_rae.manifest import drawing_manifest, input_latents, png_text
from scale_rae.noise import image_seed
from scale_rae.opening import OpenedModel
from scale_rae.options import PROMPT_PREFIX, ModelChoice, Sampling, SamplingOptions
from scale_rae.outputs import Sample, save_run, timestamp
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord
from scale_rae.rewards import Reward, load_reward
from scale_rae.scaling.experiment import check_finite, judgement, prompt_record
from scale_rae.scaling.explain import why_dropped
from scale_rae.scaling.select import Prompt, Ranking, metric_named, rank
from scale_rae.scaling.settings import Settings
from scale_rae.wording import after_no_drawing, as_request, is_bundled

MOST_IMAGES = 16
MOST_STEPS = 250
ANSWER_TOKENS = 128
PREVIEWS = 12  # pictures shown of one that forms
LARGEST_FILE = 64 << 20  # bytes of a picture or latent
MOST_CHARACTERS = 4000  # of a prompt or question

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)  # compared, and hashed, as the thing it is
class Drawing:
    """One image with all that can be taken home; `command` makes it again."""

    image: Image.Image
    latent: Tensor
    seed: int
    request: str
    command: str
    png: Path
    latent_file: Path
    manifest: Path


@dataclass(frozen=True)
class Progress:
    """Where sampling is. `pictures` are the images as far as they have formed."""

    done: float  # share of all network evaluations
    text: str
    pictures: list[Image.Image]


@dataclass(frozen=True)
class Drawn:
    """What a message gave: text, and drawings if the text asked for some. `command` makes them all."""

    text: str
    drawings: list[Drawing]
    command: str
    seconds: float


@dataclass(frozen=True)
class Judged:
    """One image of a best of N: `place` in the ranking from 0, its scores, and why it was dropped, if it was."""

    image: Image.Image
    latent: Tensor
    seed: int
    place: int
    kept: bool
    answer: str
    scores: dict[str, float | None]
    why: str | None


@dataclass(frozen=True)
class Ranked:
    """A best of N as far as it is: images best first; `drawings` of them (in that order) when it is done."""

    images: list[Judged]
    total: int
    progress: str
    drawings: list[Drawing]


class _Stopped(Exception):
    """The visitor has gone; ends the work."""


class _Emitter(Generic[T]):
    def __init__(self) -> None:
        self.said: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self.stopped = threading.Event()

    def check(self) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def __call__(self, value: T) -> None:
        self.check()
        self.said.put(value)


class _End: ...


def streamed(work: Callable[[_Emitter[T]], R]) -> Generator[T, None, R]:
    """Yields what `work` emits on a thread of its own, and returns what it returns or raises what it raises.

    Closed early, it makes the next `emit` or `emit.check()` of the work raise.
    """
    emit: _Emitter[T] = _Emitter()
    result: list[R] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work(emit))
        except BaseException as e:  # raised again where it is waited for
            error.append(e)
        finally:
            emit.said.put(_End())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not isinstance(value := emit.said.get(), _End):
            yield value
    finally:
        emit.stopped.set()
    thread.join()
    if error and isinstance(error[0], _Stopped):  # though somebody still listens
        raise ScaleRAEError("The page is ending.")
    if error:
        raise error[0]
    return result[0]


class Studio:
    """One model for all visitors, one of them at a time; `folder` gets what is drawn.

    `shown` gets copies, each in a folder whose name cannot be guessed: the page gives out all that is there, and of `folder`, which
    may hold other things, nothing. Without it, drawings are shown where they are.
    """

    def __init__(self, session: OpenedModel, choice: ModelChoice, folder: Path, shown: Path | None = None) -> None:
        self.session, self.choice, self.folder, self.shown = session, choice, folder, shown
        self.model: ScaleRAE = session.model
        self.turn = threading.Lock()
        self._rewards: dict[str, Reward] = {}
        self._under_way: weakref.WeakSet[_Emitter[Any]] = weakref.WeakSet()
        self._closed = False

    def close(self, patience: float = 20.0) -> None:
        """Ends what is under way at its next step, and waits for that."""
        self._closed = True
        for emit in list(self._under_way):
            emit.stopped.set()
        if self.turn.acquire(timeout=patience):
            self.turn.release()

    @contextlib.contextmanager
    def _turn(self, emit: _Emitter[Any]) -> Iterator[None]:
        """The model for one visitor's work; a visitor who leaves while waiting does not get it."""
        self._under_way.add(emit)
        while not self.turn.acquire(timeout=0.2):
            emit.check()
        try:
            if self._closed:
                raise _Stopped
            emit.check()
            yield
        finally:
            self.turn.release()

    @property
    def guides(self) -> bool:
        """Whether the checkpoint has a null embedding, without which there is no guidance."""
        return self.model.config.dit.null_condition

    @property
    def bundled(self) -> bool:
        """Whether the model is the one that comes with this package."""
        return is_bundled(self.model.source)

    # --- drawing -------------------------------------------------------------------------------------------------

    def draw(
        self, prompt: str, sampling: Sampling, latent_file: Path | None = None
    ) -> Generator[Progress, None, Drawn]:
        """Draws what a prompt asks for; after a latent, sends the prompt as it is and draws if the reply asks for it.

        Raises:
            ScaleRAEError: for a prompt, latent or setting that cannot be used, or a reply without a drawing (unless there
                is a latent, after which text is an answer too).
        """
        shown = self.latent(latent_file) if latent_file is not None else None
        request = prompt.strip() if shown is not None else self.request(prompt)
        check_length(request, "message")
        check_sampling(sampling)

        def work(emit: _Emitter[Progress]) -> Drawn:
            with self._turn(emit):
                start = time.perf_counter()
                watch = _Watch(self.model, emit, sampling.num_images)
                result = self.model.generate(
                    request,
                    num_images=sampling.num_images,
                    seed=sampling.seed,
                    guidance=sampling.guidance_level,
                    guidance_interval=sampling.guidance_interval,
                    steps=sampling.steps,
                    solver=sampling.solver,
                    max_new_tokens=sampling.max_new_tokens,
                    latents=None if shown is None else [shown],
                    callback=watch.step,
                )
                if not result.images and shown is None:
                    raise InputError(self._no_drawing(result.text))
                mode: dict[str, Any] = {"mode": "t2i"}
                if latent_file is not None:
                    mode = {"mode": "latent", "action": "continue", **input_latents([latent_file])}
                drawings = [
                    self._save(request, drawn.image, drawn.latent, drawn.seed, sampling, mode, result.text)
                    for drawn in result.images
                    if drawn.image is not None
                ]
                command = self.command(request, sampling, latent_file)
                return Drawn(result.text, drawings, command, time.perf_counter() - start)

        return (yield from streamed(work))

    def request(self, prompt: str) -> str:
        """The message that asks for a drawing of the prompt."""
        if not prompt.strip():
            raise InputError("Write a prompt first: what is to be drawn?")
        check_length(prompt, "prompt")
        return as_request(prompt.strip(), PROMPT_PREFIX)

    def command(self, request: str, sampling: Sampling, latent_file: Path | None = None) -> str:
        """The command line that draws the same."""
        choice = self.choice
        words = ["scale-rae", "t2i"]
        if latent_file is not None:
            words = ["scale-rae", "latent", "--action", "continue", "--latent", latent_file.name]
        options: dict[str, Any] = {
            "--model-path": choice.model_path,
            "--prompt": request,
            "--num-images": sampling.num_images if sampling.num_images > 1 else None,
            "--seed": sampling.seed,
            "--guidance-level": f"{sampling.guidance_level:g}",
            "--steps": sampling.steps,
            "--solver": sampling.solver,
            "--decoder-repo": choice.decoder_repo,
            "--revision": choice.revision,
            "--device": choice.device,
            "--dtype": choice.dtype,
            "--quantize": choice.quantize,
        }
        for name, value in options.items():
            if value is not None:
                words += [name, str(value)]
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
    ) -> Drawing:
        alone = dataclasses.replace(sampling, num_images=1, seed=seed)
        described = self.session.record()
        manifest = drawing_manifest(
            mode, request, {}, described, alone, [seed], 1, 1, text, self.session.seconds
        )  # of one image: an image does not depend on those drawn with it
        saved = save_run(self.folder, manifest, [Sample(image, latent, png_text(manifest, seed))], timestamp())
        png, latent_file = Path(saved["output_images"][0]), Path(saved["latent_path"])
        source = Path(mode["input_latents"][0]) if "input_latents" in mode else None
        return Drawing(
            image,
            latent,
            seed,
            request,
            self.command(request, alone, source),
            *self._copies(png, latent_file, png.with_name(f"{png.stem}_manifest.json")),
        )

    def _copies(self, *files: Path) -> list[Path]:
        """The files as the page gives them out."""
        if self.shown is None:
            return list(files)
        folder = self.shown / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        return [Path(shutil.copyfile(file, folder / file.name)) for file in files]

    # --- looking -------------------------------------------------------------------------------------------------

    def ask(
        self, question: str, latent: Tensor | None = None, image: Path | None = None
    ) -> Generator[str, None, tuple[str, bool]]:
        """Yields the answer as far as it goes; returns it, and whether it was cut off.

        Each question is asked by itself: checkpoints are trained on one turn.

        Raises:
            InputError: without a question, or an image that cannot be read.
        """
        if not question.strip():
            raise InputError("Write a question first.")
        check_length(question, "question")
        if latent is None and image is None:
            raise InputError("Choose a picture first: drop one, or pick one that was drawn.")

        def work(emit: _Emitter[str]) -> tuple[str, bool]:
            def listen(_: int, text: str) -> bool:
                emit(text)
                return True

            with self._turn(emit):
                shown = latent if latent is not None else self._encoded(image)
                (answer,) = self.model.answer(
                    question.strip(), latents=shown, max_new_tokens=ANSWER_TOKENS, listen=listen
                )
            return answer.text, len(answer.reply.ids) >= ANSWER_TOKENS

        return (yield from streamed(work))

    def picture(self, file: Path) -> Image.Image:
        """A picture that was dropped.

        Raises:
            InputError: naming the file, when it is no image that can be read.
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
        with self.turn:
            return self.model.decode([latent])[0]

    # --- best of N -----------------------------------------------------------------------------------------------

    def best_of(
        self, prompt: str, sampling: Sampling, keep: int, metric: str, reward_name: str | None
    ) -> Generator[Ranked, None, Ranked]:
        """Draws `sampling.num_images`, a few at a time, and yields the ranking of those there are after each few.

        Raises:
            ScaleRAEError: for settings that cannot be used, or a reward that cannot be loaded.
        """
        metric = metric_named(metric)
        request = self.request(prompt)
        check_sampling(sampling)
        total = sampling.num_images
        if not 1 <= keep <= total:
            raise InputError(f"Of {total} images, {keep} cannot be kept: keep 1 to {total}.")
        if metric == "image_reward" and reward_name is None:
            raise InputError("Ranking by reward needs a reward model: choose one, or rank by something else.")
        self.model.check_reads()
        text = prompt.strip()

        def work(emit: _Emitter[Ranked]) -> Ranked:
            with self._turn(emit):
                reward = self._reward(reward_name)
                reply = self.model.reply([request], max_new_tokens=sampling.max_new_tokens)[0]
                said = self.model.tokenizer.decode(reply.ids)
                if reply.condition is None:
                    raise InputError(self._no_drawing(said))
                ranking = _Rankings(text, self.choice.model_path, sampling, keep, metric, reward_name, said)
                options = SamplingOptions(
                    sampling.steps, sampling.solver, sampling.guidance_level, sampling.guidance_interval
                )
                at_once = 2 if self.model.device.type == "cpu" else 8
                self.model.expect(total)
                while (start := len(ranking.seeds)) < total:
                    count = min(at_once, total - start)
                    seeds = [image_seed(sampling.seed, 0, start + j) for j in range(count)]

                    def step(done: int, of: int, *_: object, first: int = start, last: int = start + count) -> None:
                        emit.check()
                        if done % max(1, of // 6) == 0:
                            emit(ranking.now(f"Drawing {first + 1} to {last} of {total}: {done} of {of}"))

                    latents = self.model.sample([reply.condition] * count, seeds, options, callback=step)
                    images = self.model.decode(latents)
                    emit(ranking.now(f"Judging {start + 1} to {start + count} of {total}"))
                    scores = self.model.score(latents, text, request=request, request_reply=reply)
                    rewards = reward.score(images, text) if reward is not None else None
                    ranking.add(seeds, latents, images, [judgement(score) for score in scores], rewards)
                    emit(ranking.now(f"{len(ranking.seeds)} of {total} drawn and judged"))
                done = ranking.now(f"{total} drawn, the best {keep} kept")
                drawings = [
                    self._save(request, judged.image, judged.latent, judged.seed, sampling, {"mode": "t2i"}, said)
                    for judged in done.images
                ]
                return dataclasses.replace(done, drawings=drawings)

        return (yield from streamed(work))

    def _no_drawing(self, text: str) -> str:
        said = f' ("{text.strip()}")' if text.strip() else ""
        return f"The model answered without drawing{said}; {after_no_drawing(self.model.source)}"

    def _reward(self, name: str | None) -> Reward | None:
        if name is None:
            return None
        if name not in self._rewards:
            self._rewards[name] = load_reward(name, self.model)
        return self._rewards[name]


class _Watch:
    """The sampler's callback: shows every few evaluations what forms."""

    def __init__(self, model: ScaleRAE, emit: _Emitter[Progress], images: int) -> None:
        self._model, self._emit, self._images = model, emit, images
        self._finished: list[Image.Image] = []
        self._forming: list[Image.Image] = []
        self._lowest = 1.0

    def step(self, evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        self._emit.check()
        if evaluation == 1:  # of another batch
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
                return  # the sampler will say what is wrong
            of = (len(self._finished) * evaluations + len(x) * evaluation) / (self._images * evaluations)
            text = f"Step {evaluation} of {evaluations}"
            if self._images > len(x):
                text += f", images {len(self._finished) + 1} to {len(self._finished) + len(x)} of {self._images}"
            self._emit(Progress(min(of, 1.0), text, self._finished + self._forming))


class _Rankings:
    """Images of one prompt and what is said of them; ranks those there are."""

    def __init__(
        self, prompt: str, model_path: str, sampling: Sampling, keep: int, metric: str, reward: str | None, text: str
    ) -> None:
        self._settings = Settings(
            metadata_file="",
            model_path=model_path,
            n_samples=keep,
            scaling_rounds=1,
            prompt_prefix=PROMPT_PREFIX,
            seed=sampling.seed,
            reward=reward,
        )
        self._prompt, self._metric, self._text, self._total = PromptRecord(1, prompt, 0), metric, text, 0
        self._total, self._keep = sampling.num_images, keep
        self.seeds: list[int] = []
        self._latents: list[Tensor] = []
        self._images: list[Image.Image] = []
        self._judged: list[dict[str, Any]] = []
        self._rewards: list[float] | None = None if reward is None else []
        self._last: list[Judged] = []

    def add(
        self,
        seeds: Sequence[int],
        latents: Sequence[Tensor],
        images: Sequence[Image.Image],
        judged: Sequence[dict[str, Any]],
        rewards: Sequence[float] | None,
    ) -> None:
        """More images; raises InputError when a score is no number."""
        check_finite(judged, rewards)
        self.seeds += seeds
        self._latents += latents
        self._images += images
        self._judged += judged
        if self._rewards is not None and rewards is not None:
            self._rewards += rewards
        self._last = self._rank()

    def now(self, progress: str) -> Ranked:
        return Ranked(self._last, self._total, progress, [])

    def _rank(self) -> list[Judged]:
        count = len(self.seeds)
        record = prompt_record(self._settings, self._prompt, self._text, self.seeds, self._judged, self._rewards)
        prompt = Prompt(Path("this prompt"), record, [Path(f"{i:05}.png") for i in range(count)])
        ranking = rank(prompt, self._metric)
        keep = min(self._keep, count)
        return [self._one(prompt, ranking, keep, place, i) for place, i in enumerate(ranking.order)]

    def _one(self, prompt: Prompt, ranking: Ranking, keep: int, place: int, i: int) -> Judged:
        judged = self._judged[i]
        scores: dict[str, float | None] = {self._metric: ranking.scores[i]}
        if self._rewards is not None:
            scores["reward"] = self._rewards[i]
        if judged["answer"] != "uncertain":
            scores["confidence"] = judged[f"{judged['answer']}_conf_score"]
        scores |= {name: judged[name] for name in ("prompt_loss", "prompt_conf_score", "image_conf_score")}
        why = why_dropped(prompt, ranking, keep, self._metric, i)
        return Judged(
            self._images[i], self._latents[i], self.seeds[i], place, place < keep, judged["answer"], scores, why
        )


def check_sampling(sampling: Sampling) -> None:
    """Raises InputError for values that the page's model should not be asked for."""
    if not 1 <= sampling.num_images <= MOST_IMAGES:
        raise InputError(f"{sampling.num_images} images: the page draws 1 to {MOST_IMAGES} at a time.")
    if not 0 <= sampling.seed < 2**63:
        raise InputError(f"seed {sampling.seed}: must be at least 0 and less than 2^63")
    if sampling.steps > MOST_STEPS:
        raise InputError(f"{sampling.steps} steps: the page takes at most {MOST_STEPS}.")
    SamplingOptions(sampling.steps, sampling.solver, sampling.guidance_level, sampling.guidance_interval).check()


def check_length(text: str, what: str) -> None:
    """Raises InputError for a text that the page's fields do not hold."""
    if len(text) > MOST_CHARACTERS + len(PROMPT_PREFIX):
        raise InputError(f"The {what} has {len(text):,} characters: the page takes at most {MOST_CHARACTERS:,}.")


def without_folder(text: str, file: Path) -> str:
    """An error's text with a file's name for its path, which is the server's own."""
    return text.replace(str(file), file.name)


def new_seed() -> int:
    """A seed that fits a number field."""
    return int(torch.randint(0, 2**31 - 1, (1,), generator=torch.Generator().manual_seed(time.time_ns() % 2**63)))
