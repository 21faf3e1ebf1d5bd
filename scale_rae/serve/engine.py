"""The queue, and the threads that own the model: what waits together is answered and drawn together.

A job (one request) goes through up to three stages, each done for several jobs at once:

    reply    its pictures are encoded, the model answers; an answer may ask for drawings
    draw     drawings of equal `SamplingOptions`, whatever their prompts and seeds, are sampled and decoded as one batch
    judge    drawings of which only the best are wanted are scored

On a GPU one thread does batches of up to `batch_size`; pictures are those drawn alone up to rounding. On the CPU, as in
`scaling.worker`, torch gets one thread for each of its batches and there are as many of those as cores: then a batch of
drawings comes out in the very bytes of drawings made one by one, which `_exact_batch` makes sure of before the first
request, and answers are given one by one.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scale_rae.errors import DeviceError, InputError
from scale_rae.language import Conversation, Reply
from scale_rae.noise import image_seed
from scale_rae.options import SamplingOptions
from scale_rae.outputs import png_bytes
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import SYSTEM, Turn
from scale_rae.rewards import Reward
from scale_rae.scaling.experiment import judgement
from scale_rae.scaling.select import ANSWERS
from scale_rae.serve.errors import Refused, shutting_down
from scale_rae.serve.metrics import Metrics
from scale_rae.serve.settings import OWN_JUDGEMENT
from scale_rae.serve.turns import Turns
from scale_rae.version import __version__

BATCH_CPU, BATCH_GPU = 4, 32
LADDER = (1, 2, 4, 8, 16, 32, 64, 128)  # batch sizes on a GPU, for each of which code is compiled and graphs captured
LINGER = 0.005  # seconds that an idle GPU waits for others to come with the first
_log = logging.getLogger("scale_rae.serve")


@dataclass
class Drawing:
    """One drawn image, as PNG, and what it was scored if only the best were wanted."""

    png: bytes
    seed: int
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a job. `cut_off`: the answer ends because its limit of tokens was reached."""

    text: str
    drawings: list[Drawing]
    prompt_tokens: int
    new_tokens: int
    cut_off: bool


@dataclass(eq=False)
class Job:
    """What a request asks of the model.

    `emit` is called from the engine's threads: with the text of an answer, bit by bit as it is written, and at the end once
    with a Result or an exception.
    """

    turns: Sequence[Turn]
    pixels: Tensor | None  # of the turns' images, preprocessed, [N, 3, H, W]
    options: SamplingOptions
    seed: int
    emit: Callable[[str | Result | BaseException], None]
    deadline: float  # on time.monotonic's clock
    count: int = 1  # drawings to return
    best_of: int = 1  # drawings to make
    judge: str | None = None  # a reward's name or OWN_JUDGEMENT
    subject: str = ""  # what the drawings are judged against
    system: str = SYSTEM
    max_new_tokens: int = 512
    draws: bool = True  # whether a reply that asks for a drawing gets it
    must_draw: bool = False  # whether a reply that asks for none is an error
    asked_in: str = "prompt"  # the request's field, to be named when its text is too long
    client: str = ""  # whom it counts for when clients take turns
    streams: bool = False  # whether the client has its text as it is written, which then cannot be refused any more
    # The engine's own:
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False  # being answered or drawn, or a part of it is: what a server that shuts down finishes
    left: bool = False  # the client has gone
    over: bool = False
    reply: Reply | None = None
    latents: list[Tensor] = field(default_factory=list)  # of the turns' images
    prompt_tokens: int = 0
    said: str = ""
    drawn: dict[int, tuple[Tensor, Image.Image]] = field(default_factory=dict)

    @property
    def dead(self) -> bool:
        """Whether there is nobody to do it for any more."""
        return self.over or self.left or time.monotonic() >= self.deadline

    def seed_of(self, index: int) -> int:
        """The noise seed of its drawing `index`: as `t2i --seed` has them."""
        return image_seed(self.seed, 0, index)


@dataclass(eq=False)
class _Tile:
    """One image to draw."""

    job: Job
    index: int


