"""One experiment on one device and on two: are the files the same, and how much faster is it?

    python benchmarks/two_gpus.py                               # cuda:0 against cuda:0,cuda:1; a few minutes on two H200s
    python benchmarks/two_gpus.py --devices cpu,cpu --tiny      # a small model, on any machine

Writes a checkpoint in the published layout (bfloat16; the sizes of Scale-RAE-Qwen1.5B_DiT2.4B with siglip2-so400m and a ViT-XL
decoder, 10 GB; its weights are made up, so the pictures show nothing) and runs `scale-rae scale t2i` on it twice: 4 x 2 images
per prompt, 49 steps, latent questions, siglip reward. The made-up model answers every message by asking for an image.

Throughput is images over the seconds between the end of the first worker's loading and the end of the run. A few prompts run on
all GPUs beforehand and are not counted, since the first processes on a machine read kernels and libraries from its disk,
later ones from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.bench import write_json
from benchmarks.made_up import write_checkpoint, write_prompts

ROOT = Path(__file__).parents[1]


def scale(out: Path, model: Path, devices: str, steps: int, compile: str, limit: int | None = None) -> dict[str, float]:
    """The throughput of the experiment, or of its first `limit` prompts, run in another process."""
    command = [sys.executable, "-m", "scale_rae", "scale", "t2i", "--model-path", str(model), "--devices", devices]
    command += ["--metadata-file", str(model.parent / "prompts.jsonl"), "--output-dir", str(out), "--reward", "siglip"]
    command += ["--steps", str(steps), "--batch-size", "8", "--compile", compile]
    command += [] if limit is None else ["--limit", str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # One worker gets as many threads as each of several; otherwise, on a CPU, it would use the other workers' cores too.
    environment["OMP_NUM_THREADS"] = "1" if "cpu" in devices else "4"
    print(f"--devices {devices}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (described,) = out.glob("model/*/experiment.json")
    record = json.loads(described.read_text())
    seconds, images = record["seconds"], (limit or record["prompts"]["count"]) * 8
    return {
        "images": images,
        "seconds": seconds["total"],
        "working": seconds["working"],
        "images_per_second": images / seconds["working"],
    }


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How many files differ, which are in one run alone, and the largest differences of pixels and scores."""
    from PIL import Image

    first, second = ({str(p.relative_to(f)): p for p in f.glob("model/*/[0-9]*/**/*.*")} for f in (one, other))
    differ = [n for n in first if n in second and first[n].read_bytes() != second[n].read_bytes()]
    found: dict[str, Any] = {
        "files": len(first),
        "only_in_one": sorted(first.keys() ^ second.keys()),
        "different": len(differ),
        "largest_pixel_difference": 0,
        "largest_score_difference": 0.0,
    }
    for name in differ:
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(p)).astype(int) for p in (first[name], second[name]))
            found["largest_pixel_difference"] = max(found["largest_pixel_difference"], int(np.abs(a - b).max()))
        else:
            x, y = (_numbers(json.loads(p.read_text())) for p in (first[name], second[name]))
            difference = np.abs(np.array(x) - np.array(y)).max() if len(x) == len(y) else float("inf")
            found["largest_score_difference"] = max(found["largest_score_difference"], float(difference))
    return found


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for key in value for x in _numbers(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def main() -> None:
    """Runs both, compares and prints; the exit status is 1 when the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", default="cuda:0,cuda:1", help="devices of the second run; the first run has the first of them"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=49)
    # Compilation, once per worker, would be a larger share of this short run than of a long one.
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="off")
    parser.add_argument("--tiny", action="store_true", help="a small made-up model")
    parser.add_argument("--out", type=Path, default=Path("runs/two_gpus"), help="a new folder")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out}: exists already; choose another folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = write_checkpoint("tiny" if args.tiny else "1.5b", args.out, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the workers are other processes and need this memory
    write_prompts(args.out / "prompts.jsonl", args.prompts)
    devices = args.devices.split(",")
    before = args.devices if "cuda" in args.devices else devices[0]  # one process reads all that a CPU needs
    scale(args.out / "before", model, before, min(4, args.steps), args.compile, 2 * len(before.split(",")))
    one = scale(args.out / "one", model, devices[0], args.steps, args.compile)
    several = scale(args.out / "several", model, args.devices, args.steps, args.compile)
    files = compare(args.out / "one", args.out / "several")
    ratio = several["images_per_second"] / one["images_per_second"]
    figures = {"devices": args.devices, "one": one, "several": several, "throughput_ratio": ratio, "files": files}
    for name, run in (("one device", one), (args.devices, several)):
        print(
            f"{name:16} {run['images']} images in {run['seconds']:.1f} s, {run['working']:.1f} s of it after loading: "
            f"{run['images_per_second']:.3f} images/s"
        )
    print(f"throughput       {ratio:.3f} times that of one device")
    same = not files["different"] and not files["only_in_one"]
    print(f"{files['files']} files of prompts: " + ("the same bytes" if same else json.dumps(files)))
    write_json(args.json, figures)
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
