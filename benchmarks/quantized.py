"""What each quantisation costs in accuracy: the bundled model's pictures of the same prompts and noise, judged from pixels.

    python benchmarks/quantized.py --out runs/quantized --device cuda

Prompts are held out of training. Pictures and verdicts are kept in --out, so the same command continues an interrupted run, and
pictures can be drawn on one machine and judged on another that has scikit-image. The table has each form's right pictures, and
its difference from the unquantised model with a 95 % interval of paired differences.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import prompts_in_turn
from scale_rae.errors import InputError
from scale_rae.options import QUANTIZE
from scale_rae.shapes import world

PLAIN = "none"
AT_ONCE = 500  # prompts whose pictures are in one file; they are drawn in one batch


def file_of(args: argparse.Namespace, form: str, first: int) -> Path:
    """Where the pictures of the prompts from `first` on are kept."""
    path: Path = args.out / f"{form}-{first:05}.npz"
    return path


def draw(args: argparse.Namespace, form: str, prompts: Sequence[dict[str, Any]]) -> None:
    """Draws the pictures of `form` that are not there yet."""
    import torch

    import scale_rae
    from scale_rae.noise import image_seed

    missing = [i for i in range(0, len(prompts), AT_ONCE) if not file_of(args, form, i).exists()]
    if not missing:
        return
    start = time.perf_counter()
    quantize: Any = None if form == PLAIN else form
    model = scale_rae.load(args.model_path, device=args.device, dtype=args.dtype, quantize=quantize, compile="off")
    loaded = time.perf_counter()
    for first in missing:
        part = prompts[first : first + AT_ONCE]
        requests = [f"Can you generate {p['prompt']}" for p in part]
        seeds = [[image_seed(args.seed, i)] for i in range(first, first + len(part))]
        drawn = model.generate(requests, image_seeds=seeds, batch_size=args.batch, guidance=args.guidance)
        images = [g.images[0].image if g.images else None for g in drawn]
        blank = np.full((world.SIZE, world.SIZE, 3), 255, np.uint8)  # of a reply that asks for no picture: wrong
        file = file_of(args, form, first)
        with (args.out / f"{file.name}.part").open("wb") as stream:
            np.savez_compressed(
                stream, pictures=np.stack([blank if image is None else np.asarray(image) for image in images])
            )
        Path(stream.name).replace(file)
    seconds = time.perf_counter() - loaded
    print(f"{form}: loaded in {loaded - start:.1f} s, drawn from prompt {missing[0]} on in {seconds:.1f} s", flush=True)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_right(picture: NDArray[np.uint8], metadata: dict[str, Any]) -> bool:
    """Whether the judge finds that a picture [S, S, 3] shows its prompt."""
    from PIL import Image

    from scale_rae.shapes.judge import judge

    return judge(Image.fromarray(picture), metadata).correct


def judge_form(
    args: argparse.Namespace, form: str, prompts: Sequence[dict[str, Any]], judges: ProcessPoolExecutor
) -> list[bool]:
    """The verdicts on the pictures of a form, in the order of the prompts, as far as pictures are there; kept in a file."""
    file = args.out / f"{form}.json"
    right: list[bool] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for first in range(len(right), len(prompts), AT_ONCE):
        if not file_of(args, form, first).exists():
            break
        pictures = np.load(file_of(args, form, first))["pictures"]
        right += judges.map(is_right, pictures, prompts[first : first + len(pictures)], chunksize=16)
        file.write_text(json.dumps(right), encoding="utf-8")
    return right


def difference(right: Sequence[bool], plain: Sequence[bool]) -> tuple[float, float]:
    """(difference of the shares in points, half its 95 % interval), from pairs of verdicts on the same prompt and noise."""
    gained, lost = (sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((right, plain), (plain, right)))
    count = len(plain)
    variance = (gained + lost - (gained - lost) ** 2 / count) / count**2
    return 100 * (gained - lost) / count, 100 * 1.96 * math.sqrt(variance)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and verdicts")
    parser.add_argument("--model-path", default="shapes", help="a model of the world of shapes")
    parser.add_argument("--forms", nargs="+", default=[PLAIN, *QUANTIZE], help=f"{PLAIN} or what --quantize takes")
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=AT_ONCE, help="images drawn at once")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--judges", type=int, default=os.cpu_count(), help="processes that judge pictures")
    args = parser.parse_args()
    if unknown := set(args.forms) - {PLAIN, *QUANTIZE}:
        parser.error(f"--forms {' '.join(sorted(unknown))}: choose of {', '.join([PLAIN, *QUANTIZE])}")

    settings = {name: str(getattr(args, name)) for name in ("model_path", "prompts", "seed", "guidance")}
    args.out.mkdir(parents=True, exist_ok=True)
    about = args.out / "settings.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise InputError(f"{about}: this folder has pictures of other settings; choose another --out")
    about.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    prompts = prompts_in_turn(args.prompts, seed=args.seed)
    judges = None
    if find_spec("skimage") is not None:  # new processes, since this one will use the GPU
        judges = ProcessPoolExecutor(args.judges, mp_context=multiprocessing.get_context("spawn"))
    verdicts: dict[str, list[bool]] = {}
    for form in args.forms:
        try:
            draw(args, form, prompts)
        except Exception as e:  # for example on a device without float8; the other forms go on
            print(f"{form}: {type(e).__name__}: {e}", flush=True)
        if judges is not None:
            right = judge_form(args, form, prompts, judges)
            if len(right) == len(prompts):
                verdicts[form] = right
                print(f"{form}: {sum(right)} of {len(right)} right", flush=True)
    if judges is None:
        print(f"scikit-image is not installed here: copy {args.out} and run the same command where it is")
        return
    judges.shutdown()
    print(f"\n| | right of {len(prompts)} | share | difference, points |\n|---|---|---|---|")
    for form, right in verdicts.items():
        against = ""
        if form != PLAIN and PLAIN in verdicts:
            against = "{:+.2f} ± {:.2f}".format(*difference(right, verdicts[PLAIN]))
        print(f"| {form} | {sum(right)} | {sum(right) / len(right):.3f} | {against} |")


if __name__ == "__main__":
    main()
