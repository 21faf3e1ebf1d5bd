"""Load on `scale-rae serve`: is a request lost or wrong, and how fast is serving against one offline batch? JSON, table.

    python benchmarks/serve.py --device cpu                          # the bundled model; 64 clients for two minutes
    python benchmarks/serve.py --full-size 1.5b --json serve.json    # made-up weights of the published sizes, on a GPU
    python benchmarks/serve.py --full-size tiny --clients 4 --seconds 5 --device cpu    # tries the benchmark itself

The server runs in this process, the clients in another. They use OpenAI's interface, and each sends its next request as soon as
it has its picture. They ask for pictures of a fixed set of prompts and seeds. Each of those is also drawn alone beforehand, and
every picture received is compared with that one, on the CPU to the byte. "Offline" is the same set through
`ScaleRAE.generate` and into PNGs, measured before and after the load. The made-up model's replies are one token, which asks for
an image.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench import median_seconds, show, write_json

if TYPE_CHECKING:
    import torch

    from scale_rae.pipeline import ScaleRAE
    from scale_rae.serve.engine import Engine

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
Case = tuple[str, int]  # prompt, seed


def cases_of(count: int) -> list[Case]:
    """Prompts of the bundled model's world, of one and two things, each with its own seed."""
    chance = random.Random(0)
    cases = []
    for i in range(count):
        things = [f"a {chance.choice(COLORS)} {chance.choice(SHAPES)}" for _ in range(1 + i % 2)]
        cases.append((f"Can you generate a photo of {' and '.join(things)}?", 1000 + i))
    return cases


# Clients, in a process of their own --------------------------------------------------------------------------------------------


async def clients(url: str, count: int, seconds: float, cases: list[Case], options: dict[str, Any]) -> list[Any]:
    """[case, seconds, start, end, status, sha256 of the pixels or None, PNG in base64 of each case's first] of each request."""
    import hashlib

    import numpy as np
    from PIL import Image

    try:
        import httpx2 as httpx
    except ImportError:  # its name before, on machines that have that
        import httpx  # type: ignore[no-redef]

    done: list[Any] = []
    seen: dict[tuple[int, str], bool] = {}
    end = time.time() + seconds

    async def client(number: int, http: httpx.AsyncClient) -> None:
        chance = random.Random(number)
        while time.time() < end:
            case = chance.randrange(len(cases))
            prompt, seed = cases[case]
            start, status, digest, first = time.time(), 0, None, None
            try:
                answer = await http.post("/v1/images/generations", json={"prompt": prompt, "seed": seed, **options})
                status = answer.status_code
                if status == 200:
                    png = answer.json()["data"][0]["b64_json"]
                    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
                        digest = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
                    if (case, digest) not in seen:
                        seen[case, digest], first = True, png
            except httpx.HTTPError as e:
                print(f"lost: {type(e).__name__}", file=sys.stderr)
            done.append((case, time.time() - start, start, time.time(), status, digest, first))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await asyncio.gather(*(client(i, http) for i in range(count)))
    return done


def ask(url: str, count: int, seconds: float, cases: list[Case], options: dict[str, Any]) -> list[Any]:
    """`clients` in another process."""
    order = json.dumps([url, count, seconds, cases, options])
    command = [sys.executable, __file__, "--as-clients"]
    return list(json.loads(subprocess.run(command, input=order, check=True, stdout=subprocess.PIPE, text=True).stdout))


# Server and offline ------------------------------------------------------------------------------------------------------------


def made_up(size: str, device: torch.device) -> ScaleRAE:
    """A model of a published size with random weights; every reply asks for an image."""
    from benchmarks.made_up import made_model, reply_with_images
    from scale_rae.memory import pick_dtype
    from scale_rae.options import Speed

    model = made_model(size, device, pick_dtype(None, device), Speed("auto"), Path(tempfile.mkdtemp()))
    reply_with_images(model.language, model.tokenizer.image_start)
    return model


