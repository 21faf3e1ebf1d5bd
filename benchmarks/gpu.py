"""Speed and memory at the published sizes, on made-up weights built on the device: a table, and JSON with --json FILE.

    python benchmarks/gpu.py --json gpu.json                       # every stage that --seconds-budget leaves time for
    python benchmarks/gpu.py --stages ceilings,dit --sizes 1.5b
    python benchmarks/gpu.py --tiny --device cpu                   # tries the benchmark itself
    python benchmarks/gpu.py --markdown gpu.json                   # tables of figures measured before (--into FILE: into a page)

Every figure is the median of one to five repeats after a first run, which compiles and captures and has a column of its own.
Clocks are read with the device synchronised. Weights and inputs are random, never zero. A stage that fails is reported, and
the others run. "Share" is of the bf16 matrix product rate that the same run measured first: in a burst and, in a column of its
own, sustained for a second.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import bench
from benchmarks.bench import Bench
from benchmarks.gpu_ceilings import ceilings, gemm_stage
from benchmarks.gpu_dit import dit_stage, fp8_stage, official, solver_stage
from benchmarks.gpu_kernels import profile_stage
from benchmarks.gpu_language import tokens_stage
from benchmarks.gpu_pipeline import decode_stage, load_stage, memory_stage, t2i_stage
from benchmarks.gpu_scaling import scaling_stage
from benchmarks.gpu_search import search_stage
from benchmarks.gpu_tricks import attention_stage, checks, ladder
from benchmarks.made_up import made_model
from scale_rae.errors import InputError
from scale_rae.options import Speed
from scale_rae.pipeline import ScaleRAE

FIRST: dict[str, Callable[[Bench], None]] = {"ceilings": ceilings, "checks": checks}
WITH_MODEL: dict[str, Callable[[Bench, ScaleRAE, str], None]] = {
    "memory": memory_stage,  # before other stages leave graphs behind
    "dit": dit_stage,
    "t2i": t2i_stage,
    "tokens": tokens_stage,
    "scaling": scaling_stage,
    "search": search_stage,
    "profile": profile_stage,
    "decode": decode_stage,
    "solver20": solver_stage,
    "fp8": fp8_stage,  # last, since it replaces the model's weights
}
ALONE: dict[str, Callable[[Bench, str], None]] = {
    "official": official,
    "ladder": ladder,
    "attention": attention_stage,
    "gemm": gemm_stage,
    "load": load_stage,
}
OF_7B = ("dit", "tokens", "fp8")
STAGES = (*FIRST, *WITH_MODEL, *ALONE)


def run_all(b: Bench, stages: Sequence[str], sizes: Sequence[str], compile_mode: str) -> None:
    """Runs the stages: the first ones, then those on a model of each size, then those that build what they need."""
    for name, stage in FIRST.items():
        if name in stages and not b.over(name):
            with b.stage(name):
                stage(b)
    for size in sizes:
        names = [s for s in WITH_MODEL if s in stages and (size != "7b" or s in OF_7B)]
        if not names or b.over(f"{size}: {', '.join(names)}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            model: ScaleRAE | None = None
            with b.stage(f"{size}: building"):
                model = made_model(size, b.device, b.dtype, Speed(compile_mode), Path(folder))
            for name in names if model is not None else ():
                if not b.over(f"{size}: {name}"):
                    with b.stage(f"{size}: {name}"):
                        assert model is not None
                        WITH_MODEL[name](b, model, size)
            del model
            b.release()
    for size in sizes:
        for name, alone in ALONE.items():
            if name in stages and size != "7b" and not b.over(f"{size}: {name}"):
                with b.stage(f"{size}: {name}"):
                    alone(b, size)


def print_tables(files: Sequence[Path], into: Path | None) -> None:
    """Prints the tables of JSON files, or puts them between a page's marks."""
    tables = "\n\n".join(bench.markdown(file) for file in files)
    if into is None:
        print(tables)
        return
    try:
        bench.write_between_marks(into, "figures", tables + "\n")
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def main() -> int:
    """Measures and prints; the exit status is 1 when a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--sizes", default="1.5b,7b", help="of 1.5b, 7b")
    parser.add_argument("--seconds-budget", type=float, default=math.inf, help="start no stage after this many seconds")
    parser.add_argument("--repeat", type=int, default=3, help="runs after the first; 0 only tries the benchmark")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="in the stages on a whole model")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the benchmark itself")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every stage")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="JSON", help="only print tables of these files")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="with --markdown: write the tables between FILE's marks"
    )
    args = parser.parse_args()
    if args.markdown:
        print_tables(args.markdown, args.into)
        return 0
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: no such stages: {', '.join(sorted(unknown))}; use some of {', '.join(STAGES)}")
    sizes = ["tiny"] if args.tiny else args.sizes.split(",")
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA devices here; benchmarks/cpu.py measures a model on the CPU")
        torch.cuda.set_device(device.index or 0)
        device = torch.device("cuda", device.index or 0)
    b = Bench(device, torch.bfloat16, args.repeat, args.seconds_budget, args.json, args.tiny)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, stages {', '.join(stages)}, sizes {', '.join(sizes)}", flush=True)
    run_all(b, stages, sizes, args.compile if device.type == "cuda" else "off")
    b.write()
    print("\n" + "\n".join(bench.line(row) for row in b.figures))
    for name, error in b.errors.items():
        print(f"FAILED {name}: {bench.last_line(error)}")
    if b.skipped:
        print(f"skipped for lack of time: {'; '.join(b.skipped)}")
    print(f"{time.perf_counter() - b.began:.0f} s in all")
    return 1 if b.errors else 0


if __name__ == "__main__":
    sys.exit(main())
