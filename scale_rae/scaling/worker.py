"""A worker: one device that draws, scores and writes prompts until none is left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from scale_rae.clock import StageClock
from scale_rae.config import ScaleRAEConfig, load_config
from scale_rae.errors import InputError, OutputError, ScaleRAEError, counted
from scale_rae.options import ModelChoice, memory_bytes
from scale_rae.outputs import latent_bytes, png_bytes
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.batches import BatchMaker, Replied, Turn
from scale_rae.scaling.events import ImagesDrawn, Listener, Message, PromptFailed, PromptFinished, WorkerLoaded
from scale_rae.scaling.experiment import check_finite, png_text
from scale_rae.scaling.joining import join_experiment, with_reward
from scale_rae.scaling.lanes import Lanes, split
from scale_rae.scaling.records import Batch
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.waves import WaveWriter
from scale_rae.student import own_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scale_rae.hub import Source
    from scale_rae.opening import LoadingBar, OpenedModel

MOST_PER_THREAD = 4  # images that a thread of a CPU draws together; more are hardly faster
WAIT = 0.5  # seconds between looks at prompts that other workers are drawing
ENCODERS = 4  # threads that compress PNGs while the model scores


@dataclass(frozen=True)
class Assignment:
    """What a worker has to do: its own prompts, then the rest, as far as no other worker has begun them.

    Prompts come in groups that are drawn together, of one prompt each except in adaptive searches; a group has all its
    prompts, also those that are finished.

    `description` is experiment.json's part on settings and prompts. `failed_before` has the time of failure (ns) of prompts
    that failed in earlier runs: a prompt that failed since then is not tried again.
    """

    worker: int  # its number, from 0
    device: str | None
    own: Sequence[Sequence[PromptRecord]]
    rest: Sequence[Sequence[PromptRecord]]
    description: dict[str, Any]
    failed_before: dict[int, int] = field(default_factory=dict)
    debug: bool = False


def work(
    store: Store, settings: Settings, assignment: Assignment, listen: Listener, bars: LoadingBar | None = None
) -> dict[str, float]:
    """Carries out an assignment: loads the models, draws; returns the seconds per stage.

    Raises:
        ScaleRAEError: when model or reward cannot be loaded or are not the experiment's, or a result not written.
    """
    with open_worker(store, settings, assignment, listen, bars) as worker:
        left = [group for group in (*assignment.own, *reversed(assignment.rest)) if not worker.attempt(group)]
        if left:
            worker.log(f"waiting for {counted(sum(map(len, left)), 'prompt')} that other workers are drawing")
        while left := [group for group in left if not worker.attempt(group)]:
            time.sleep(WAIT)  # the lock of a worker that dies is free
        worker.log("done")
    return worker.seconds()


def open_worker(
    store: Store, settings: Settings, assignment: Assignment, listen: Listener, bars: LoadingBar | None = None
) -> Worker:
    """A worker whose models are loaded and are the experiment's. For a `with`.

    Raises:
        ScaleRAEError: when model or reward cannot be loaded, or are not the experiment's.
    """
    from scale_rae.noise import check_noise
    from scale_rae.opening import find_model

    store.make_folders()
    store.log(assignment.worker, f"process {os.getpid()}, device {assignment.device or 'default'}")

    def say(text: str) -> None:
        if assignment.worker == 0:  # all workers would say the same
            listen(Message(text))

    clock = StageClock()
    with clock.timed("loading"):
        choice = settings.model_choice(assignment.device)
        if settings.memory is not None:
            from scale_rae.machine import limit_process
            from scale_rae.memory import pick_device

            limit_process(pick_device(assignment.device), memory_bytes(settings.memory) or 0)
        check_noise(settings.options.noise)  # of this node of a cluster
        source = find_model(choice)
        recorded = store.read_experiment()
        settings = _with_the_models_own(settings.resumed(recorded), load_config(source.config_folder))
        opened = _open_model(choice, source, settings, assignment, bars)
        model = opened.model
        settings = with_reward(settings, model, say)
        reward = None
        if settings.reward is not None:
            from scale_rae.rewards import load_reward

            reward = load_reward(settings.reward, model, settings.reward_path)
        trial = BatchMaker(settings, model, reward)  # whose seconds do not count
        if settings.is_adaptive:
            trial.searcher()  # raises what would fail with every prompt
        prompts = [prompt for group in (*assignment.own, *assignment.rest) for prompt in group]
        measure = partial(trial.largest_batch, prompts)
        batch_size = join_experiment(store, settings, recorded, assignment.description, opened, reward, say, measure)
        # The whole experiment's, so that what is compiled does not depend on who draws how much of it.
        model.expect(assignment.description["prompts"]["count"] * settings.usual_total)
        maker = BatchMaker(settings, model, reward, clock)
        worker = Worker(store.with_settings(settings), maker, batch_size, assignment, listen)
    worker.log(f"loaded in {clock.seconds()['loading']:.1f} s; batches of {batch_size}")
    listen(WorkerLoaded(assignment.worker, str(model.device)))
    return worker


def _open_model(
    choice: ModelChoice, source: Source, settings: Settings, assignment: Assignment, bars: LoadingBar | None
) -> OpenedModel:
    """The model, loaded with all that drawing and judging need; its GPU is torch's current one."""
    from scale_rae.opening import OpenedModel

    opened = OpenedModel(
        choice,
        bars,
        source=source,
        decoder=True,
        encoder=settings.post_qa_mode == "image",
        debug=assignment.debug,
        split_batches=False,  # the worker itself knows which images belong together
    )
    model = opened.model
    model.check_reads()
    _ = model.encoder  # its files are recorded; its weights are not loaded where no picture is read
    if model.device.type == "cuda" and model.device.index is not None:
        import torch

        torch.cuda.set_device(model.device)  # otherwise libraries take memory of cuda:0
    return opened