class Offline:
    """The same work without a server."""

    def __init__(self, model: ScaleRAE, options: dict[str, Any], threads: int) -> None:
        self.model, self.options, self.threads = model, options, threads
        self.cpu_seconds: list[float] = []  # per image, of each `rate_in_threads`

    def draw(self, cases: list[Case], batch_size: int | None = None) -> list[Any]:
        """The images of cases, drawn in batches."""
        prompts, seeds = [prompt for prompt, _ in cases], [[seed] for _, seed in cases]
        results = self.model.generate(prompts, image_seeds=seeds, batch_size=batch_size, **self.options)
        return [result.images[0].image for result in results]

    def rate(self, cases: list[Case]) -> float:
        """Images per second of one big batch, PNGs included."""
        import torch

        from scale_rae.outputs import png_bytes

        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda image: png_bytes(image, {}), self.draw(cases)))
        rate = len(cases) / (time.perf_counter() - start)
        torch.set_num_threads(1)
        return rate

    def rate_in_threads(self, cases: list[Case]) -> float:
        """Images per second on the CPU with one batch per core at the same time, each on one thread."""
        import torch

        from scale_rae.outputs import png_bytes

        parts = [cases[i : i + 4] for i in range(0, len(cases), 4)]
        start, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda part: [png_bytes(image, {}) for image in self.draw(part, 4)], parts))
        self.cpu_seconds.append((time.process_time() - cpu) / len(cases))
        return len(cases) / (time.perf_counter() - start)

    def alone(self, cases: list[Case], repeat: int) -> float:
        """Median seconds of one image drawn alone, PNG included."""
        import torch

        from scale_rae.outputs import png_bytes

        torch.set_num_threads(self.threads)
        turn = itertools.cycle(cases)
        seconds = median_seconds(lambda: png_bytes(self.draw([next(turn)], 1)[0], {}), repeat)
        torch.set_num_threads(1)
        return seconds

    def references(self, cases: list[Case]) -> list[Any]:
        """Pixels of each case drawn alone; on the CPU on one thread each, which gives the exact bytes."""
        import numpy as np
        import torch

        workers = self.threads if self.model.device.type == "cpu" else 1
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda case: np.asarray(self.draw([case], 1)[0]), cases))


