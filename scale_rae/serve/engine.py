"""The threads that own the model, and the stages of a job: waiting requests are answered and drawn in batches.

A job (one request) goes through up to three stages, each for several jobs at once:

    reply    the images of its turns are encoded and the model answers; an answer may ask for images
    draw     images with equal `SamplingOptions`, of any prompts and seeds, are sampled and decoded as one batch
    rank     if only the best images are to be returned, all are scored

A search (`best_of: "auto"`) has other stages after its reply, in turn until enough candidates are accepted, each of them for
candidates of several jobs at once:

    advance  candidates at the same step are drawn up to the next look, or to their end
    look     the model and the reward score what they are; acceptance.py says what becomes of them

On a GPU, one thread runs batches of up to `batch_size`; an image differs from the same image drawn alone by rounding only. On the
CPU, as in `scaling.worker`, there is one thread per core, and each computes with one thread of torch. Then an image drawn in a batch
has the bytes of the same image drawn alone, which `ScaleRAE.exact_batch` checks before the first request. Replies are computed one
at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scale_rae import acceptance, adaptive
from scale_rae.adaptive import Batching, Drawn, Search, Searcher
from scale_rae.errors import DeviceError, InputError, counted
from scale_rae.flow import StepCallback
from scale_rae.language import Conversation, Reply
from scale_rae.manifest import text_chunks
from scale_rae.options import SamplingOptions, SearchOptions, to_record
from scale_rae.outputs import picture_bytes
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import Turn
from scale_rae.ranking import Verdicts, rank
from scale_rae.rewards import Reward
from scale_rae.scores import Asked
from scale_rae.serve.jobs import Job, Result, ResultImage
from scale_rae.serve.metrics import Metrics
from scale_rae.serve.refusals import Refused, shutting_down
from scale_rae.serve.schedule import BatchSizes, Schedule, Stage, Task, Tile
from scale_rae.serve.settings import OWN_JUDGEMENT
from scale_rae.wording import after_no_drawing

BATCH_CPU, BATCH_GPU = 4, 32
LINGER = 0.005  # seconds that an idle GPU waits for requests that come with the first
_log = logging.getLogger("scale_rae.serve")


class Engine:
    """Takes jobs by `submit` once `start` has been called and `ready` is set; `close` ends the threads."""

    def __init__(
        self,
        load: Callable[[], tuple[ScaleRAE, dict[str, Reward]]],
        metrics: Metrics | None = None,
        *,
        most_jobs: int = 128,
        batch_size: int | None = None,
        warm_up: bool | None = None,
        debug: bool = False,
    ) -> None:
        self._load, self.metrics, self.most_jobs = load, metrics or Metrics(), most_jobs
        self._wanted_batch, self._warm_up, self._debug = batch_size, warm_up, debug
        self.model: ScaleRAE  # set when `ready` is
        self.rewards: dict[str, Reward] = {}
        self.sizes = BatchSizes(1)
        self.error: BaseException | None = None  # why the model could not be loaded
        self.ready = threading.Event()
        self.loaded = threading.Event()  # ready, or there is an error
        self.draining = False
        self._closed = False
        self._wake = threading.Condition()
        self._schedule = Schedule()
        self._threads: list[threading.Thread] = []
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="png")

    # --- from other threads --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to load the model, on the thread that will own it."""
        thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._threads.append(thread)
        thread.start()

    def submit(self, *jobs: Job) -> None:
        """Takes jobs, all at once.

        Raises:
            Refused: while loading or shutting down (503), or with too many jobs already (429).
        """
        with self._wake:
            self.check_open()
            for job in jobs:
                self._schedule.add(Task(job, self.model.tokenizer.text_stream()))
            self._wake.notify_all()
        self._count()

    def check_open(self) -> None:
        """Raises what `submit` would."""
        if self.draining or self._closed:
            raise shutting_down()
        if not self.ready.is_set():
            raise Refused(503, "loading", "the model is still loading")
        if self.jobs >= self.most_jobs:
            raise Refused(429, "queue_full", f"{self.most_jobs} requests are waiting or under way; try again later")

    def searcher(self, keep: int, most: int, reward: str, options: SamplingOptions) -> Searcher:
        """What draws a job's candidates, at most `most`, until `keep` are accepted. `reward` is as in a Job.

        Raises:
            ConfigError: for a checkpoint that cannot read the latents it draws.
        """
        batching = Batching(draw=self.sizes.most, read=self.sizes.most)
        search = SearchOptions(max_candidates=most)
        return Searcher(self.model, self.rewards.get(reward), keep, search, options, batching, watch=self._count_fate)

    def cancel(self, job: Job) -> None:
        """Drops a job whose client has gone or whose time is over; its computation ends at the next step."""
        with self._wake:
            task = self._schedule.tasks.get(job)
            if task is not None:
                task.left = True
                self._forget(task)

    def drain(self) -> None:
        """Takes no more jobs, refuses those that have not begun, and lets the rest end."""
        with self._wake:
            self.draining = True
            waiting = [task for task in self._schedule.tasks.values() if not task.begun]
            self._wake.notify_all()
        for task in waiting:
            self._finish(task, shutting_down())

    @property
    def jobs(self) -> int:
        """How many jobs are waiting or under way."""
        return len(self._schedule.tasks)

    @property
    def waiting_to_draw(self) -> int:
        """How many jobs have their reply, and wait until the first of their images is drawn."""
        return self._schedule.waiting_to_draw

    @property
    def idle(self) -> bool:
        """Whether no job is left."""
        return not self.jobs

    @property
    def batch_size(self) -> int:
        """The most images in a batch."""
        return self.sizes.most

    def abandon(self) -> None:
        """Refuses the jobs that are left; the threads end at their next step."""
        with self._wake:
            self._closed = self.draining = True
            left = list(self._schedule.tasks.values())
            self._wake.notify_all()
        for task in left:
            self._finish(task, shutting_down())

    def close(self) -> None:
        """Ends the threads; jobs that are left fail."""
        self.abandon()
        for thread in self._threads:
            thread.join()
        self._encoders.shutdown()

    def wait_hint(self) -> int:
        """Seconds after which a request may be accepted again."""
        rate = self.metrics.images_per_second()
        return max(1, min(60, round(0.25 * self.jobs / rate))) if rate else 2

    def summary(self) -> str:
        """The device and the batch size, in words."""
        threads = self.sizes.threads or 1
        if threads == 1:
            return f"{self.model.device}, up to {counted(self.batch_size, 'image')} at once"
        return f"{self.model.device}, {threads} threads of up to {counted(self.batch_size, 'image')}"

    def report(self, error: BaseException) -> None:
        """Logs an unexpected error without its text, which may quote what people wrote."""
        trace, place = error.__traceback__, "?"
        while trace is not None:
            code = trace.tb_frame.f_code
            place = f"{trace.tb_frame.f_globals.get('__name__', '?')}.{code.co_name}:{trace.tb_lineno}"
            trace = trace.tb_next
        _log.error("unexpected %s in %s", type(error).__name__, place, exc_info=error if self._debug else None)

    # --- the model's threads -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.model, self.rewards = self._load()
            self.sizes = self._choose_sizes()
            warm_up = self.model.device.type == "cuda" if self._warm_up is None else self._warm_up
            if warm_up and not self._on_cpu:
                self.warm()
        except BaseException as e:
            self.error = e
            self.loaded.set()
            return
        for i in range(1, self.sizes.threads or 1):
            thread = threading.Thread(target=self._work, name=f"model-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.ready.set()
        self.loaded.set()
        self._work()

    def _choose_sizes(self) -> BatchSizes:
        if not self._on_cpu:
            return BatchSizes(self._wanted_batch or min(BATCH_GPU, self.model.batch_size))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        options = self._kinds(SamplingOptions())
        most = self.model.exact_batch(self._wanted_batch or BATCH_CPU, options, one_prompt=False)
        return BatchSizes(most, threads)

    @property
    def _on_cpu(self) -> bool:
        return self.model.device.type == "cpu"

    def _kinds(self, options: SamplingOptions) -> list[SamplingOptions]:
        """The options for each kind of pass: without guidance and, if the model has it, with. A student has one kind."""
        config = self.model.config
        if config.student is not None:
            return [config.student.sampling(SamplingOptions())]
        return [replace(options, guidance=g) for g in ((1.0, 3.0) if config.dit.null_condition else (1.0,))]

    def warm(self) -> None:
        """Compiles and captures for every batch size, so that no request has to wait for that."""
        self.model.expect(1 << 40)  # a server will draw many
        config = self.model.config
        message = [Turn("user", "Can you generate a photo of a cat?")]
        for size in self.sizes.all:
            start = time.perf_counter()
            conversation = Conversation(self.model.tokenizer.conversation(message))
            for _ in range(2):  # a pass is captured when it comes again
                self.model.converse([conversation] * size, [8] * size)
            condition = torch.zeros(config.tokens, config.dit.condition_width, dtype=self.model.dtype)
            latents: list[Tensor] = []
            for options in self._kinds(SamplingOptions(steps=2)):
                latents = self.model.sample(_all_distinct([condition] * size), range(size), options, size)
            for _ in range(2):
                self.model.decode(latents, batch_size=size)
            _log.info("warmed up for batches of %d in %.1f s", size, time.perf_counter() - start)
            if self._closed:
                return

    def _work(self) -> None:
        if self._on_cpu:
            torch.set_num_threads(1)  # each thread has a setting of its own
        stages: dict[Stage, Callable[[Any], None]] = {
            Stage.REPLY: self._answer,
            Stage.DRAW: self._draw,
            Stage.RANK: self._rank,
            Stage.ADVANCE: self._advance,
            Stage.LOOK: self._look,
        }
        while (work := self._take()) is not None:
            stage, batch = work
            try:
                stages[stage](batch)
            except _Deserted:
                pass  # `_take` drops its tasks
            except BaseException as e:  # a defect; the stages handle the errors that they expect
                self.report(e)
                for item in batch:
                    self._finish(_task_of(item), e)

    def _take(self) -> tuple[Stage, list[Any]] | None:
        """The next batch; None when the threads are to end."""
        idle = False
        with self._wake:
            while not self._closed:
                self._drop_dead()
                if not self._schedule.has_work:
                    self._wake.wait(1.0)
                    idle = not self._on_cpu
                elif idle:
                    idle = False
                    end = time.monotonic() + LINGER
                    while not self._closed and (left := end - time.monotonic()) > 0:
                        self._wake.wait(left)
                else:
                    batch = self._schedule.next(self.sizes)
                    self._count()
                    return batch
        return None

    def _drop_dead(self) -> None:
        """Takes tasks that nobody waits for out of the queues. Their requests have been answered by then."""
        for task in [task for task in self._schedule.tasks.values() if task.dead]:
            task.left = True
            self._forget(task)

    def _forget(self, task: Task) -> None:
        self._schedule.remove(task)
        self._count()

    def _finish(self, task: Task, outcome: Result | BaseException) -> None:
        with self._wake:
            if task.over:
                return
            self._forget(task)
        task.job.emit(outcome)

    def _count(self) -> None:
        begun = [task.begun for task in list(self._schedule.tasks.values())]
        self.metrics.waiting.set(len(begun) - sum(begun))
        self.metrics.running.set(sum(begun))

    # --- stages --------------------------------------------------------------------------------------------------

    def _answer(self, tasks: list[Task]) -> None:
        self.metrics.batch.labels("reply").observe(len(tasks))
        try:
            with self.metrics.stage("encode"):
                self._encode(tasks)
        except Exception as e:
            self._one_by_one(self._answer, tasks, e)
            return
        ready: list[Task] = []
        conversations: list[Conversation] = []
        for task in tasks:
            try:
                conversation = self._conversation(task)
            except InputError as e:
                field = task.job.text_field
                self._finish(task, Refused(400, "invalid_value", f"{field}: {e}", field))
            else:
                ready.append(task)
                conversations.append(conversation)
        if not ready:
            return
        try:
            with self.metrics.stage("reply"):
                replies = self._replies(ready, conversations)
        except Exception as e:
            self._one_by_one(self._answer, ready, e)
            return
        for task, reply in zip(ready, replies, strict=True):
            self._go_on(task, reply)
        self._count()

    def _encode(self, tasks: list[Task]) -> None:
        """Sets the latents of the turns' images."""
        pending = [(task, task.job.pixels) for task in tasks if task.job.pixels is not None and not task.latents]
        if not pending:
            return
        latents = iter(self.model.encode_pixels(torch.cat([pixels for _, pixels in pending])))
        for task, pixels in pending:
            task.latents = [next(latents) for _ in range(len(pixels))]

    def _conversation(self, task: Task) -> Conversation:
        """A task's turns as the model reads them.

        Raises:
            InputError: when they are longer than what the model reads.
        """
        ids = self.model.tokenizer.conversation(task.job.turns, task.job.system)
        conversation = Conversation(ids, latents=task.latents)
        self.model.longest_reply(conversation)
        task.prompt_tokens = len(ids) + (self.model.config.tokens - 1) * len(task.latents)
        return conversation

    def _replies(self, tasks: list[Task], conversations: list[Conversation]) -> list[Reply]:
        """The replies; their text is emitted as it is written."""
        chosen = [0] * len(tasks)

        def listen(row: int, token: int) -> bool:
            task = tasks[row]
            chosen[row] += 1
            if chosen[row] > task.heard:  # else it was heard before an error made the batch begin again
                task.heard += 1
                self._emit_text(task, task.stream.add(token))
            return not task.dead

        return self.model.converse(conversations, [task.job.max_new_tokens for task in tasks], listen)

    def _emit_text(self, task: Task, text: str) -> None:
        if text and not task.over:
            task.job.emit(text)

    def _go_on(self, task: Task, reply: Reply) -> None:
        """What follows a reply: images to draw, or the end."""
        self.metrics.tokens.inc(len(reply.ids))
        job = task.job
        self._emit_text(task, task.stream.rest())
        task.reply, task.text = reply, self.model.tokenizer.decode(reply.ids)
        if reply.condition is None or not job.draws:
            if job.must_draw:
                advice = after_no_drawing(self.model.source)
                message = f"the model's reply to this prompt asks for no image; {advice}"
                self._finish(task, Refused(400, "no_image", message, job.text_field))
            else:
                self._complete(task, [])
            return
        stage = None
        if job.searcher is not None:
            try:
                stage = self._begin_search(task, job.searcher, reply)
            except Exception as e:
                self._fail(task, e)
                return
        with self._wake:
            if task.over:
                return
            task.begun = job.streams  # it waits again, for its images
            refused = self.draining and not task.begun
            if not refused:
                if stage is None:
                    self._schedule.add_images(task)
                else:
                    self._schedule.add_stage(task, stage)
                self._wake.notify_all()
        if refused:
            self._finish(task, shutting_down())

    def _padded(self, tiles: list[Tile]) -> list[Tile]:
        """The tiles with the last one repeated, up to a size that code is compiled for."""
        return tiles + [tiles[-1]] * (self.sizes.padded(len(tiles)) - len(tiles))

    def _step(self, tiles: Sequence[Tile]) -> StepCallback:
        """What a batch calls after each evaluation: counts it, and ends a batch that nobody waits for."""

        def step(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
            self.metrics.evaluations.inc(min(len(tiles), len(x)))
            if all(tile.task.dead for tile in tiles):
                raise _Deserted

        return step

    def _draw(self, tiles: list[Tile]) -> None:
        count = len(tiles)
        self.metrics.batch.labels("draw").observe(count)
        padded = self._padded(tiles)
        size = len(padded)
        replies = [tile.task.reply for tile in padded if tile.task.reply is not None]
        conditions = _all_distinct([reply.condition for reply in replies if reply.condition is not None])
        seeds = [tile.task.job.seed_of(tile.index) for tile in padded]
        try:
            with self.metrics.stage("sample"):
                latents = self.model.sample(conditions, seeds, tiles[0].task.job.options, size, self._step(tiles))
            with self.metrics.stage("decode"):
                images = self.model.decode(latents, batch_size=1 if self._on_cpu else size)[:count]
        except Exception as e:
            self._one_by_one(self._draw, tiles, e)
            return
        self.metrics.drew(count)
        for tile, latent, image in zip(tiles, latents[:count], images, strict=True):
            task, job = tile.task, tile.task.job
            with self._wake:
                if task.over:
                    continue
                task.drawn[tile.index] = (latent, image)
                complete = len(task.drawn) == job.best_of
                if complete and job.reward is not None:
                    self._schedule.add_ranking(task)
                    self._wake.notify_all()
            if complete and job.reward is None:
                self._complete(task, [(i, {}) for i in range(job.best_of)])

    def _rank(self, tasks: list[Task]) -> None:
        (task,) = tasks
        try:
            with self.metrics.stage("judge"):
                best = self._best(task)
        except Exception as e:
            self._fail(task, e)
            return
        self._complete(task, best)

    def _best(self, task: Task) -> list[tuple[int, dict[str, Any]]]:
        """(index, scores) of the images to return, best first."""
        job = task.job
        order = range(job.best_of)
        if job.reward == OWN_JUDGEMENT:
            judged = self._judgements(task)
            rated = [{"answer": s["answer"], "score": s["score"]} for s in judged]
            best = rank(Verdicts.made(judged, None), "answer_conf").order
        else:
            values = self.rewards[str(job.reward)].score([task.drawn[i][1] for i in order], job.subject)
            rewards = [float(value) for value in values]
            rated = [{"score": value} for value in rewards]
            best = rank(Verdicts.made([{}] * len(rewards), rewards), "image_reward").order
        return [(i, {"reward": job.reward, **rated[i]}) for i in best[: job.count]]

    def _judgements(self, task: Task) -> list[dict[str, Any]]:
        """The model's own judgement of each image, on the CPU one at a time, so that company does not change its bits."""
        job, size = task.job, 1 if self._on_cpu else task.job.best_of
        latents = [task.drawn[i][0] for i in range(job.best_of)]
        return [
            score.judgement()
            for start in range(0, len(latents), size)
            for score in self.model.score(
                latents[start : start + size], job.subject, request=job.turns[-1].text, request_reply=task.reply
            )
        ]

    # --- searches ------------------------------------------------------------------------------------------------

    def _begin_search(self, task: Task, searcher: Searcher, reply: Reply) -> adaptive.Stage:
        """Sets a task's search, and gives its first stage.

        Raises:
            Refused: when the prompt is too long for what will be asked about its images.
        """
        job = task.job
        try:
            self.model.check_question(job.subject)
        except InputError:  # which quotes the prompt
            field = job.text_field
            raise Refused(
                400, "invalid_value", f"{field}: is too long for a question about its image; shorten it", field
            ) from None
        task.search = Search(Asked(job.subject, job.turns[-1].text, reply), job.seed_of)
        task.stages = _stages(task, searcher, task.search)
        return next(task.stages)

    def _advance(self, tiles: list[Tile]) -> None:
        count, padded = len(tiles), self._padded(tiles)
        self.metrics.batch.labels("draw").observe(count)
        stops = [tile.stage.stop for tile in tiles if tile.stage is not None and tile.stage.stop is not None]
        trajectories = [drawn.trajectory for drawn in _candidates(padded)]
        trajectories = [replace(t, condition=t.condition[:]) for t in trajectories]  # as in _all_distinct
        try:
            with self.metrics.stage("sample"):
                advanced = self.model.advance(
                    trajectories, stops[0], tiles[0].task.job.options, len(padded), self._step(tiles)
                )
        except Exception as e:
            self._one_by_one(self._advance, tiles, e)
            return
        for drawn, trajectory in zip(_candidates(tiles), advanced[:count], strict=True):
            drawn.trajectory = trajectory
        self._done_with(tiles)

    def _look(self, tiles: list[Tile]) -> None:
        count, padded = len(tiles), self._padded(tiles)
        self.metrics.batch.labels("look").observe(count)
        searcher, stage, going = tiles[0].task.job.searcher, tiles[0].stage, _candidates(padded)
        assert searcher is not None
        assert stage is not None
        size = 1 if self._on_cpu else len(going)  # as in _judgements
        try:
            with self.metrics.stage("judge"):
                batches = [searcher.read(going[i : i + size], stage.t) for i in range(0, len(going), size)]
                found = [one for batch in batches for one in batch][:count]
        except Exception as e:
            self._one_by_one(self._look, tiles, e)
            return
        for drawn, (picture, look) in zip(_candidates(tiles), found, strict=True):
            drawn.note(picture, look)
        if stage.t is None:
            self.metrics.drew(count)
        self._done_with(tiles)

    def _done_with(self, tiles: Sequence[Tile]) -> None:
        """Takes those searches further that have nothing left of their stage."""
        for task, count in Counter(tile.task for tile in tiles).items():
            with self._wake:
                task.pending -= count
                if task.pending or task.over:
                    continue
            try:
                stage = next(task.stages, None)
                if stage is None:
                    self._complete_search(task)
                    continue
            except Exception as e:
                self._fail(task, e)
                continue
            with self._wake:
                if not task.over:
                    self._schedule.add_stage(task, stage)
                    self._wake.notify_all()

    def _complete_search(self, task: Task) -> None:
        search, searcher, reward = task.search, task.job.searcher, task.job.reward
        assert search is not None
        assert searcher is not None
        chosen = []
        for number in acceptance.kept(search.candidates, searcher.rules):
            candidate = search.candidates[number]
            final = candidate.final
            assert final is not None
            scores = {
                "reward": reward,
                "score": final.judgement["score"] if reward == OWN_JUDGEMENT else final.reward,
                "answer": final.judgement["answer"],
                "accepted": candidate.fate == acceptance.ACCEPTED,
            }
            chosen.append((number, scores))
        fates = Counter(candidate.fate for candidate in search.candidates)
        took = {
            "candidates": len(search.candidates),
            "dropped": fates[acceptance.DROPPED],
            "accepted": fates[acceptance.ACCEPTED],
            "evaluations": search.evaluations,
        }
        self._complete(task, chosen, took)

    def _count_fate(self, drawn: Drawn) -> None:
        if drawn.candidate.fate:
            self.metrics.candidates.labels(drawn.candidate.fate).inc()

    # --- ends ----------------------------------------------------------------------------------------------------

    def _complete(
        self, task: Task, chosen: Sequence[tuple[int, dict[str, Any]]], search: dict[str, Any] | None = None
    ) -> None:
        """Emits a task's result; images are encoded on threads of their own, while the model goes on."""
        reply, job = task.reply, task.job
        assert reply is not None

        def pack() -> None:
            try:
                images = [
                    ResultImage(
                        picture_bytes(task.drawn[i][1], _text_in(job, i), job.form, job.quality), job.seed_of(i), scores
                    )
                    for i, scores in chosen
                ]
                cut_off = reply.condition is None and len(reply.ids) >= job.max_new_tokens
                self._finish(task, Result(task.text, images, task.prompt_tokens, len(reply.ids), cut_off, search))
            except BaseException as e:
                self._fail(task, e)

        if chosen:
            self._encoders.submit(pack)
        else:
            pack()

    def _one_by_one(self, stage: Callable[[Any], None], batch: Sequence[Any], error: Exception) -> None:
        """After an error in a batch: does each item by itself, so that one does not fail because of another."""
        if len(batch) == 1:
            self._fail(_task_of(batch[0]), error)
            return
        for item in batch:
            if not _task_of(item).dead:
                stage([item])

    def _fail(self, task: Task, error: BaseException) -> None:
        if isinstance(error, InputError):
            error = Refused(400, "invalid_value", str(error), None)
        elif isinstance(error, DeviceError):
            _log.error("out of memory")
            error = Refused(503, "out_of_memory", "the device's memory is too small for this request at the moment")
        elif not isinstance(error, Refused):
            self.report(error)
        self._finish(task, error)


class _Deserted(BaseException):  # no Exception, which would have each item tried by itself
    """Nobody waits for this batch any more."""


def _task_of(item: Task | Tile) -> Task:
    return item.task if isinstance(item, Tile) else item


def _stages(task: Task, searcher: Searcher, search: Search) -> Iterator[adaptive.Stage]:
    """The stages of all rounds of a search; of each round, the finished images are then in `task.drawn`."""
    while not searcher.is_over(search):
        wave = searcher.begin(search)
        yield from searcher.stages([search], [wave])
        for drawn in wave:
            if drawn.candidate.final is not None and drawn.picture is not None:
                task.drawn[drawn.candidate.number] = (drawn.latent, drawn.picture)


def _candidates(tiles: Sequence[Tile]) -> list[Drawn]:
    return [tile.candidate for tile in tiles if tile.candidate is not None]


def _all_distinct(conditions: Sequence[Tensor]) -> list[Tensor]:
    """The conditions as separate tensors, which `sample` treats as those of different prompts.

    Otherwise each pattern of prompts in a batch would be compiled while requests wait, and on a CPU the pattern might change
    the last bits of an image.
    """
    return [condition[:] for condition in conditions]


def _text_in(job: Job, index: int) -> dict[str, str]:
    """The text in an image's file: the settings that drew it."""
    options, interval = job.options, job.options.interval
    text = {
        "image_seed": job.seed_of(index),
        "guidance_level": options.guidance,
        "solver": options.solver,
        "steps": options.steps,
        "guidance_interval": None if interval is None else f"{interval[0]} {interval[1]}",
    }
    return text_chunks(text | {name: value for name, value in to_record(options).items() if name not in text})
