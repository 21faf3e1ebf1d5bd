"""The benchmarks run; what they measure is for a person to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_cpu_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/cpu.py", "--repeat", "1", "--json", str(tmp_path / "cpu.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env).stdout
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert all(value > 0 for value in figures.values() if isinstance(value, float))
    assert all(name in shown for name in figures)


def test_two_devices(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/two_gpus.py", "--devices", "cpu,cpu", "--tiny", "--prompts", "3"]
    command += ["--steps", "2", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["one"]["images"] == figures["several"]["images"] == 24
    assert figures["files"]["files"] == 3 * 9
    assert figures["throughput_ratio"] > 0
    assert "27 files of prompts: the same bytes" in shown
