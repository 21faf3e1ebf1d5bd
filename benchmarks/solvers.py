"""How each solver's error against 1000 Euler steps falls with the number of network evaluations: table, JSON, plot.

    python benchmarks/solvers.py --plot docs/figures/solvers.png --json docs/figures/solvers.json

The error is the root mean square difference of the sampled latents over that of the reference, on --prompts prompts of the
bundled model's world with one noise each. The reference takes 1000 Euler steps from t = 1 to t = 0; the published loop
("euler") starts and ends elsewhere (see scale_rae.flow.euler), so its error levels off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import scale_rae
from benchmarks.bench import write_json
from scale_rae import flow, options
from scale_rae.options import SamplingOptions
from scale_rae.shapes import world

STEPS = {
    "euler": (8, 12, 16, 24, 32, 49, 100, 200),
    "heun": (4, 6, 8, 12, 16, 25, 50),
    "dpmpp_2m": (8, 12, 16, 20, 24, 32, 49, 100),
    "ab2": (8, 12, 16, 20, 24, 32, 49, 100),
}


# Euler from t = 1 to t = 0, the reference when steps are many.
EXACT_EULER = flow.Sampler(flow.euler, flow.exact_times)


def measure(model_path: str, count: int, guidance: float) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, relative error) of each solver, in the order of evaluations."""
    model = scale_rae.load(model_path)
    prompts = [line["prompt"] for line in world.prompts(-(-count // 6), "only", 0)][:count]
    replies = model.reply([f"Can you generate {prompt}" for prompt in prompts])
    conditions = [reply.condition for reply in replies if reply.condition is not None]
    seeds = list(range(len(conditions)))

    def latents(solver: str, steps: int) -> Tensor:
        chosen = SamplingOptions(steps=steps, solver=solver, guidance=guidance)
        return torch.stack(model.sample(conditions, seeds, chosen, batch_size=len(seeds)))

    flow.SAMPLERS["exact_euler"] = EXACT_EULER  # in this script's process alone
    options.SOLVERS += ("exact_euler",)
    reference = latents("exact_euler", 1000)
    results: dict[str, list[tuple[int, float]]] = {}
    for solver, choices in {**STEPS, "exact_euler": STEPS["euler"]}.items():
        results[solver] = []
        for steps in choices:
            error = (latents(solver, steps) - reference).square().mean().sqrt() / reference.square().mean().sqrt()
            evaluations = len(flow.evaluation_times(solver, steps, 1.0))
            results[solver].append((evaluations, float(error)))
            print(f"{solver:12} {evaluations:4} evaluations   error {float(error):.5f}", flush=True)
    return results


def plot(results: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Error over evaluations, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    labels = {
        "euler": "euler (published loop)",
        "exact_euler": "Euler from 1 to 0",
        "heun": "heun",
        "dpmpp_2m": "dpmpp_2m",
        "ab2": "ab2",
    }
    for solver, points in results.items():
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=labels[solver])
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("relative error of the latent against 1000 Euler steps")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Measures, prints, and writes the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results = measure(args.model_path, args.prompts, args.guidance)
    write_json(args.json, results)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
