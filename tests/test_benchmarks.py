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


def test_gpu_benchmark_in_miniature(tmp_path: Path) -> None:
    """Every stage, on tiny networks on the CPU: it must not fail first on a GPU that is lent by the minute."""
    file = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--repeat", "1", "--json", str(file)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env).stdout
    result = json.loads(file.read_text())
    assert result["errors"] == {}
    assert result["skipped"] == []
    stages = {row["stage"] for row in result["figures"]}
    assert stages >= {"ceilings", "checks", "dit", "t2i", "tokens", "scaling", "decode", "official", "ladder", "load"}
    assert all(row["value"] > 0 for row in result["figures"] if row["stage"] != "checks")
    assert "s in all" in shown
    command = [sys.executable, "benchmarks/gpu.py", "--markdown", str(file)]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env).stdout
    assert all(row["name"] in table for row in result["figures"])
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    for _ in range(2):
        subprocess.run([*command, "--into", str(page)], check=True, cwd=ROOT, env=env)
        assert page.read_text().count(table.strip()) == 1
    assert "## Tricks" in page.read_text()


def test_gpu_benchmark_reports_what_fails(tmp_path: Path) -> None:
    """A stage that fails does not take the others with it; one for that there is no time is named."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import gpu
    finally:
        sys.path.remove(str(ROOT))
    import torch

    bench = gpu.Bench(torch.device("cpu"), torch.bfloat16, 1, 1e9, tmp_path / "b.json", True)
    with bench.stage("one"):
        bench.add("one", "before", 1.0, "s")
        raise RuntimeError("no luck")
    with bench.stage("two"):
        bench.add("two", "after", float("nan"), "s")
    bench.budget = 0
    assert bench.over("three")
    bench.write()
    result = json.loads((tmp_path / "b.json").read_text())
    assert "no luck" in result["errors"]["one"]
    assert [row["name"] for row in result["figures"]] == ["before", "after"]
    assert result["skipped"] == ["three"]
