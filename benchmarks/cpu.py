"""Speed and memory of a model on this machine's CPU: a table, and JSON with --json FILE.

    python benchmarks/cpu.py                     # the bundled model
    python benchmarks/cpu.py --model-path DIR

Every figure is the median of --repeat runs after one that is not counted, with the number of threads that torch chooses.
Scaling's figures are means over --repeat prompts.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench import median_seconds, show, write_json

PROMPT = "Can you generate a photo of a blue cross and a pink square?"
COLORS = ("blue", "red", "green", "yellow", "black", "white", "orange", "purple")
QUESTION = "Describe this image."


def process_seconds(arguments: list[str]) -> float:
    """Wall seconds of a fresh Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def measure(model_path: str, repeat: int, steps: int, guidances: Sequence[float]) -> dict[str, Any]:
    """All figures of one model, in seconds unless the name says otherwise."""
    _say("start and loading")
    bare = statistics.median(process_seconds(["-c", "pass"]) for _ in range(repeat))
    help_page = statistics.median(process_seconds(["-m", "scale_rae", "--help"]) for _ in range(repeat))
    start = time.perf_counter()
    import torch

    import scale_rae
    from scale_rae.options import SamplingOptions

    imported = time.perf_counter() - start
    start = time.perf_counter()
    model = scale_rae.load(model_path, device="cpu")
    _ = model.encoder.model, model.decoder
    loaded = time.perf_counter() - start
    figures: dict[str, Any] = {
        "model": model_path,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "import": imported,
        "load": loaded,
        "help_over_bare_python": help_page - bare,
    }
    reply = model.reply([PROMPT])[0]
    if reply.condition is None:
        raise SystemExit(
            f"error: {model_path}: the reply to the benchmark's prompt asks for no image; use a model that draws"
        )
    condition, options = reply.condition, SamplingOptions(steps=steps)
    latent = model.sample([condition], [0], options)[0]
    _say("drawing")
    figures["reply"] = median_seconds(lambda: model.reply([PROMPT]), repeat)
    for count in (1, 8):
        conditions, seeds = [condition] * count, list(range(count))
        seconds = median_seconds(lambda c=conditions, s=seeds: model.sample(c, s, options), repeat)  # type: ignore[misc]
        figures[f"sampling_per_image_batch_{count}"] = seconds / count
    figures["decode"] = median_seconds(lambda: model.decode([latent]), repeat)
    picture = model.decode([latent])[0]
    figures["encode"] = median_seconds(lambda: model.encode([picture]), repeat)
    figures["generate_end_to_end"] = median_seconds(lambda: model.generate(PROMPT, steps=steps), repeat)
    _say("answers and scores")
    tokens = 32
    for count in (1, 8):
        asked = [QUESTION] * count
        seconds = median_seconds(
            lambda a=asked: model.answer(a, latents=[latent] * len(a), max_new_tokens=tokens),  # type: ignore[misc]
            repeat,
        )
        answers = model.answer(asked, latents=[latent] * count, max_new_tokens=tokens)
        figures[f"answer_tokens_per_second_batch_{count}"] = sum(len(a.reply.ids) for a in answers) / seconds
    figures["score_per_image_batch_8"] = median_seconds(lambda: model.score([latent] * 8, PROMPT), repeat) / 8
    for guidance in guidances:
        _say(f"scaling at guidance {guidance:g}")
        figures |= {
            f"{name}_guidance_{guidance:g}": v for name, v in scaling(model_path, guidance, repeat, steps).items()
        }
    figures["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def scaling(model_path: str, guidance: float, count: int, steps: int) -> dict[str, float]:
    """`scale t2i` of `count` prompts (4 x 2 images, latent questions, siglip reward): seconds per prompt after loading, and the
    share of them in which no network ran."""
    from scale_rae.options import SamplingOptions
    from scale_rae.promptfile import PromptRecord
    from scale_rae.scaling.events import Event, WorkerLoaded
    from scale_rae.scaling.launch import run
    from scale_rae.scaling.local import Local
    from scale_rae.scaling.settings import Settings

    prompts = [PromptRecord(i + 1, f"a photo of a {color} cross", i) for i, color in enumerate(COLORS[:count])]
    settings = Settings("", model_path, options=SamplingOptions(guidance=guidance, steps=steps), reward="siglip")
    clock = NetworkClock()

    def listen(event: Event) -> None:
        if isinstance(event, WorkerLoaded):
            clock.seconds = 0.0

    with tempfile.TemporaryDirectory() as folder, clock:
        outcome = run(settings, prompts, Path(folder), Local(["cpu"]), listen=listen)
    if outcome.failed:
        raise SystemExit(f"error: {model_path}: prompts failed: {outcome.failed}")
    return {
        "scaling_4x2_per_prompt": outcome.working / len(prompts),
        "scaling_4x2_share_outside_networks": 1 - clock.seconds / outcome.working,
    }


class NetworkClock:
    """Counts, while entered, the seconds in which any thread was inside a network.

    That is a torch module's forward, an evaluation of the velocity network, or a pass of the language model, whose layers are
    functions.
    """

    def __init__(self) -> None:
        self.seconds, self._inside, self._begun = 0.0, 0, 0.0
        self._lock, self._own = threading.Lock(), threading.local()
        self._hooks: list[Any] = []
        self._methods: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        from torch.nn.modules import module

        from scale_rae.fast_dit import FastDiT
        from scale_rae.kv_cache import KVCache

        passes = ((FastDiT, "evaluate"), (KVCache, "extend"), (KVCache, "step"))
        self._methods = [(owner, name, getattr(owner, name)) for owner, name in passes]
        for owner, name, method in self._methods:
            setattr(owner, name, self._timed(method))

        self._hooks = [
            module.register_module_forward_pre_hook(self._enter),
            module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for owner, name, method in self._methods:
            setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self._enter()
            try:
                return method(*args, **options)
            finally:
                self._leave()

        return timed

    def _enter(self, *call: object) -> None:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth == 1:
            with self._lock:
                self._inside += 1
                if self._inside == 1:
                    self._begun = time.perf_counter()

    def _leave(self, *call: object) -> None:
        self._own.depth -= 1
        if self._own.depth == 0:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self.seconds += time.perf_counter() - self._begun


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=49, help="of every drawing (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 3.0], help="of the rows of scaling (default: 1 and 3)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    figures = measure(args.model_path, args.repeat, args.steps, args.guidance)
    show(figures, 36)
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
