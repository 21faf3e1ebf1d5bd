"""Machines without Triton or a compiler, and AMD's GPUs: what runs there is chosen before anything fails."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scale_rae
from scale_rae import networks, toolchain
from scale_rae.errors import DeviceError
from scale_rae.float8 import check_device
from scale_rae.options import Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.scaling.local import check_here
from scale_rae.scaling.settings import Settings

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder with programs, empty at first; Triton is there, and so are our kernels, which work."""
    kernels = SimpleNamespace(usable=lambda device: True)
    monkeypatch.setitem(sys.modules, "scale_rae.kernels", kernels)
    monkeypatch.setattr(scale_rae, "kernels", kernels, raising=False)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    toolchain.can_compile.cache_clear()
    yield tmp_path
    toolchain.can_compile.cache_clear()


def program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("device", "there", "variables", "expected"),
    [
        ("cuda", [], {}, "a C compiler"),
        ("cuda", ["g++"], {}, "a C compiler"),
        ("cuda", ["gcc"], {}, None),
        ("cuda", ["clang"], {}, None),
        ("cuda", ["gcc"], {"CC": "icx"}, "a C compiler"),  # Triton takes no other then
        ("cuda", ["icx"], {"CC": "icx"}, None),
        ("cpu", ["gcc"], {}, "a C++ compiler"),
        ("cpu", [], {"CXX": "icpx"}, "a C++ compiler"),
        ("cpu", ["icpx"], {"CXX": "icpx"}, None),
        ("mps", [], {}, None),
    ],
)
def test_what_is_missing(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    there: list[str],
    variables: dict[str, str],
    expected: str | None,
) -> None:
    for name in there:
        program(programs, name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = toolchain.missing(torch.device(device))
    assert found is None if expected is None else str(found).startswith(expected)


def test_without_a_compiler_one_line_is_logged_and_nothing_is_compiled(
    programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert not any(toolchain.can_compile(CUDA) or toolchain.runs_own_kernels(CUDA) for _ in range(3))
    (line,) = caplog.messages
    assert line.startswith(
        "cuda: there is no C compiler (gcc, clang, or the program that CC names; on Debian and Ubuntu: apt"
    )
    assert "nothing is compiled and PyTorch's own kernels are used" in line
    toolchain.can_compile.cache_clear()
    program(programs, "gcc")
    assert toolchain.can_compile(CUDA)
    assert toolchain.runs_own_kernels(CUDA)
    assert len(caplog.messages) == 1


def test_without_triton(programs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    program(programs, "gcc")
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    assert not toolchain.can_compile(CUDA)
    (line,) = caplog.messages
    assert line.startswith("cuda: there is no Triton (part of PyTorch's GPU builds for Linux; on Windows, the package")


def test_where_building_fails_nothing_is_compiled(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without Python's C headers, which only building shows."""
    program(programs, "gcc")
    monkeypatch.setattr(sys.modules["scale_rae.kernels"], "usable", lambda device: False)
    assert not toolchain.can_compile(CUDA)


def test_other_devices_have_no_kernels(programs: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not any(
        check(torch.device(name))
        for check in (toolchain.can_compile, toolchain.runs_own_kernels)
        for name in ("cpu", "mps")
    )
    assert not caplog.messages


def test_amd_gpus_compile_and_take_pytorchs_kernels(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their capability, such as 9.4, says nothing about float8 or Hopper."""
    program(programs, "gcc")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert toolchain.can_compile(CUDA)
    assert not toolchain.runs_own_kernels(CUDA)
    with pytest.raises(DeviceError, match=r"fp8: uses the float8 products of NVIDIA GPUs.*use --quantize int8"):
        check_device(CUDA, torch.bfloat16)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_only_compile_on_needs_a_compiler(programs: Path, choice: str) -> None:
    for device in (CUDA, CPU):
        toolchain.check_compile(choice, device)
        with pytest.raises(
            DeviceError, match=f"^compile on: compiling for {device} needs a C.* or use --compile auto$"
        ):
            toolchain.check_compile("on", device)


@pytest.mark.usefixtures("programs")
def test_it_is_said_before_a_model_is_loaded(
    models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = pytest.raises(DeviceError, match=r"compile on: compiling for cpu needs a C\+\+ compiler")
    monkeypatch.setattr(networks, "find", lambda *args, **options: pytest.fail("the model is looked for"))
    with expected:
        ScaleRAE.from_pretrained("nyu-visionx/some", device="cpu", compile="on")
    with expected:
        check_here(Settings("", "shapes", compile="on"), tmp_path, ["cpu"])
    with expected:
        models["siglip"].with_speed(Speed("on"))
