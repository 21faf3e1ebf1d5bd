"""The loss curves of a run as one picture: a row for each stage that has a log, a panel for each number.

python -m recipes.shapes.curves --out runs/shapes --plot recipes/shapes/curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.shapes.loop import say

PANELS: dict[str, tuple[str, ...]] = {
    "encoder": ("l1", "contrastive", "psnr"),
    "decoder": ("l1", "psnr"),
    "reward": ("loss", "right", "true_first"),
    "joint": ("flow", "answer", "attributes", "additive", "yes_no"),
    "reader": ("text", "condition", "read_yes_no", "own_yes_no"),
}
# dB, and shares of what was right; losses have a logarithmic axis.
PLAIN = ("psnr", "right", "true_first", "yes_no", "read_yes_no", "own_yes_no")


def read_log(file: Path) -> dict[str, list[float]]:
    """The columns of a stage's log.jsonl. A line that a killed run left unfinished is skipped."""
    columns: dict[str, list[float]] = {}
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name, value in record.items():
            columns.setdefault(name, []).append(float(value))
    return columns


def plot(out: Path, file: Path) -> list[str]:
    """Draws the logs under `out` into `file` (format by its ending); returns the stages that are in it.

    Raises:
        SystemExit: when no stage has a log.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    logs = {stage: read_log(out / stage / "log.jsonl") for stage in PANELS if (out / stage / "log.jsonl").is_file()}
    if not logs:
        raise SystemExit(f"{out}: no stage has a log.jsonl")
    width = max(len(PANELS[stage]) for stage in logs)
    figure, axes = plt.subplots(len(logs), width, figsize=(2.6 * width, 2.2 * len(logs)), squeeze=False, dpi=110)
    for row, (stage, log) in zip(axes, logs.items(), strict=True):
        for axis, name in zip(row, PANELS[stage], strict=False):
            axis.plot(log["seconds"], log[name], linewidth=1)
            axis.set_title(f"{stage}: {name}", fontsize=9)
            axis.set_xlabel("seconds of training", fontsize=8)
            axis.tick_params(which="both", labelsize=7)
            axis.grid(True, which="both", alpha=0.3)
            if name not in PLAIN:
                axis.set_yscale("log")
        for axis in row[len(PANELS[stage]) :]:
            axis.set_axis_off()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
    return list(logs)


def main(argv: list[str] | None = None) -> None:
    """Draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"), help="folder of the whole run")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="picture to write")
    args = parser.parse_args(argv)
    say(f"{args.plot}: {', '.join(plot(args.out, args.plot))}")


if __name__ == "__main__":
    main()
