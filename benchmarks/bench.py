"""What the benchmarks share: timing, figures and their table, prompts, JSON, Markdown. Imports no torch until a device is measured."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scale_rae.shapes.world import HeldOut


# Timing -------------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], repeat: int, sync: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """(first, median of `repeat` further) wall seconds of `run`; without further ones, the first twice.

    `sync` is called before the clock is read.
    """
    times = []
    for _ in range(1 + repeat):
        sync()
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:] or times)


def median_seconds(run: Callable[[], object], repeat: int) -> float:
    """Median wall seconds of `run` over `repeat` calls after one that is not counted."""
    return timed(run, repeat)[1]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    value, reference = value.double().cpu(), reference.double().cpu()
    return float((value - reference).norm() / reference.norm())


@dataclass
class Bench:
    """The device that is measured, and the results: each of `figures` is a row of the table."""

    device: torch.device
    dtype: torch.dtype
    repeat: int
    budget: float  # seconds after which no stage is started
    json_file: Path | None
    tiny: bool
    figures: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    ceiling: float = math.nan  # FLOP/s of a large bf16 matrix product
    sustained: float = math.nan  # the same, over products for one second
    began: float = field(default_factory=time.perf_counter)

    def sync(self) -> None:
        """Waits until the device is idle."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeat: int | None = None) -> tuple[float, float]:
        """(first, median of `repeat` further) wall seconds, the device synchronised before and after each."""
        return timed(run, self.repeat if repeat is None else repeat, self.sync)

    def add(self, stage: str, name: str, value: float, unit: str, target: str = "", **more: Any) -> None:
        """Records and prints a figure."""
        row = {"stage": stage, "name": name, "value": value, "unit": unit, "target": target, **more}
        self.figures.append(row)
        print(line(row), flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs a stage. A failure is recorded; then memory is released and all figures so far are written."""
        start = time.perf_counter()
        print(f"-- {name} (at {start - self.began:.0f} s)", flush=True)
        with self.reported(name):
            yield
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        self.release()
        self.write()

    @contextlib.contextmanager
    def reported(self, name: str) -> Iterator[None]:
        """Records and prints an exception instead of raising it, so that later measurements still run."""
        try:
            yield
        except Exception:
            self.errors[name] = traceback.format_exc(limit=-8)
            print(f"FAILED {name}\n{self.errors[name]}", flush=True)

    def release(self) -> None:
        """Frees what no object holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            import torch

            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()

    def over(self, name: str) -> bool:
        """Whether the time budget is used up; if so, the stage is recorded as skipped."""
        if time.perf_counter() - self.began < self.budget:
            return False
        self.skipped.append(name)
        print(f"-- {name}: skipped, {self.budget:.0f} s are over", flush=True)
        return True

    def peak_gib(self, reset: bool = False) -> float:
        """Peak memory in GiB that the allocator reserved since the last `reset`; NaN on a CPU."""
        if self.device.type != "cuda":
            return math.nan
        import torch

        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_reserved(self.device) / 2**30

    def write(self) -> None:
        """Writes all figures so far to the JSON file, if there is one."""
        if self.json_file is None:
            return
        import torch

        environment = {"python": platform.python_version(), "torch": torch.__version__, "device": str(self.device)}
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "describe", "--always", "--dirty"]
            git = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
            environment["commit"] = git.stdout.strip()
        if self.device.type == "cuda":
            environment["gpu"] = torch.cuda.get_device_name(self.device)
            environment["cuda"] = str(torch.version.cuda)
        value = {
            "environment": environment,
            "figures": self.figures,
            "errors": self.errors,
            "skipped": self.skipped,
            "seconds": time.perf_counter() - self.began,
        }
        write_json(self.json_file, value)


# Prompts ------------------------------------------------------------------------------------------------------------------


