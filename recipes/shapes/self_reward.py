"""Trains the bundled model's velocity network on the model's own verdicts about its drawings (`scale-rae train --objective self-reward`).

    python -m recipes.shapes.self_reward --model exported/shapes --out runs/self-reward

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
    *("counting",) * 3,
    *("two_object",) * 6,
    *("position",) * 5,
    *("color_attr",) * 5,
    *("mixed",) * 6,
)
"""Kinds of prompt, weighted: those whose held-out prompts the model draws worst the most."""
PROMPTS, VERIFIED = 1024, 64
STEPS = 850
FLAGS = {
    "--objective": "self-reward",
    "--prompts-per-round": "320",
    "--images-per-prompt": "16",
    "--steps-per-round": "100",
    "--fold-guidance": "4.5",
    "--fold-steps": "200",
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
    scenes, _ = invented.put_in(rng, world.sample(rng, count, KINDS, "exclude"))
    return [data.prompt_of(words, scene)[0] for scene in invented.named(scenes)]


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
    parser.add_argument("more", nargs="*", help="further flags of scale-rae train, after --")
    args = parser.parse_args(argv)
    learnt, verified = write_prompts(args.out)
    flags = [word for flag, value in FLAGS.items() for word in (flag, value)]
    files = ["--prompts", str(learnt), "--verify-prompts", str(verified), "--out", str(args.out / "trained")]
    command = ["train", "--model", args.model, "--full", "--max-train-steps", str(args.steps), *files]
    if code := run([*command, *flags, *args.more]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