class Engine:
    """`submit` takes jobs once `start` has been called and `ready` is set; `close` ends the threads."""

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
        self.model: ScaleRAE
        self.rewards: dict[str, Reward] = {}
        self.batch_size = 1
        self.error: BaseException | None = None  # why the model could not be loaded
        self.ready = threading.Event()
        self.loaded = threading.Event()  # ready, or there is an error
        self.draining = False
        self._closed = False
        self._wake = threading.Condition()
        self._jobs: set[Job] = set()
        self._replies: deque[Job] = deque()
        self._tiles: deque[_Tile] = deque()
        self._judging: deque[Job] = deque()
        self._turns = Turns()
        self._replies_first = 0  # replies that were waiting when the last batch was drawn
        self._answered = 0  # replies since then
        self._workers = 1
        self._threads: list[threading.Thread] = []
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="png")

    # --- from other threads --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to load the model, on the thread that will own it."""
        thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._threads.append(thread)
        thread.start()

    def submit(self, job: Job) -> None:
        """Takes a job.

        Raises:
            Refused: while loading or shutting down (503), or with too many jobs already (429).
        """
        with self._wake:
            self.check_open()
            self._jobs.add(job)
            self._replies.append(job)
            self._wake.notify_all()
        self._count()

    def check_open(self) -> None:
        """Raises what `submit` would."""
        if self.draining or self._closed:
            raise shutting_down()
        if not self.ready.is_set():
            raise Refused(503, "loading", "the model is still loading")
        if len(self._jobs) >= self.most_jobs:
            raise Refused(429, "queue_full", f"{self.most_jobs} requests are waiting or under way; try again later")

    def cancel(self, job: Job) -> None:
        """Drops a job whose client has gone or whose time is over; what is being done for it ends at the next step."""
        job.left = True
        with self._wake:
            self._forget(job)

    def drain(self) -> None:
        """Takes no more jobs, refuses those not begun, and lets the others end."""
        with self._wake:
            self.draining = True
            waiting = [job for job in self._jobs if not job.begun]
            self._wake.notify_all()
        for job in waiting:
            self._finish(job, shutting_down())

    @property
    def idle(self) -> bool:
        """Whether no job is left."""
        return not self._jobs

    def abandon(self) -> None:
        """Refuses the jobs that are left; the threads end at their next step."""
        with self._wake:
            self._closed = self.draining = True
            left = list(self._jobs)
            self._wake.notify_all()
        for job in left:
            self._finish(job, shutting_down())

    def close(self) -> None:
        """Ends the threads; jobs that are left fail."""
        self.abandon()
        for thread in self._threads:
            thread.join()
        self._encoders.shutdown()

    def wait_hint(self) -> int:
        """Seconds after which there may be room again."""
        rate = self.metrics.images_per_second()
        return max(1, min(60, round(0.25 * len(self._jobs) / rate))) if rate else 2

    def describe(self) -> str:
        """Where and in what batches it draws, in words."""
        if self._workers == 1:
            return f"{self.model.device}, up to {self.batch_size} images at once"
        return f"{self.model.device}, {self._workers} threads of up to {self.batch_size} images"

    # --- the model's threads -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.model, self.rewards = self._load()
            on_cpu = self.model.device.type == "cpu"
            if on_cpu:
                self._workers = torch.get_num_threads()
                torch.set_num_threads(1)
                guidances = (1.0, 3.0) if self.model.config.dit.null_condition else (1.0,)
                options = [SamplingOptions(guidance=guidance) for guidance in guidances]
                self.batch_size = self.model.exact_batch(self._wanted_batch or BATCH_CPU, options, one_prompt=False)
            else:
                self.batch_size = self._wanted_batch or BATCH_GPU
                if self._warm_up or (self._warm_up is None and self.model.device.type == "cuda"):
                    self._warm()
        except BaseException as e:
            self.error = e
            self.loaded.set()
            return
        for i in range(1, self._workers):
            thread = threading.Thread(target=self._work, name=f"model-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.ready.set()
        self.loaded.set()
        self._work()

    def _warm(self) -> None:
        """Compiles and captures for every batch size, so that no request has to wait for that."""
        self.model.expect(1 << 40)  # a server will draw many
        guidances = (1.0, 3.0) if self.model.config.dit.null_condition else (1.0,)
        message = [Turn("user", "Can you generate a photo of a cat?")]
        for size in self._sizes():
            start = time.perf_counter()
            conversation = Conversation(self.model.tokenizer.conversation(message))
            for _ in range(2):  # what comes again is captured
                self.model.converse([conversation] * size, [8] * size)
            condition = torch.zeros(
                self.model.config.tokens, self.model.config.dit.condition_width, dtype=self.model.dtype
            )
            latents: list[Tensor] = []
            for guidance in guidances:
                options = SamplingOptions(2, "euler", guidance)
                latents = self.model.sample(_each_its_own([condition] * size), range(size), options, size)
            for _ in range(2):
                self.model.decode(latents, batch_size=size)
            _log.info("warmed up for batches of %d in %.1f s", size, time.perf_counter() - start)
            if self._closed:
                return

    def _sizes(self) -> list[int]:
        return [size for size in LADDER if size < self.batch_size] + [self.batch_size]

    def _work(self) -> None:
        on_cpu = self.model.device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(1)  # a thread's own matter
        while (task := self._take(on_cpu)) is not None:
            function, batch = task
            try:
                function(batch)
            except BaseException as e:  # a defect: the jobs fail, the server goes on
                self.report(e)
                for job in {t.job if isinstance(t, _Tile) else t for t in batch}:
                    self._finish(job, e)

    def _take(self, on_cpu: bool) -> tuple[Callable[[Any], None], list[Any]] | None:
        """The next batch and what to do with it, waiting for it if there is none; None at the end."""
        with self._wake:
            idle = False
            while True:
                if self._closed:
                    return None
                self._drop_dead()
                if self._judging or self._replies or self._tiles:
                    break
                self._wake.wait(1.0)
                idle = not on_cpu
            if idle:
                end = time.monotonic() + LINGER
                while not self._closed and (left := end - time.monotonic()) > 0:
                    self._wake.wait(left)  # for those who come with the first
            if self._judging:
                return self._judge, [self._judging.popleft()]
            if self._is_reply_next():
                jobs = self._turns.order(self._replies, lambda job: job.client)[: 1 if on_cpu else self.batch_size]
                for job in jobs:
                    self._replies.remove(job)
                self._answered += len(jobs)
                self._begin(jobs)
                return self._answer, jobs
            if not self._tiles:
                return self._nothing, []
            waiting = self._turns.order(self._tiles, lambda tile: tile.job.client)
            alike = [tile for tile in waiting if tile.job.options == waiting[0].job.options]
            chosen = alike[: self._batch_of(len(alike), on_cpu)]
            taken = set(map(id, chosen))
            self._tiles = deque(tile for tile in self._tiles if id(tile) not in taken)
            self._replies_first, self._answered = len(self._replies), 0
            self._begin([tile.job for tile in chosen])
            return self._draw, chosen

    def _is_reply_next(self) -> bool:
        """Whether the next batch is of replies, not of drawings.

        The replies that waited when the last batch was drawn come before the next. With several clients it goes by turns,
        and a client's own replies come first only as far as its drawings do not fill the next batches.
        """
        if not self._replies or not self._tiles:
            return bool(self._replies)
        is_due = self._answered < self._replies_first
        if len({job.client for job in self._jobs}) == 1:
            return is_due
        reply = self._turns.order(self._replies, lambda job: job.client)[0].client
        tile = self._turns.order(self._tiles, lambda tile: tile.job.client)[0].job.client
        if reply != tile:
            return self._turns.last(reply) < self._turns.last(tile)
        return is_due and len(self._tiles) < self.batch_size * self._workers

    def _begin(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.begun = True
        self._turns.serve(dict.fromkeys(job.client for job in jobs))
        self._turns.keep({job.client for job in self._jobs})
        self._count()

    def _nothing(self, batch: Sequence[object]) -> None: ...

    def _batch_of(self, waiting: int, on_cpu: bool) -> int:
        """How many of the drawings that wait to take at once: on the CPU a fair share for each thread, on a GPU one of
        few sizes, or what fills most of one."""
        if on_cpu:
            return min(self.batch_size, -(-waiting // self._workers))
        sizes = self._sizes()
        fits = max(size for size in sizes if size <= max(waiting, 1))
        above = next((size for size in sizes if size > waiting), fits)
        return waiting if waiting < self.batch_size and 4 * waiting >= 3 * above else min(fits, self.batch_size)

    def _drop_dead(self) -> None:
        """Takes jobs out of the queues that nobody waits for. Their requests have been answered by then."""
        for job in [job for job in self._jobs if job.dead]:
            job.left = True
            self._forget(job)

    def _forget(self, job: Job) -> None:
        job.over = True
        self._jobs.discard(job)
        if job in self._replies:
            self._replies.remove(job)
        if job in self._judging:
            self._judging.remove(job)
        self._tiles = deque(tile for tile in self._tiles if tile.job is not job)
        self._count()

    def _finish(self, job: Job, outcome: Result | BaseException) -> None:
        with self._wake:
            if job.over:
                return
            self._forget(job)
        job.emit(outcome)

    def _count(self) -> None:
        self.metrics.waiting.set(sum(not job.begun for job in self._jobs.copy()))
        self.metrics.running.set(sum(job.begun for job in self._jobs.copy()))

    def report(self, error: BaseException) -> None:
        """Logs an unexpected error without what it says, which may hold what people wrote."""
        trace, place = error.__traceback__, "?"
        while trace is not None:
            code = trace.tb_frame.f_code
            place = f"{trace.tb_frame.f_globals.get('__name__', '?')}.{code.co_name}:{trace.tb_lineno}"
            trace = trace.tb_next
        _log.error("unexpected %s in %s", type(error).__name__, place, exc_info=error if self._debug else None)

    # --- stages --------------------------------------------------------------------------------------------------

    def _answer(self, jobs: list[Job]) -> None:
        self.metrics.batch.labels("reply").observe(len(jobs))
        ready: list[Job] = []
        conversations: list[Conversation] = []
        try:
            with self.metrics.stage("encode"):
                self._encode(jobs)
        except Exception as e:
            self._apart(self._answer, jobs, e)
            return
        for job in jobs:
            try:
                ids = self.model.tokenizer.conversation(job.turns, job.system)
                conversation = Conversation(ids, latents=job.latents)
                self.model.room(conversation)
            except InputError as e:
                self._finish(job, Refused(400, "invalid_value", f"{job.asked_in}: {e}", job.asked_in))
                continue
            job.prompt_tokens = len(ids) + (self.model.config.tokens - 1) * len(job.latents)
            ready.append(job)
            conversations.append(conversation)
        heard: dict[Job, list[int]] = {job: [] for job in ready}

        def listen(row: int, token: int) -> bool:
            job = ready[row]
            ids = heard[job]
            ids.append(token)
            self._say(job, ids, last=False)
            return not job.dead

        if not ready:
            return
        try:
            with self.metrics.stage("reply"):
                replies = self.model.converse(conversations, [job.max_new_tokens for job in ready], listen)
        except Exception as e:
            self._apart(self._answer, ready, e)
            return
        for job, reply in zip(ready, replies, strict=True):
            self.metrics.tokens.inc(len(reply.ids))
            job.reply = reply
            self._say(job, reply.ids, last=True)
            if reply.condition is None or not job.draws:
                if job.must_draw:
                    self._finish(
                        job,
                        Refused(
                            400,
                            "no_image",
                            "the model's reply to this prompt asks for no image; word it as a request to draw something",
                            job.asked_in,
                        ),
                    )
                else:
                    self._complete(job, [])
                continue
            with self._wake:
                if job.over:
                    continue
                job.begun = job.streams  # it waits again, for its drawings
                refused = self.draining and not job.begun
                if not refused:
                    self._tiles.extend(_Tile(job, i) for i in range(job.best_of))
                    self._wake.notify_all()
            if refused:
                self._finish(job, shutting_down())
        self._count()

    def _encode(self, jobs: list[Job]) -> None:
        with_images = [job for job in jobs if job.pixels is not None]
        if not with_images:
            return
        latents = iter(
            self.model.encode_pixels(torch.cat([job.pixels for job in with_images if job.pixels is not None]))
        )
        for job in with_images:
            assert job.pixels is not None
            job.latents = [next(latents) for _ in range(len(job.pixels))]
            job.pixels = None

    def _say(self, job: Job, ids: Sequence[int], last: bool) -> None:
        """Emits what is new of an answer, as soon as it is whole characters."""
        text = self.model.tokenizer.decode(ids)
        if job.over or (not last and text.endswith("\ufffd")) or not text.startswith(job.said) or text == job.said:
            return
        new, job.said = text[len(job.said) :], text
        job.emit(new)

    def _draw(self, tiles: list[_Tile]) -> None:
        count = len(tiles)
        self.metrics.batch.labels("draw").observe(count)
        size = count
        if self.model.device.type != "cpu":
            size = next(s for s in self._sizes() if s >= count)
        padded = tiles + [tiles[-1]] * (size - count)
        replies = [tile.job.reply for tile in padded if tile.job.reply is not None]
        conditions = _each_its_own([reply.condition for reply in replies if reply.condition is not None])
        seeds = [tile.job.seed_of(tile.index) for tile in padded]

        def step(*evaluation: object) -> None:
            if all(tile.job.dead for tile in tiles):
                raise _Deserted

        try:
            with self.metrics.stage("sample"):
                latents = self.model.sample(conditions, seeds, tiles[0].job.options, size, step)
            with self.metrics.stage("decode"):
                images = self.model.decode(latents, batch_size=1 if self.model.device.type == "cpu" else size)[:count]
        except _Deserted:
            with self._wake:
                self._drop_dead()
            return
        except Exception as e:
            self._apart(self._draw, tiles, e)
            return
        self.metrics.drew(count)
        for tile, latent, image in zip(tiles, latents[:count], images, strict=True):
            job = tile.job
            with self._wake:
                if job.over:
                    continue
                job.drawn[tile.index] = (latent, image)
                complete = len(job.drawn) == job.best_of
                if complete and job.judge is not None:
                    self._judging.append(job)
                    self._wake.notify_all()
            if complete and job.judge is None:
                self._complete(job, [(i, {}) for i in range(job.best_of)])

    def _judge(self, jobs: list[Job]) -> None:
        (job,) = jobs
        assert job.reply is not None
        order = range(job.best_of)
        images = [job.drawn[i][1] for i in order]
        try:
            with self.metrics.stage("judge"):
                if job.judge == OWN_JUDGEMENT:
                    some = [[job.drawn[i][0]] for i in order]
                    if self.model.device.type != "cpu":
                        some = [[latent for one in some for latent in one]]
                    scores = [
                        judgement(score)
                        for latents in some
                        for score in self.model.score(
                            latents, job.subject, request=job.turns[-1].text, request_reply=job.reply
                        )
                    ]
                    rated = [{"answer": s["answer"], "score": s["score"]} for s in scores]
                    best = sorted(
                        order, key=lambda i: (ANSWERS.index(str(rated[i]["answer"])), -float(rated[i]["score"]), i)
                    )
                else:
                    values = self.rewards[str(job.judge)].score(images, job.subject)
                    rated = [{"score": float(value)} for value in values]
                    best = sorted(order, key=lambda i: (-float(rated[i]["score"]), i))
        except Exception as e:
            self._fail(job, e)
            return
        self._complete(job, [(i, {"reward": job.judge, **rated[i]}) for i in best[: job.count]])

    def _complete(self, job: Job, chosen: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Hands a job's result over; PNGs are made on other threads, while the model goes on."""
        reply = job.reply
        assert reply is not None
        text = job.said

        def pack() -> None:
            try:
                drawings = [
                    Drawing(png_bytes(job.drawn[i][1], _png_text(job, i)), job.seed_of(i), scores)
                    for i, scores in chosen
                ]
                cut_off = reply.condition is None and len(reply.ids) >= job.max_new_tokens
                self._finish(job, Result(text, drawings, job.prompt_tokens, len(reply.ids), cut_off))
            except BaseException as e:
                self._fail(job, e)

        if chosen:
            self._encoders.submit(pack)
        else:
            pack()

    def _apart(self, function: Callable[[Any], None], batch: Sequence[Any], error: Exception) -> None:
        """After an error in a batch: each by itself, so that one does not fail for another."""
        if len(batch) == 1:
            item = batch[0]
            self._fail(item.job if isinstance(item, _Tile) else item, error)
            return
        for item in batch:
            if not (item.job if isinstance(item, _Tile) else item).dead:
                function([item])

    def _fail(self, job: Job, error: BaseException) -> None:
        if isinstance(error, InputError):
            error = Refused(400, "invalid_value", str(error), None)
        elif isinstance(error, DeviceError):
            _log.error("out of memory")
            error = Refused(503, "out_of_memory", "the device's memory is too small for this request at the moment")
        elif not isinstance(error, Refused):
            self.report(error)
        self._finish(job, error)


def _each_its_own(conditions: Sequence[Tensor]) -> list[Tensor]:
    """Conditions of which `sample` takes no two for one prompt's.

    Which of a batch's images are of one prompt is another matter each time: each way of it would be compiled while requests
    wait, and on a CPU might change a picture's last digits.
    """
    return [condition[:] for condition in conditions]


class _Deserted(Exception):
    """Nobody waits for this batch any more."""


def _png_text(job: Job, index: int) -> dict[str, str]:
    """What a PNG says of itself: how to draw it again."""
    options = job.options
    text = {
        "Software": f"scale_rae {__version__}",
        "image_seed": str(job.seed_of(index)),
        "guidance_level": str(options.guidance),
        "solver": options.solver,
        "steps": str(options.steps),
    }
    if options.interval is not None:
        text["guidance_interval"] = f"{options.interval[0]} {options.interval[1]}"
    return text


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(2**31)
