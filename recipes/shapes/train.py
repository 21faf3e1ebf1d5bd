"""All stages in order: encoder, pixel decoder, image-text score, joint training, the reader's own, export, a first look.

    python -m recipes.shapes.train --out runs/shapes --export exported/shapes

Finished stages are not repeated, and an interrupted stage resumes. Every stage is a process of its own, because data is made in forked
processes before CUDA starts. With `--stop-after S`, the command ends about S seconds after its start, export and look included; the
same command resumes it. With `--parts-of DIR`, the encoder and the pixel decoder are taken from an exported model (such as
`scale_rae/bundled/shapes`), and only the later stages are trained.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from recipes.shapes import common, settings
from recipes.shapes.export import CASED
from recipes.shapes.loop import say

EXPORT_SECONDS = 65  # kept of --stop-after for saving, export and look, and for a stage to start and stop
LEAST_SECONDS = 60  # left of --stop-after, below which no stage is started

TINY: dict[str, str] = {
    "encoder": "--tiny --steps 40 --batch 48 --pool 1000 --workers 1 --log-every 10 --warmup 10 --no-compile",
    "decoder": "--tiny --steps 20 --batch 48 --pool 500 --workers 1 --log-every 10 --warmup 5 --no-compile",
    "reward": "--tiny --steps 20 --batch 32 --pool 500 --workers 1 --log-every 10 --warmup 5 --no-compile",
    "joint": "--tiny --steps 40 --draw-batch 24 --follow-batch 4 --name-batch 8 --read-batch 12 --chat-batch 4 --draw-pool 1000 "
    "--name-pool 500 --read-pool 500 "
    "--workers 1 --log-every 10 --warmup 10 --no-compile",
    "reader": "--tiny --steps 10 --draw-batch 4 --follow-batch 2 --read-batch 6 --own-batch 4 --shown-batch 2 --outside-batch 3 "
    "--blind-batch 2 --talk-batch 2 --read-pool 60 --draw-pool 20 --other-pool 20 --own-pool 24 --draw-at-once 12 --workers 1 "
    "--log-every 5 --warmup 2 --no-compile",
}
WEIGHTS = {
    "encoder": "encoder/encoder.safetensors",
    "decoder": "decoder/decoder.safetensors",
    "reward": "reward/encoder.safetensors",
    "joint": "joint/finished",
    "reader": "reader/finished",
}
DRAWN = "drawn"  # the model of the joint stage, exported: the reader stage begins with it and lets it draw


def run(module: str, arguments: Sequence[str]) -> None:
    """Runs a stage as a process; raises SystemExit when it fails."""
    command = [sys.executable, "-m", f"recipes.shapes.{module}", *arguments]
    say(f"$ python -m recipes.shapes.{module} {' '.join(arguments)}")
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"{module} failed with exit status {code}")
    say(f"{module}: {time.perf_counter() - start:.1f} s in all\n")


def take_parts(exported: Path, out: Path) -> None:
    """Puts an exported model's encoder and pixel decoder where stages 1 and 2 would leave them.

    Its image-text score may be finetuned already; stage 3 starts from it then.
    """
    encoder, decoder = out / WEIGHTS["encoder"], out / WEIGHTS["decoder"]
    for path in (encoder, decoder):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(exported / settings.ENCODER_NAME / "model.safetensors", encoder)
    tensors = torch.load(exported / "decoder" / "model.pt", map_location="cpu", weights_only=True)
    common.save_weights(decoder, tensors)


def main(argv: list[str] | None = None) -> bool:
    """Runs what is not done yet; returns whether everything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--export", type=Path, default=Path("exported/shapes"), metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few steps, on the CPU")
    parser.add_argument("--parts-of", type=Path, metavar="DIR", help="take encoder and decoder from an exported model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--stop-after", type=float, metavar="S", help="seconds from the start of this command")
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts of the look, 0 for none")
    for stage in WEIGHTS:
        parser.add_argument(
            f"--{stage}", default="", metavar="ARGS", help=f"more arguments of the {stage} stage, quoted"
        )
    args = parser.parse_args(argv)
    start = time.perf_counter()

    def left() -> float | None:
        if args.stop_after is None:
            return None
        return float(args.stop_after) - EXPORT_SECONDS - (time.perf_counter() - start)

    out, drawn = ["--out", str(args.out), *(["--tiny"] if args.tiny else [])], args.out / DRAWN
    if args.parts_of and not (args.out / WEIGHTS["encoder"]).is_file():
        take_parts(args.parts_of, args.out)
    for stage, marker in WEIGHTS.items():
        if (args.out / marker).is_file():
            continue
        arguments = ["--out", str(args.out), "--seed", str(args.seed)]
        arguments += TINY[stage].split() if args.tiny else []
        arguments += ["--device", "cpu"] if args.tiny else ["--device", args.device] if args.device else []
        seconds = left()
        if seconds is not None:
            if seconds < LEAST_SECONDS:
                say(f"no time left for {stage}: give the command again")
                return False
            arguments += ["--stop-after", f"{seconds:.0f}"]
        if stage == "reader":
            run("export", [*out, "--export", str(drawn)])
            arguments += ["--start-from", str(drawn)]
        run(stage, [*arguments, *getattr(args, stage).split()])
        if not (args.out / marker).is_file():
            say(f"{stage} is not finished: give the command again")
            if not (args.out / "joint" / "model.safetensors").is_file():
                return False
            break
    has_read = (args.out / "reader" / "model.safetensors").is_file()
    run("export", [*out, "--export", str(args.export), *(("--parts-of", str(args.out / CASED)) if has_read else ())])
    device = ["--device", "cpu"] if args.tiny else ["--device", args.device] if args.device else []
    sheet = ["--sheet", str(args.export.with_name("sheet.png")), "--prompts", str(0 if args.tiny else args.prompts)]
    run("sample", ["--model", str(args.export), *sheet, *device])
    return all((args.out / marker).is_file() for marker in WEIGHTS.values())


if __name__ == "__main__":
    main()
