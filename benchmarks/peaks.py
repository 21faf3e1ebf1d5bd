"""Peak memory of t2i from a prompt to a picture, per --quantize and --offload: each row in a process of its own, below a cap.

    python benchmarks/peaks.py --size 1.5b --json peaks.json
    python benchmarks/peaks.py --size 7b --folder /dev/shm/7b --rows nf4,model:7.5 int8,model:11

A row is QUANTIZE,OFFLOAD:GIB. Its process may not allocate more than GIB, the CUDA context included. The table has what torch
allocated at most with the context, what the driver counted at the end (which includes memory that torch keeps), and seconds.
Weights are made up; a checkpoint in the published layout is written to --folder first (35 GB for 7b).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

ROWS = {
    "1.5b": ("int8,none:5.5", "nf4,none:3.5", "none,stream:2"),
    "7b": ("int8,none:20", "int8,model:11", "nf4,model:7.5", "nf4,stream:4"),
}


def measure(folder: Path, quantize: str | None, offload: str, cap: float, steps: int) -> dict[str, Any]:
    """One row, measured in this process."""
    import torch

    from scale_rae.footprint import CONTEXT
    from scale_rae.machine import limit_process
    from scale_rae.pipeline import ScaleRAE

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    limit_process(device, int(cap * 2**30))
    start = time.perf_counter()
    model = ScaleRAE.from_pretrained(
        str(folder), device="cuda:0", dtype="bfloat16", quantize=quantize, offload=offload, compile="off"
    )
    loaded = time.perf_counter() - start
    peak_loading = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for seed in range(2):
        start = time.perf_counter()
        (image,) = model.generate("a cat on a windowsill", seed=seed, steps=steps).images
        assert image.image is not None
        seconds.append(time.perf_counter() - start)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "load_s": loaded,
        "allocated_loading_gib": (peak_loading + CONTEXT["cuda"]) / 2**30,
        "allocated_gib": (torch.cuda.max_memory_allocated() + CONTEXT["cuda"]) / 2**30,
        "driver_gib": (total - free) / 2**30,
        "second_image_s": seconds[1],
    }


def row(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """One row, measured in a new process; `error` is there instead of figures if that failed."""
    how, cap = name.split(":")
    quantize, offload = how.split(",")
    command = [sys.executable, __file__, "--measure", str(folder), quantize, offload, cap, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"row": name, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"row": name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Prints a line per row."""
    if sys.argv[1:2] == ["--measure"]:
        path, quantize, offload, cap, steps = sys.argv[2:]
        found = measure(Path(path), None if quantize == "none" else quantize, offload, float(cap), int(steps))
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(ROWS), default="1.5b")
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--folder", type=Path, help="a checkpoint is written here unless there is one; default: temporary"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "checkpoint"
        if not (folder / "model" / "model.safetensors").is_file():
            write = (
                "import torch; from benchmarks.made_up import write_checkpoint; from pathlib import Path; import sys; "
            )
            write += "write_checkpoint(sys.argv[1], Path(sys.argv[2]), torch.device('cuda'))"  # its memory ends with it
            root = Path(__file__).parents[1]
            subprocess.run([sys.executable, "-c", write, args.size, str(folder)], check=True, cwd=root)
        rows: list[dict[str, Any]] = []
        for name in args.rows or ROWS[args.size]:
            rows.append(row(folder / "model", name, args.steps))
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
