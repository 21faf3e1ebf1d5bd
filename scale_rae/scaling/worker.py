"""One worker: a model on one device that draws and judges prompts until none is left.

Run by launch.py in its own process, or with this module as the main one of another: then its order comes as a line of JSON on
stdin, which stays open as long as the launcher lives, and its events go out as lines of JSON on stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError, OutputError, ScaleRAEError, printable
from scale_rae.jsonio import dump_json
from scale_rae.outputs import latent_bytes, png_bytes
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.experiment import check_finite, judgement, png_text
from scale_rae.scaling.settings import AUTO_REWARD, Settings
from scale_rae.scaling.store import Batch, Store

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scale_rae.language import Reply
    from scale_rae.opening import LoadingBar, OpenedModel
    from scale_rae.options import SamplingOptions
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.rewards import Reward

Listener = Callable[[dict[str, Any]], None]

SPARE = 0.1  # share of a GPU's memory that `--batch-size auto` leaves free: prompts differ in length
MOST_AT_ONCE = 4  # images that a thread of a CPU draws together; more are hardly faster
PATIENCE = 0.5  # seconds between looks at prompts that other workers are at


@dataclass
class Order:
    """What a worker is to do: its own prompts, then those of the others that nobody has begun.

    `failed_before` has the time of failure (ns) of prompts that failed in earlier runs: only those are tried again.
    """

    rank: int
    device: str | None
    own: list[PromptRecord]
    others: list[PromptRecord]
    description: dict[str, Any]
    failed_before: dict[int, int] = field(default_factory=dict)
    debug: bool = False


def work(
    store: Store, settings: Settings, order: Order, listen: Listener, bars: LoadingBar | None = None
) -> dict[str, float]:
    """Loads model and reward, draws, and returns seconds spent in each stage.

    Raises:
        ScaleRAEError: when model or reward cannot be loaded or are not the experiment's, or a result not written.
    """
    with loaded(store, settings, order, listen, bars) as worker:
        others_have = [p for p in (*order.own, *reversed(order.others)) if not worker.attempt(p)]
        if others_have:
            worker.log(f"waiting for {len(others_have)} prompts that other workers are at")
        while others_have := [p for p in others_have if not worker.attempt(p)]:
            time.sleep(PATIENCE)  # should their worker die, their locks are free
    worker.log("done")
    return worker.seconds


@contextlib.contextmanager
def loaded(
    store: Store, settings: Settings, order: Order, listen: Listener, bars: LoadingBar | None = None
) -> Iterator[Worker]:
    """A worker whose models are loaded and are the experiment's.

    Raises:
        ScaleRAEError: when model or reward cannot be loaded, or are not the experiment's.
    """
    from scale_rae.opening import OpenedModel
    from scale_rae.options import ModelChoice

    store.make_folders()
    log = WorkerLog(store, order.rank)
    log(f"process {os.getpid()}, device {order.device or 'default'}")
    start = time.perf_counter()
    choice = ModelChoice(
        settings.model_path,
        settings.decoder_repo,
        settings.revision,
        order.device,
        settings.dtype,
        settings.compile,
        settings.quantize,
    )
    session = OpenedModel(
        choice,
        bars,
        decoder=True,
        encoder=True,
        debug=order.debug,
        split_batches=False,  # the worker itself knows which images belong together
    )
    if session.model.device.type == "cuda":
        import torch

        torch.cuda.set_device(session.model.device)  # else what libraries do by themselves takes memory of cuda:0
    if settings.reward == AUTO_REWARD:
        settings = store.settings = _with_reward(store, settings, order, session, listen)
    reward = None
    if settings.reward is not None:
        from scale_rae.rewards import load_reward

        reward = load_reward(settings.reward, session.model, settings.reward_path)
    worker = Worker(store, settings, session.model, reward, order, listen, log)
    worker.batch_size = worker.fits = _join_experiment(store, settings, order, session, reward, listen, worker.measure)
    # All of the experiment's, whoever draws them: so that what is compiled doesn't depend on that.
    session.model.expect(order.description["prompts"]["count"] * settings.total)
    if session.model.device.type == "cpu":
        worker.find_at_once()
    worker.seconds = {"loading": time.perf_counter() - start}
    log(f"loaded in {worker.seconds['loading']:.1f} s; batches of {worker.batch_size}")
    listen({"event": "loaded", "rank": order.rank, "device": str(session.model.device)})
    with _threads(session.model) as worker.artists, ThreadPoolExecutor(4) as worker.encoders:
        try:
            yield worker
        except BaseException:
            worker.stopped.set()
            raise


def _with_reward(store: Store, settings: Settings, order: Order, session: OpenedModel, listen: Listener) -> Settings:
    """The settings with the reward that was left open: the experiment's, or of a new one the model's own or the guide's."""
    from scale_rae.rewards import DEFAULT_REWARD, default_reward

    settings = settings.resumed(store.read_experiment())
    if settings.reward == AUTO_REWARD:
        # A path to weights is a path to the guide's: the model's own reward has none.
        name = default_reward(session.model) if settings.reward_path is None else DEFAULT_REWARD
        settings = dataclasses.replace(settings, reward=name)
        if name != DEFAULT_REWARD and order.rank == 0:
            listen({"event": "say", "text": f"reward: {name}, which the model brings (--reward chooses another)"})
    order.description["settings"]["reward"] = settings.reward
    return settings


