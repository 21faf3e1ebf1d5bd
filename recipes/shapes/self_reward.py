"""Trains the bundled model's velocity network on the model's own verdicts about its drawings (`scale-rae train --objective self-reward`).

    python -m recipes.shapes.self_reward --model exported/shapes --out runs/self-reward

A model that draws better with guidance learns that first: add `-- --fold-guidance 4.5 --fold-steps 210`.

No prompt is held out of training: all come from the stream of prompts that the joint stage draws, invented names included. The model
reads drawings of those, too, and many pairs of names are better than the 25 pairs of the world's own shapes. The reward `siglip` is not
learnt from: it verifies.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.shapes import data, invented
from scale_rae.cli.app import run
from scale_rae.shapes import world

KINDS = (
    *("single_object",) * 1,
    *("colors",) * 2,
    *("counting",) * 4,
    *("two_object",) * 5,
    *("position",) * 4,
    *("color_attr",) * 5,
    *("mixed",) * 7,
)
"""Kinds of prompt, weighted: those whose held-out prompts the model draws worst the most."""
MIXTURES = ((0.6, 0.5), (1.0, 0.6))
"""Half of the prompts each: which share may name something invented, and how often a name of those is invented."""
PROMPTS, VERIFIED = 14000, 64
STEPS = 3640
FLAGS = {
    "--objective": "self-reward",
    "--reply": world.REPLY,
    "--prompts-per-round": "320",
    "--images-per-prompt": "16",
    "--steps-per-round": "70",
    "--draw-steps": "14",
    "--old-decay": "0.5",
    "--condition-noise": "0.15",
    "--verify-reward": "siglip",
    "--train-batch-size": "512",
    "--learning-rate": "2.5e-4",
    "--ema-decay": "0.99",
    "--lr-warmup-steps": "20",
    "--seed": "0",
}


def prompts(count: int, seed: int) -> list[str]:
    """Prompts, none of which names anything held out; short ones are there more than once."""
    rng, words = np.random.default_rng([seed, 5]), random.Random(f"{seed}/verdicts")
    made = []
    for number, (share, each) in enumerate(MIXTURES):
        scenes = world.sample(rng, (count + 1 - number) // 2, KINDS, "exclude")
        mixed, _ = invented.put_in(rng, scenes, share, each)
        made += [data.prompt_of(words, scene)[0] for scene in invented.named(mixed)]
    return made


def write_prompts(folder: Path, count: int = PROMPTS, verified: int = VERIFIED) -> tuple[Path, Path]:
    """The files of the prompts that are learnt from, and of those that verify, once they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    learnt = prompts(count, 0)
    others = [text for text in prompts(3 * verified, 1) if text not in set(learnt)][:verified]
    files = folder / "prompts.txt", folder / "verify.txt"
    for file, texts in zip(files, (learnt, others), strict=True):
        file.write_text("\n".join(texts) + "\n")
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the prompts and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--out", type=Path, default=Path("runs/self-reward"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--count", type=int, default=PROMPTS, help="prompts to learn from (default %(default)s)")
    parser.add_argument(
        "more", nargs="*", help="further flags of scale-rae train, after --; they replace those of the recipe"
    )
    args = parser.parse_args(argv)
    learnt, verified = write_prompts(args.out, args.count)
    given = {word.partition("=")[0] for word in args.more}
    flags = [word for flag, value in FLAGS.items() if flag not in given for word in (flag, value)]
    files = ["--prompts", str(learnt), "--verify-prompts", str(verified), "--out", str(args.out / "trained")]
    command = ["train", "--model", args.model, "--full", "--max-train-steps", str(args.steps), *files]
    if code := run([*command, *flags, *args.more]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