class Memory(threading.Thread):
    """Samples the resident memory of this process, in MiB, every two seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self.ended = threading.Event()

    def run(self) -> None:
        import psutil  # type: ignore[import-untyped]

        process = psutil.Process()
        while not self.ended.wait(2.0):
            self.samples.append(process.memory_info().rss / 2**20)


def progress(text: str) -> None:
    """Prints the time and the step that starts on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; the module's docstring describes them."""
    import torch

    from scale_rae.memory import pick_device
    from scale_rae.opening import silence_libraries
    from scale_rae.options import ModelChoice
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.serve.engine import Engine
    from scale_rae.serve.server import Server, bind
    from scale_rae.serve.settings import Limits, ServeSettings

    silence_libraries()
    device = pick_device(args.device)
    threads = torch.get_num_threads()
    if args.full_size:
        model = made_up(args.full_size, device)
    else:
        model = ScaleRAE.from_pretrained(args.model_path, device=str(device))
    _ = model.decoder, model.encoder
    model.expect(1 << 40)
    settings = ServeSettings(ModelChoice("made-up"), name="model", limits=Limits(requests=2 * args.clients))
    start = time.perf_counter()
    engine = Engine(lambda: (model, {}), most_jobs=settings.limits.requests, batch_size=args.batch_size)
    engine.start()
    engine.loaded.wait()
    if engine.error is not None:
        raise engine.error
    figures: dict[str, Any] = {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "model": args.full_size or args.model_path,
        "steps": args.steps,
        "guidance": args.guidance,
        "clients": args.clients,
        "engine": engine.summary(),
        "warm_up_seconds": time.perf_counter() - start,
    }
    options = {"steps": args.steps, "guidance": args.guidance}
    offline, cases = Offline(model, options, threads), cases_of(args.cases)
    progress(f"ready: {engine.summary()}; drawing {len(cases)} pictures alone")
    references = offline.references(cases)
    progress("offline")
    offline.rate(cases[:8])
    on_cpu = device.type == "cpu"
    rates = [offline.rate(cases)]
    in_threads = [offline.rate_in_threads(cases)] if on_cpu else []
    lone_offline = offline.alone(cases, args.lone)

    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(engine, settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    progress("a lone client")
    lone: list[float] = []
    while len(lone) < 3:
        lone = [row[1] for row in ask(url, 1, max(1.0, args.lone * lone_offline), cases, options)]
    before, cpu = counts(engine), time.process_time()
    memory = Memory()
    memory.start()
    progress(f"{args.clients} clients")
    rows = ask(url, args.clients, args.seconds, cases, options)
    memory.ended.set()
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[str(row[4])] = statuses.get(str(row[4]), 0) + 1
    loaded, cpu = counts(engine), time.process_time() - cpu
    progress(f"{len(rows)} requests {statuses}; offline again")
    server.stop()
    thread.join()
    rates.append(offline.rate(cases))
    in_threads += [offline.rate_in_threads(cases)] if on_cpu else []
    lone_after = offline.alone(cases, args.lone)
    engine.close()

    wrong, farthest = compare(rows, references, exact=on_cpu)
    latencies = sorted(row[1] for row in rows)
    span = max(row[3] for row in rows) - min(row[2] for row in rows)
    batches, drawn = (now - then for now, then in zip(loaded, before, strict=True))
    settled = memory.samples[len(memory.samples) // 4 :] or [float("nan")]
    half = len(settled) // 2
    best = max(statistics.mean(way) for way in (rates, in_threads) if way)
    return (
        figures
        | {
            "requests": len(rows),
            "statuses": statuses,
            "lost_or_refused": sum(count for status, count in statuses.items() if status != "200"),
            "wrong": wrong,
            "farthest_pixel": farthest,
            "seconds": span,
            "images_per_second": statuses.get("200", 0) / span,
            "offline_images_per_second": rates,
            "offline_in_threads": in_threads,
            "share_of_offline": statuses.get("200", 0) / span / best,  # of the faster offline way
            # CPU seconds do not depend on what else the machine does; wall seconds do.
            "cpu_seconds_per_image": cpu / max(1, drawn),
            "offline_cpu_seconds_per_image": offline.cpu_seconds,
            "mean_batch": drawn / max(1, batches),
            "p50": statistics.median(latencies),
            "p95": latencies[int(0.95 * (len(latencies) - 1))],
            "lone_p50": statistics.median(lone[1:]),
            "lone_offline": [lone_offline, lone_after],
            "lone_over_offline": statistics.median(lone[1:]) / statistics.mean([lone_offline, lone_after]),
            "memory_mib": {"first": memory.samples[:1], "settled": settled[:1], "last": memory.samples[-1:]},
            "memory_growth_mib": statistics.mean(settled[half:]) - statistics.mean(settled[: half or 1]),
        }
    )


def counts(engine: Engine) -> tuple[float, float]:
    """(batches, images) that the engine has drawn so far."""
    value = engine.metrics.registry.get_sample_value
    return value("scale_rae_batch_size_count", {"stage": "draw"}) or 0, value("scale_rae_images_total") or 0


def compare(rows: list[Any], references: list[Any], exact: bool) -> tuple[int, int]:
    """(number of pictures that differ from those drawn alone, the largest difference of a pixel).

    Unless `exact`, rounding may differ, as it does on a GPU between batch sizes: then the mean difference from the picture
    asked for must be less than a tenth of that from every other picture.
    """
    import numpy as np
    from PIL import Image

    right: dict[tuple[int, str], bool] = {}
    farthest = 0
    drawn_alone = np.stack(references).astype(np.int16)
    for case, *_, digest, png in rows:
        if png is not None:
            with Image.open(io.BytesIO(base64.b64decode(png))) as image:
                differences = np.abs(drawn_alone - np.asarray(image))
            farthest = max(farthest, int(differences[case].max()))
            means = differences.reshape(len(references), -1).mean(axis=1)
            others = np.delete(means, case).min(initial=np.inf)
            right[case, digest] = bool(means[case] == 0 if exact else means[case] < others / 10)
    return sum(not right[case, digest] for case, *_, digest, _ in rows if digest is not None), farthest


def main() -> None:
    if "--as-clients" in sys.argv:
        print(json.dumps(asyncio.run(clients(*json.loads(sys.stdin.read())))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--full-size", choices=("1.5b", "7b", "tiny"), help="made-up weights of this size instead")
    parser.add_argument("--device")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--cases", type=int, default=64, help="prompts with a seed, each drawn alone beforehand")
    parser.add_argument("--lone", type=int, default=10, help="requests of a lone client")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.cases < 2:
        parser.error(f"--cases {args.cases}: must be at least 2, so that pictures of other seeds are recognised")
    figures = measure(args)
    show(figures, 28)
    write_json(args.json, figures)
    if figures["lost_or_refused"] or figures["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