def _join_experiment(
    store: Store,
    settings: Settings,
    order: Order,
    session: OpenedModel,
    reward: Reward | None,
    listen: Listener,
    measure: Callable[[], int],
) -> int:
    """Makes sure this worker's models are the experiment's, writing experiment.json if it is the first.

    Returns the experiment's batch size, for which the first worker asks `measure` when none is given.
    """
    from scale_rae.provenance import differences, reward_differs

    model = session.model
    recorded = store.read_experiment()
    size = settings.batch_size
    if recorded is not None:
        _check_description(store, recorded)
        size = size or recorded["settings"]["batch_size"]
    if size is None:
        size = measure() if _measures(model) else 8
    described = session.record()
    now = {
        **order.description,
        "settings": order.description["settings"] | {"batch_size": size, "dtype": described["dtype"]},
        **{part: described[part] for part in ("model", "encoder", "decoder")},
        "reward": {"name": settings.reward, **reward.identity()} if reward is not None else None,
        "device": model.device.type,
        "versions": described["versions"],
    }
    now = json.loads(dump_json(now))
    recorded = recorded or store.claim(now)
    _check_description(store, recorded)
    found = differences(recorded, now)
    if reward_differs(recorded.get("reward"), now["reward"]):
        found.append("the reward's files")
    if recorded.get("device") != now["device"]:
        found.append(f"device {now['device']} here, {recorded.get('device')} there")
    if recorded["settings"].get("dtype") != now["settings"]["dtype"]:
        found.append(f"dtype {now['settings']['dtype']} here, {recorded['settings'].get('dtype')} there")
    if found:
        raise InputError(
            f"{store.folder}: begun with others than these: {'; '.join(found)}; choose another --output-dir"
        )
    store.keep_copy(recorded)
    for name, version in now["versions"].items():
        then = recorded["versions"].get(name)
        if then not in (None, version) and order.rank == 0:
            listen({"event": "say", "text": f"note: {name} {version} here, {then} before: rounding may differ"})
    return int(recorded["settings"]["batch_size"])


def _check_description(store: Store, recorded: dict[str, Any]) -> None:
    """Raises InputError when experiment.json lacks what is needed to go on."""
    settings = recorded.get("settings")
    size = settings.get("batch_size") if isinstance(settings, dict) else None
    if not isinstance(size, int) or size < 1 or not isinstance(recorded.get("versions"), dict):
        raise InputError(
            f"{store.folder / 'experiment.json'}: has no settings.batch_size or no versions; choose another --output-dir"
        )


def _measures(model: ScaleRAE) -> bool:
    return model.device.type != "cpu"  # where there is no limit that one would notice in time