def _with_the_models_own(settings: Settings, config: ScaleRAEConfig) -> Settings:
    """The settings with a student's sampling options, and the times of an adaptive search's looks.

    Raises:
        OptionError: for options that the model does not take, before the weights are read.
    """
    settings = dataclasses.replace(settings, options=own_options(config.student, settings.options))
    if not settings.is_adaptive:
        return settings
    from scale_rae.adaptive import check_looks, with_looks

    check_looks(settings.adaptive, settings.options, config)
    return dataclasses.replace(settings, adaptive=with_looks(settings.adaptive, settings.options, config))


def draws_on_threads(device: torch.device) -> bool:
    """Whether each thread of the device draws some images by itself (a CPU).

    Other devices draw whole batches.
    """
    return device.type == "cpu"


class Worker:
    """Draws, scores and writes one prompt at a time, in batches of `batch_size`.

    For a `with`, which ends its threads. On a CPU, torch has one thread of arithmetic until the end of the `with`, and a pool
    of threads draws images. Each thread draws as many together as come out as if drawn alone: an image and its scores do not
    depend on workers, cores or the batch size.
    """

    def __init__(
        self, store: Store, maker: BatchMaker, batch_size: int, assignment: Assignment, listen: Listener
    ) -> None:
        self._store, self._maker, self._batch_size = store, maker, batch_size
        self._assignment, self._listen = assignment, listen
        self._settings, self._model = maker.settings, maker.model
        self._fits = batch_size  # images that the device has memory for
        self._drawn = 0  # images
        self._counting = threading.Lock()
        self._lanes = Lanes(self._model, maker.stop) if self._model.device.type == "cuda" else None
        self._threads: ThreadPoolExecutor | None = None
        self._per_thread = 1  # images that each of them draws together
        with contextlib.ExitStack() as stack:
            if draws_on_threads(self._model.device):
                self._threads, self._per_thread = self._start_threads(stack)
            self._encoders = stack.enter_context(ThreadPoolExecutor(ENCODERS))
            self._open = stack.pop_all()

    def _start_threads(self, stack: contextlib.ExitStack) -> tuple[ThreadPoolExecutor, int]:
        """(a pool of drawing threads, how many images each draws together).

        They come out to the bit as if drawn alone.
        """
        import torch

        from scale_rae.cpu import one_thread

        options = [self._maker.options]
        if options[0].interval is not None:  # outside the interval there is no guidance
            options.append(dataclasses.replace(options[0], guidance=1.0, interval=None))
        threads = stack.enter_context(one_thread())
        most = min(MOST_PER_THREAD, -(-min(self._batch_size, self._settings.total) // threads))
        per_thread = self._model.exact_batch(most, options, one_prompt=not self._settings.is_adaptive)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        return stack.enter_context(pool), per_thread

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._maker.stop()
        self._open.close()

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, summed over threads."""
        return self._maker.clock.seconds()

    def log(self, text: str) -> None:
        """Adds a line to the worker's log."""
        self._store.log(self._assignment.worker, text)

    def _say(self, text: str) -> None:
        """Adds a line to the worker's log, and shows it."""
        self.log(text)
        self._listen(Message(text))

    def attempt(self, group: Sequence[PromptRecord]) -> bool:
        """Draws what is missing of a group of prompts; False when another worker draws it.

        Prompts that failed in this run already are left out. A group that fails is tried again prompt by prompt, and a prompt
        once more in smaller batches; a prompt that fails again is recorded as failed.

        Raises:
            OutputError: when something cannot be written.
        """
        lock = self._store.lock_prompt(group[0].index)
        if lock is None:
            return False
        with lock:
            todo = [prompt for prompt in group if self._is_to_do(prompt)]
            if todo and len(group) > 1:
                error = self._try(group, todo, self._batch_size)
                if error is None:
                    return True
                self._say(f"prompts {', '.join(str(p.index) for p in todo)}: {error}; each is tried alone")
                todo = [prompt for prompt in todo if self._is_to_do(prompt)]
            for prompt in todo:
                self._try_alone(prompt)
        return True

    def _try_alone(self, prompt: PromptRecord) -> None:
        """Draws what is missing of a prompt.

        If that fails, it is tried once more in smaller batches; a second failure is recorded.
        """
        size = self._batch_size
        error = self._try([prompt], [prompt], size)
        if error is not None:
            smaller = max(1, size // 2)
            self._say(f"prompt {prompt.index} failed ({error}); once more in batches of {smaller}")
            error = self._try([prompt], [prompt], smaller)
        if error is not None:
            self._store.fail(prompt.index, error, 2)
            self._listen(PromptFailed(prompt.index, error))

    def _is_to_do(self, prompt: PromptRecord) -> bool:
        """Whether a prompt is unfinished, and has not failed in this run."""
        if self._store.check(prompt)[0]:
            return False
        failure = self._store.failure(prompt.index)
        return failure is None or failure[0] == self._assignment.failed_before.get(prompt.index)

    def _try(self, group: Sequence[PromptRecord], todo: Sequence[PromptRecord], size: int) -> str | None:
        """Why what a group's prompts lack cannot be drawn in batches of `size`; None once it is drawn."""
        start, drawn, before = time.perf_counter(), self._drawn, self.seconds()
        failed = None
        try:
            if self._settings.is_adaptive:
                self._search(group, todo, size)
            else:
                self._draw(todo[0], size)
            with self._maker.clock.timed("writing"):
                records = [self._store.finish(prompt) for prompt in todo]
        except OutputError:
            raise
        except Exception as e:
            error = str(e) if isinstance(e, ScaleRAEError) else f"{type(e).__name__}: {e}"
            which = ", ".join(str(p.index) for p in todo)
            self.log(f"prompt{'s' if len(todo) > 1 else ''} {which} failed: {error}\n{traceback.format_exc()}")
            failed = error
        if failed is not None:  # outside the handler, where the error no longer holds tensors
            self._model.release_memory()
            return failed
        spent = {stage: value - before.get(stage, 0.0) for stage, value in self.seconds().items()}
        spent["total"] = time.perf_counter() - start
        for i, (prompt, record) in enumerate(zip(todo, records, strict=True)):
            answers = [entry["answer"] for entry in record["text_responses"].values()]
            self.log(f"prompt {prompt.index} done: {prompt.prompt}")
            new, seconds = (self._drawn - drawn, spent) if i == 0 else (0, {})  # of the group
            yes = answers.count("yes")
            self._listen(PromptFinished(prompt.index, prompt.prompt, len(answers), yes, new, seconds))
        return None

    def _search(self, group: Sequence[PromptRecord], todo: Sequence[PromptRecord], size: int) -> None:
        """Has an adaptive search draw what is missing of the prompts that are drawn together."""
        with self._maker.clock.timed("reply"):
            replies = self._maker.replies(group)
        for replied in replies:
            self._check_asks(replied)
        from scale_rae.adaptive import Batching

        if self._threads is None:
            batching = Batching(size, size)
        else:
            batching = Batching(self._per_thread, 1, self._threads.map)

        def searching(some: Sequence[Replied], turn: Turn | None) -> Callable[[], None]:
            searcher, exact = self._maker.searcher(batching, turn), self._threads is not None
            writer = WaveWriter(self._store, self._model, searcher, self._encoders, exact, self._count)
            indices = {replied.prompt.index for replied in some}
            return partial(writer.search, some, [prompt for prompt in todo if prompt.index in indices])

        if self._lanes is None:
            searching(replies, None)()
        else:
            self._lanes.run([searching(some, self._lanes.turn) for some in split(replies)])

    def _count(self, images: int) -> None:
        """Counts images that were drawn, in any thread, and reports them."""
        with self._counting:
            self._drawn += images
            self._listen(ImagesDrawn(images))

    def _check_asks(self, replied: Replied) -> None:
        """Raises InputError for a reply that asks for no image, or a question that cannot be asked."""
        reply = replied.reply
        if reply.condition is None:
            text = self._model.tokenizer.decode(reply.ids).strip()
            cut = len(reply.ids) >= self._settings.max_new_tokens
            hint = f" within --max-new-tokens {self._settings.max_new_tokens}" if cut else ""
            raise InputError(f"the model's reply asks for no image{hint}: {text[:200]!r}")
        self._model.check_question(replied.prompt.prompt, self._settings.question)  # before anything is drawn

    def _draw(self, prompt: PromptRecord, size: int) -> None:
        """Draws the images that are missing of a prompt, in batches of `size`."""
        there = {i for batch in self._store.reopen(prompt.index) for i in batch.samples}
        missing = [
            run
            for samples in self._settings.slices(self._batch_size)
            for run in _runs([i for i in samples if i not in there])
        ]
        if missing:
            with self._maker.clock.timed("reply"):
                replied = self._maker.reply(prompt)
            self._check_asks(replied)
            for samples in missing:
                self._draw_samples(replied, samples, size)

    def _draw_samples(self, replied: Replied, samples: Sequence[int], size: int) -> None:
        """Draws samples in batches of `size`, or of fewer once memory has run out."""
        from scale_rae import memory

        left = list(samples)
        while left:
            batch = left[: min(size, self._fits)]
            failed = False
            try:
                self._draw_batch(replied, batch)
            except Exception as e:
                if not memory.out_of_memory(e) or len(batch) == 1:
                    raise
                failed = True
            if failed:  # outside the handler, where the error no longer holds tensors
                self._fits = len(batch) // 2
                self._say(
                    f"prompt {replied.prompt.index}: out of memory with {len(batch)} images at once; going on with "
                    f"{self._fits}"
                )
                self._model.release_memory()
                continue
            left = left[len(batch) :]

    def _draw_batch(self, replied: Replied, samples: Sequence[int]) -> None:
        """Draws, scores and writes one batch. On a CPU its images are drawn in parts, and scored one by one."""
        from scale_rae.noise import image_seed

        settings, maker, on_threads = self._settings, self._maker, self._threads is not None
        prompt = replied.prompt
        seeds = [image_seed(settings.seed, prompt.index, i) for i in samples]
        part_size = self._per_thread if on_threads else len(seeds)
        parts = [seeds[i : i + part_size] for i in range(0, len(seeds), part_size)]
        latents: list[Tensor] = []
        pngs: list[Future[bytes]] = []
        judged: list[dict[str, Any]] = []
        rewards: list[float] = []
        run = map if self._threads is None else self._threads.map
        drawn = run(lambda part: maker.draw(replied, part, 1 if on_threads else len(part)), parts)
        for part, (part_latents, images) in zip(parts, drawn, strict=True):
            pngs += [  # compressed while the model scores
                self._encoders.submit(png_bytes, image, png_text(settings, replied.request, seed))
                for image, seed in zip(images, part, strict=True)
            ]
            latents += part_latents
            scored_at_once = 1 if on_threads else len(part)
            for i in range(0, len(part), scored_at_once):
                some = slice(i, i + scored_at_once)
                some_judged, some_rewards = maker.score(replied, part_latents[some], images[some])
                judged += some_judged
                rewards += some_rewards
        check_finite(judged, rewards)
        with maker.clock.timed("writing"):
            files = {f"{i:05}.png": png.result() for i, png in zip(samples, pngs, strict=True)}
            if settings.save_latents:
                files |= {f"{i:05}_latent.pt": latent_bytes(x) for i, x in zip(samples, latents, strict=True)}
            text = self._model.tokenizer.decode(replied.reply.ids)
            batch = Batch(samples[0], text, seeds, judged, rewards or None, {})
            self._store.save_batch(prompt.index, batch, files)
        self._count(len(seeds))


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Splits rising numbers into runs without gaps."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs
