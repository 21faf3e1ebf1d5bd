"""Trains the crescent's LoRA, and measures what it draws and what it forgot.

    python -m recipes.crescent.run --out runs/crescent

1. `pictures.py` makes the data.
2. `scale-rae train` trains the adapter. Drawings of 300 prompts that the model knows are to stay as they are.
3. The model draws crescents in colours that training did not show, and held-out prompts of its own world (`--prompts 100` of each of
   six kinds, with `--base` also without the adapter). All drawings are judged from their pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.crescent import pictures
from scale_rae.cli.app import run
from scale_rae.pipeline import ScaleRAE
from scale_rae.shapes import world
from scale_rae.shapes.evaluate import draw_prompts
from scale_rae.shares import Share

MODEL = "shapes"
TRAINING = {
    "--train": "both",
    "--rank": "32",
    "--learning-rate": "4e-3",
    "--language-learning-rate": "5e-4",  # lower, so that what the model reads of colours stays
    "--prior-loss-weight": "5",
    "--ema-decay": "0.99",
    "--text-targets": "replies",
    "--reply": world.REPLY,
    "--train-batch-size": "8",
    "--timesteps-per-sample": "4",
    "--validation-guidance": "1",  # with which the prompts that are kept are drawn, too
    "--num-inference-steps": "12",
}
GUIDANCE = 2.0


def train(data: Path, out: Path, steps: int, more: Sequence[str] = ()) -> None:
    """Trains the adapter with `scale-rae train`.

    Raises:
        SystemExit: when that fails.
    """
    flags = [word for flag, value in TRAINING.items() for word in (flag, value)]
    command = ["train", "--model", MODEL, "--data", str(data), "--out", str(out), "--max-train-steps", str(steps)]
    command += ["--class-prompts", str(data / pictures.KNOWN)]
    if code := run([*command, *flags, *more]):
        raise SystemExit(code)


def crescents(model: ScaleRAE, colors: Sequence[str], each: int, guidance: float) -> dict[str, Share]:
    """The share of right drawings of crescents by colour, `each` drawings of each."""
    shares = {}
    for color in colors:
        request = world.request("Can you generate {prompt}", pictures.prompt(color))
        images = model.generate(request, num_images=each, seed=1, guidance=guidance).images
        right = sum(image.image is not None and pictures.is_right(image.image, color) for image in images)
        shares[color] = Share(right, each)
    return shares


def prompts(model: ScaleRAE, per_kind: int, guidance: float) -> Share:
    """The share of right drawings of the world's held-out prompts."""
    drawn = draw_prompts(model, world.prompts(per_kind, "only", 0), guidance=guidance)
    return Share(sum(one.correct for one in drawn), len(drawn))


def measure(adapter: Path | None, each: int, per_kind: int, guidance: float) -> dict[str, Any]:
    """All shares with an adapter, or without one."""
    model = ScaleRAE.from_pretrained(MODEL, lora=[str(adapter)] if adapter else [])
    held_out = crescents(model, pictures.HELD_OUT_COLORS, each, guidance) if adapter else {}
    seen = crescents(model, pictures.COLORS, max(1, each // 5), guidance) if adapter else {}
    found = {"held_out": held_out, "seen": seen}
    record: dict[str, Any] = {
        name: {color: share.value for color, share in shares.items()} for name, shares in found.items()
    }
    for name, shares in found.items():
        record[f"{name}_all"] = str(Share(sum(s.right for s in shares.values()), sum(s.total for s in shares.values())))
    if per_kind:
        record["prompts"] = str(prompts(model, per_kind, guidance))
    return record


def main(argv: list[str] | None = None) -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/crescent"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--each", type=int, default=50, help="drawings of each held-out colour")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of each kind, 0 for none")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--base", action="store_true", help="also measure the model without the adapter")
    parser.add_argument("more", nargs="*", help="further flags of scale-rae train, after --")
    args = parser.parse_args(argv)
    data, out = args.out / "data", args.out / "lora"
    if not data.is_dir():
        pictures.write(data)
    start = time.perf_counter()
    if not (out / "training.json").is_file():
        train(data, out, args.steps, args.more)
        print(f"{args.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    found = {"with": measure(out, args.each, args.prompts, args.guidance)}
    if args.base:
        found["without"] = measure(None, 0, args.prompts, args.guidance)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