class WorkerLog:
    """A worker's log file, opened anew for each line, so that nothing is lost and a full disk does no more harm.

    To an object in a store nothing can be added: there, lines go to stderr, which Ray keeps.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def __call__(self, text: str) -> None:
        text = printable(text, lines=True)
        if self._store.remote:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)
            return
        with contextlib.suppress(OSError), self._store.open_log(self._rank) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class Worker:
    """Loaded models that draw a prompt at a time; see `loaded`."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        model: ScaleRAE,
        reward: Reward | None,
        order: Order,
        listen: Listener,
        log: WorkerLog,
    ) -> None:
        from scale_rae.options import SamplingOptions

        self.store, self.settings, self.model, self.reward = store, settings, model, reward
        self.order, self.listen, self.log = order, listen, log
        self.batch_size = self.fits = 1  # the experiment's; what this device has memory for
        self.options = SamplingOptions(
            settings.steps, settings.solver, settings.guidance_level, settings.guidance_interval
        )
        self.seconds: dict[str, float] = {}  # of work in each stage, summed over threads
        self.drawn = 0
        self.artists: ThreadPoolExecutor | None = None
        self.at_once = 1  # images that one of them draws
        self.encoders: ThreadPoolExecutor
        self.stopped = threading.Event()  # ends what other threads draw
        self._clock = threading.Lock()

    def say(self, text: str) -> None:
        self.log(text)
        self.listen({"event": "say", "rank": self.order.rank, "text": text})

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._clock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def attempt(self, prompt: PromptRecord) -> bool:
        """Draws what is missing of a prompt, unless it failed in this run already; False when another worker is at it."""
        lock = self.store.lock_prompt(prompt.index)
        if lock is None:
            return False
        with lock:
            if self.store.check(prompt)[0]:
                return True
            failure = self.store.failure(prompt.index)
            if failure is not None and failure[0] != self.order.failed_before.get(prompt.index):
                return True
            tries, size = 0, self.batch_size
            start, drawn, seconds = time.perf_counter(), self.drawn, dict(self.seconds)
            while True:
                tries += 1
                try:
                    record = self._draw(prompt, size)
                except OutputError:
                    raise
                except Exception as e:
                    error = str(e) if isinstance(e, ScaleRAEError) else f"{type(e).__name__}: {e}"
                    self.log(f"prompt {prompt.index} failed: {error}\n{traceback.format_exc()}")
                else:
                    break
                self.model.release_memory()
                if tries == 2:
                    self.store.fail(prompt.index, error, tries)
                    self.listen({"event": "failed", "rank": self.order.rank, "index": prompt.index, "error": error})
                    return True
                size = max(1, size // 2)
                self.say(f"prompt {prompt.index} failed ({error}); once more in batches of {size}")
        answers = [entry["answer"] for entry in record["text_responses"].values()]
        self.log(f"prompt {prompt.index} done: {prompt.prompt}")
        self.listen(
            {
                "event": "prompt",
                "rank": self.order.rank,
                "index": prompt.index,
                "prompt": prompt.prompt,
                "images": len(answers),
                "yes": answers.count("yes"),
                "drawn": self.drawn - drawn,
                "seconds": {stage: value - seconds.get(stage, 0.0) for stage, value in self.seconds.items()}
                | {"total": time.perf_counter() - start},
            }
        )
        return True

    def _draw(self, prompt: PromptRecord, size: int) -> dict[str, Any]:
        there = {i for batch in self.store.reopen(prompt.index) for i in batch.samples}
        missing = [
            run
            for samples in self.settings.slices(self.batch_size)
            for run in _runs([i for i in samples if i not in there])
        ]
        if missing:
            request = self.settings.request(prompt.prompt)
            with self.timed("reply"):
                reply = self.model.reply([request], max_new_tokens=self.settings.max_new_tokens)[0]
            if reply.condition is None:
                text = self.model.tokenizer.decode(reply.ids).strip()
                cut = len(reply.ids) >= self.settings.max_new_tokens
                hint = f" within --max-new-tokens {self.settings.max_new_tokens}" if cut else ""
                raise InputError(f"the model's reply asks for no image{hint}: {text[:200]!r}")
            self.model.check_question(prompt.prompt, self.settings.question)  # before anything is drawn
            for samples in missing:
                self._draw_samples(prompt, request, reply, samples, size)
        with self.timed("writing"):
            return self.store.finish(prompt)

    def _draw_samples(
        self, prompt: PromptRecord, request: str, reply: Reply, samples: Sequence[int], size: int
    ) -> None:
        """Draws samples in batches of `size`, or of less once memory has run out."""
        from scale_rae import memory

        left = list(samples)
        while left:
            batch = left[: min(size, self.fits)]
            failed = False
            try:
                self._draw_batch(prompt, request, reply, batch)
            except Exception as e:
                if not memory.out_of_memory(e) or len(batch) == 1:
                    raise
                failed = True
            if failed:  # outside the handler, as in `largest_batch`
                self.fits = len(batch) // 2
                self.say(
                    f"prompt {prompt.index}: out of memory with {len(batch)} images at once; going on with {self.fits}"
                )
                self.model.release_memory()
                continue
            left = left[len(batch) :]

    def find_at_once(self) -> None:
        """Finds how many images each thread of a CPU draws at once, to the bit as if alone."""
        from scale_rae.cpu import one_thread

        options = [self.options]
        if self.options.interval is not None:  # outside it, without guidance
            options.append(dataclasses.replace(self.options, guidance=1.0, interval=None))
        with one_thread() as threads:  # as in `_threads`
            most = min(MOST_AT_ONCE, -(-min(self.batch_size, self.settings.total) // threads))
            self.at_once = self.model.exact_batch(most, options, one_prompt=True)

    def _step(self, *evaluation: object) -> None:
        if self.stopped.is_set():
            raise ScaleRAEError("stopped")

    def measure(self) -> int:
        """How many of a prompt's images this device has memory to draw and judge at once, tried out in two steps."""
        options = dataclasses.replace(self.options, steps=2)
        for prompt in [*self.order.own, *self.order.others][:8]:
            request = self.settings.request(prompt.prompt)
            try:
                reply = self.model.reply([request], max_new_tokens=self.settings.max_new_tokens)[0]
            except InputError:
                continue  # this prompt will fail in its turn
            if reply.condition is not None:
                break
        else:
            return min(8, self.settings.total)

        def attempt(size: int) -> None:
            latents, images = self._pictures(reply, range(size), options, compile=False)
            self._judge(prompt, request, reply, latents, images)

        from scale_rae import memory

        try:
            device = self.model.device
            return memory.largest_batch(
                self.settings.total, attempt, self.model.release_memory, lambda: memory.spare_memory(device), SPARE
            )
        finally:
            self.model.release_memory()

    def _draw_batch(self, prompt: PromptRecord, request: str, reply: Reply, samples: Sequence[int]) -> None:
        from scale_rae.noise import image_seed

        settings = self.settings
        seeds = [image_seed(settings.seed, prompt.index, i) for i in samples]
        parts = [seeds[i : i + self.at_once] for i in range(0, len(seeds), self.at_once)] if self.artists else [seeds]
        latents: list[Tensor] = []
        pngs: list[Future[bytes]] = []
        judged: list[dict[str, Any]] = []
        rewards: list[float] = []
        spread = self.artists.map if self.artists is not None else map
        drawn = spread(lambda part: self._pictures(reply, part, self.options), parts)
        for part, (part_latents, images) in zip(parts, drawn, strict=True):
            pngs += [  # made while the model judges
                self.encoders.submit(png_bytes, image, png_text(settings, request, seed))
                for image, seed in zip(images, part, strict=True)
            ]
            latents += part_latents
            each = 1 if self.artists else len(part)
            for i in range(0, len(part), each):
                few = slice(i, i + each)
                few_judged, few_rewards = self._judge(prompt, request, reply, part_latents[few], images[few])
                judged += few_judged
                rewards += few_rewards
        check_finite(judged, rewards)
        with self.timed("writing"):
            files = {f"{i:05}.png": png.result() for i, png in zip(samples, pngs, strict=True)}
            if settings.save_latents:
                files |= {f"{i:05}_latent.pt": latent_bytes(x) for i, x in zip(samples, latents, strict=True)}
            text = self.model.tokenizer.decode(reply.ids)
            self.store.save_batch(prompt.index, Batch(samples[0], text, seeds, judged, rewards or None, {}), files)
        self.drawn += len(seeds)
        self.listen({"event": "images", "rank": self.order.rank, "count": len(seeds)})

    def _pictures(
        self, reply: Reply, seeds: Sequence[int], options: SamplingOptions, compile: bool | None = None
    ) -> tuple[list[Tensor], list[Image.Image]]:
        """Latents [L, C] and pixels of the reply's image, one of each seed, all at once."""
        assert reply.condition is not None
        with self.timed("drawing"):
            latents = self.model.sample([reply.condition] * len(seeds), seeds, options, len(seeds), self._step, compile)
        with self.timed("decoding"):
            return latents, self.model.decode(latents, batch_size=1 if self.artists else len(seeds))

    def _judge(
        self,
        prompt: PromptRecord,
        request: str,
        reply: Reply,
        latents: Sequence[Tensor],
        images: Sequence[Image.Image],
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Entries of text_responses and rewards (none without a reward model), of images drawn together."""
        settings, model = self.settings, self.model
        with self.timed("judging"):
            scores = model.score(
                model.encode(images, batch_size=len(images)) if settings.post_qa_mode == "image" else latents,
                prompt.prompt,
                request=request,
                request_reply=reply,
                question=settings.question,
                max_new_tokens=settings.post_qa_max_new_tokens,
            )
        if self.reward is None:
            return [judgement(score) for score in scores], []
        with self.timed("reward"):
            rewards = [float(value) for value in self.reward.score(images, prompt.prompt)]
        if len(rewards) != len(images):
            raise ScaleRAEError(f"the reward gave {len(rewards)} scores for {len(images)} images")
        return [judgement(score) for score in scores], rewards


@contextlib.contextmanager
def _threads(model: ScaleRAE) -> Iterator[ThreadPoolExecutor | None]:
    """On the CPU, threads that draw some images each; None where images are drawn in batches.

    Sums come out in other last digits with another number of threads or, on some CPUs, images at once. So torch has one
    thread for what is drawn together, which is as fast, and of that no more than comes out as if alone (`find_at_once`): an
    image and its scores do not depend on workers, cores or the batch size.
    """
    import torch

    from scale_rae.cpu import one_thread

    if model.device.type != "cpu":
        yield None
        return
    with (
        one_thread() as threads,
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Splits rising numbers into runs without gaps."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


# --- a worker of its own process ---------------------------------------------------------------------------------


def encode_order(store: Store, settings: Settings, order: Order) -> str:
    """An order as the line of JSON that `main` reads."""
    return dump_json(
        {"folder": str(store.folder), "settings": dataclasses.asdict(settings), "order": dataclasses.asdict(order)}
    )


def _decode_order(line: str) -> tuple[Store, Settings, Order]:
    from pathlib import Path

    value = json.loads(line)
    settings = value["settings"]
    if settings["guidance_interval"] is not None:
        settings["guidance_interval"] = tuple(settings["guidance_interval"])
    order = value["order"]
    order["failed_before"] = {int(k): v for k, v in order["failed_before"].items()}
    for name in ("own", "others"):
        order[name] = [PromptRecord(**p) for p in order[name]]
    made = Settings(**settings)
    return Store(Path(value["folder"]), made, f"w{order['rank']}"), made, Order(**order)


def main() -> int:
    """Reads an order from stdin and carries it out. Exit code: 0 done, 3 after an event "fatal"."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_launcher, daemon=True).start()

    def listen(event: dict[str, Any]) -> None:
        events.write(dump_json(event) + "\n")
        events.flush()

    store, settings, order = _decode_order(line)
    try:
        seconds = work(store, settings, order, listen)
    except ScaleRAEError as e:
        _print_traceback()
        listen({"event": "fatal", "error": str(e), "kind": type(e).__name__})
        return 3
    except Exception as e:
        _print_traceback()
        listen({"event": "say", "text": f"worker {order.rank}: unexpected {type(e).__name__}: {e}"})
        return 1
    listen({"event": "done", "rank": order.rank, "seconds": seconds})
    return 0


def _print_traceback() -> None:
    print(printable(traceback.format_exc(), lines=True), file=sys.stderr, flush=True)


def _die_with_launcher() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)  # at once, as if killed: everything on disk is whole at any moment


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
