"""Seconds per image of an evaluation of the network and of a look: what study_search.py takes as --seconds.

    python benchmarks/study_seconds.py --guidance 1 4 --device cuda --dtype float32

Images of several prompts are drawn up to the first look and read there, in one batch, as adaptive search does it. The figures
are medians of `--repeats`, after a first time that does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import scale_rae
from scale_rae.adaptive import Batching, Search, Searcher
from scale_rae.noise import image_seed
from scale_rae.options import SamplingOptions, SearchOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import load_reward
from scale_rae.scores import Asked
from scale_rae.shapes import world
from scale_rae.wording import as_request


def measured(model: ScaleRAE, reward: str | None, options: SamplingOptions, batch: int, repeats: int) -> list[float]:
    """Seconds per image of an evaluation and of a look, in batches of `batch` images of as many prompts."""
    loaded = load_reward(reward, model) if reward is not None else None
    searcher = Searcher(model, loaded, 1, SearchOptions(max_candidates=1), options, Batching(batch, batch))
    texts = [line["prompt"] for line in world.prompts(-(-batch // 6), "only")][:batch]
    requests = [as_request(text, "Can you generate ") for text in texts]
    replies = model.reply(requests)
    searches = [
        Search(Asked(*each), lambda j, i=i: image_seed(42, i, j))  # type: ignore[misc]
        for i, each in enumerate(zip(texts, requests, replies, strict=True))
    ]

    def once() -> tuple[float, float]:
        drawn = [one for search in searches for one in searcher.begin(search)]
        stages = searcher.stages(searches, [[one] for one in drawn])
        drawing, looking = next(stages), next(stages)
        assert drawing.stop is not None

        def draw() -> None:
            trajectories = [one.trajectory for one in drawn]
            for one, new in zip(drawn, model.advance(trajectories, drawing.stop or 0, options, batch), strict=True):
                one.trajectory = new

        # With these solvers, a step is an evaluation.
        return timed(draw) / drawing.stop / batch, timed(lambda: searcher.read(drawn, looking.t)) / batch

    found = [once() for _ in range(repeats + 1)][1:]
    return [statistics.median(values) for values in zip(*found, strict=True)]


def timed(function: Callable[[], object]) -> float:
    """The seconds that a function takes; what it returns is on the host, so the device is done."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints, one line per guidance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--reward", default="siglip", help="none for a search without")
    parser.add_argument("--solver", choices=("ab2", "dpmpp_2m", "euler"), default="ab2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    model = scale_rae.load(args.model_path, device=args.device, dtype=args.dtype)
    for guidance in args.guidance:
        options = SamplingOptions(guidance=guidance, steps=args.steps, solver=args.solver)
        reward = None if args.reward == "none" else args.reward
        seconds = measured(model, reward, options, args.batch_size, args.repeats)
        print(f"guidance {guidance:g}: --seconds {seconds[0]:.3g} {seconds[1]:.3g}", flush=True)


if __name__ == "__main__":
    main()
