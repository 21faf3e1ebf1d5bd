"""What each quantisation costs in accuracy: the bundled model's pictures of the same prompts and noise, judged from pixels.

    python benchmarks/quantized.py --out runs/quantized --device cuda

Prompts are held out of training. Verdicts are written to --out as they come, so the same command continues an interrupted run.
The table has each form's right pictures and its difference from the unquantised model, with a 95 % interval of paired differences.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.options import QUANTIZE
from scale_rae.shapes import world

PLAIN = "none"
AT_ONCE = 500  # prompts whose verdicts are written together; their images are drawn in one batch


def prompts_of(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` prompts, equally many of each kind but for the last few, kinds in turn."""
    per_kind = -(-count // len(world.KINDS))
    lines = world.prompts(per_kind, "only", seed)
    kinds = [lines[i : i + per_kind] for i in range(0, len(lines), per_kind)]
    return [line for group in zip(*kinds, strict=True) for line in group][:count]


def draw(args: argparse.Namespace, form: str, prompts: Sequence[dict[str, Any]], judges: ProcessPoolExecutor) -> None:
    """Appends the verdicts that `form` still lacks to its file."""
    import torch

    import scale_rae
    from scale_rae.noise import image_seed

    file = args.out / f"{form}.jsonl"
    done = len(verdicts(file))
    if done >= len(prompts):
        return
    start = time.perf_counter()
    quantize = None if form == PLAIN else form
    model = scale_rae.load(args.model_path, device=args.device, dtype=args.dtype, quantize=quantize, compile="off")
    judged: Any = None  # the verdicts on the part before, which come while the next one is drawn
    with file.open("a", encoding="utf-8") as stream:
        for first in [*range(done, len(prompts), AT_ONCE), None]:
            before = judged
            if first is not None:
                part = prompts[first : first + AT_ONCE]
                requests = [f"Can you generate {p['prompt']}" for p in part]
                seeds = [[image_seed(args.seed, i)] for i in range(first, first + len(part))]
                drawn = model.generate(requests, image_seeds=seeds, batch_size=args.batch, guidance=args.guidance)
                judged = judges.map(
                    is_right, [g.images[0].image if g.images else None for g in drawn], part, chunksize=16
                )
            if before is not None:
                stream.write("".join(f"{json.dumps(right)}\n" for right in before))
                stream.flush()
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{form}: {len(prompts) - done} pictures in {time.perf_counter() - start:.0f} s", flush=True)


def is_right(image: Any, metadata: dict[str, Any]) -> bool:
    """Whether the judge finds that a picture shows its prompt; a reply without a picture is wrong."""
    from scale_rae.shapes.judge import judge

    return image is not None and judge(image, metadata).correct


def verdicts(file: Path) -> list[bool]:
    """The verdicts in a file, in the order of the prompts; a line that an interruption cut short is left out."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def difference(right: Sequence[bool], plain: Sequence[bool]) -> tuple[float, float]:
    """(difference of the shares in points, half its 95 % interval), from pairs of verdicts on the same prompt and noise."""
    gained, lost = (sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((right, plain), (plain, right)))
    count = len(plain)
    variance = (gained + lost - (gained - lost) ** 2 / count) / count**2
    return 100 * (gained - lost) / count, 100 * 1.96 * math.sqrt(variance)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for verdicts")
    parser.add_argument("--model-path", default="shapes", help="a model of the world of shapes")
    parser.add_argument("--forms", nargs="+", default=[PLAIN, *QUANTIZE], help=f"{PLAIN} or what --quantize takes")
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=AT_ONCE, help="images drawn at once")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--judges", type=int, default=8, help="processes that judge pictures")
    args = parser.parse_args()
    if unknown := set(args.forms) - {PLAIN, *QUANTIZE}:
        parser.error(f"--forms {' '.join(sorted(unknown))}: choose of {', '.join([PLAIN, *QUANTIZE])}")

    settings = {
        name: str(getattr(args, name)) for name in ("model_path", "prompts", "seed", "guidance", "device", "dtype")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    about = args.out / "settings.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise InputError(f"{about}: this folder has verdicts of other settings; choose another --out")
    about.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    prompts = prompts_of(args.prompts, args.seed)
    with ProcessPoolExecutor(args.judges) as judges:
        list(
            judges.map(is_right, [None] * args.judges, prompts[: args.judges])
        )  # started before this process has threads
        for form in args.forms:
            try:
                draw(args, form, prompts, judges)
            except ScaleRAEError as e:  # for example a device without float8
                print(f"{form}: {e}", flush=True)
    table(args, prompts)


def table(args: argparse.Namespace, prompts: Sequence[dict[str, Any]]) -> None:
    """Prints the table of all forms that are complete."""
    results = {form: verdicts(args.out / f"{form}.jsonl")[: len(prompts)] for form in args.forms}
    plain = results.get(PLAIN, [])
    print(f"\n| | right of {len(prompts)} | share | difference, points |\n|---|---|---|---|")
    for form, right in results.items():
        if len(right) < len(prompts):
            continue
        against = (
            "" if form == PLAIN or len(plain) < len(prompts) else "{:+.2f} ± {:.2f}".format(*difference(right, plain))
        )
        print(f"| {form} | {sum(right)} | {sum(right) / len(right):.3f} | {against} |")


if __name__ == "__main__":
    main()