def prompts_in_turn(count: int, held_out: HeldOut = "only", seed: int = 0) -> list[dict[str, Any]]:
    """`count` prompts of the world of shapes, kinds in turn, so that the first N, for any N, are of all kinds."""
    from scale_rae.shapes import world

    per_kind = -(-count // len(world.KINDS))
    lines = world.prompts(per_kind, held_out, seed)
    kinds = [lines[i : i + per_kind] for i in range(0, len(lines), per_kind)]
    return [line for group in zip(*kinds, strict=True) for line in group][:count]


# JSON and tables ----------------------------------------------------------------------------------------------------------


def write_json(file: Path | None, value: Any) -> None:
    """Writes JSON, with null for numbers that are not finite; no file, nothing written."""
    if file is not None:
        file.write_text(json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(figures: Mapping[str, Any], width: int) -> None:
    """Prints a name and its value on each line."""
    for name, value in figures.items():
        print(f"{name:{width}} {value:.4g}" if isinstance(value, float) else f"{name:{width}} {value}")


COLUMNS = {  # what a row of Bench may have besides its value: label and format
    "share": ("share", "{:.1%}"),
    "share_sustained": ("sustained", "{:.1%}"),
    "times_official": ("x official", "{:.1f}"),
    "first": ("first run", "{:.2g} s"),
    "peak_gib": ("GiB", "{:.3g}"),
}
TABLE_COLUMNS = {  # of these, what Markdown tables have, under names that a page's reader understands
    "share": "share of the ceiling",
    "share_sustained": "of the sustained one",
    "times_official": "× official",
    "first": "first run",
}


def line(row: dict[str, Any]) -> str:
    """A row of Bench as it is printed."""
    value = row["value"]
    shown = "-" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.4g}"
    parts = [f"{row['stage']:9} {row['name']:52} {shown:>9} {row['unit']:9}"]
    for key, (label, form) in COLUMNS.items():
        number = row.get(key)
        if isinstance(number, float) and math.isfinite(number):
            parts.append(f"{label} {form.format(number)}")
    if row["target"]:
        parts.append(f"[target {row['target']}]")
    return "  ".join(parts)


def markdown(file: Path) -> str:
    """The figures of a JSON file that Bench wrote, one Markdown table per stage, without columns that are empty."""
    data = json.loads(file.read_text())
    environment = data["environment"]
    lines = [
        f"{environment.get('gpu', environment['device'])}, torch {environment['torch']}, {data['seconds']:.0f} s in all."
    ]
    for stage, group in itertools.groupby(data["figures"], key=lambda row: row["stage"]):
        rows = list(group)
        keys = [key for key in TABLE_COLUMNS if any(row.get(key) is not None for row in rows)]
        lines += ["", *table_head(stage, ["", *(TABLE_COLUMNS[key] for key in keys)])]
        for row in rows:
            value = "–" if row["value"] is None else f"{_number(row['value'])} {row['unit']}"
            more = [COLUMNS[key][1].format(row[key]) if row.get(key) is not None else "" for key in keys]
            lines.append(table_row(row["name"], [value, *more]))
    for name, error in data["errors"].items():
        lines += ["", f"Failed: {name}: {last_line(error)}"]
    if data["skipped"]:
        lines += ["", f"Skipped: {', '.join(data['skipped'])}"]
    return "\n".join(lines)


def last_line(trace: str) -> str:
    """The last line of a traceback, which names the error."""
    return trace.strip().splitlines()[-1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_head(first: str, names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_row(first, names), "|" + "---|" * (len(names) + 1)]


def table_row(first: str, cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join((first, *cells)) + " |"


def write_between_marks(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between the marks `<!-- mark: begin … -->` and `<!-- mark: end -->` of a page.

    Raises:
        InputError: when the page has no such marks.
    """
    found = re.fullmatch(rf"(.*?<!-- {mark}: begin[^\n]*-->\n).*?(<!-- {mark}: end -->.*)", page.read_text(), re.DOTALL)
    if not found:
        raise InputError(f"{page}: has no marks <!-- {mark}: begin --> and <!-- {mark}: end -->; add them")
    page.write_text(found[1] + text + found[2])
