"""`--memory`: what it chooses, what is recorded, and what cannot go with it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scale_rae import footprint, machine
from scale_rae.config import load_config, load_decoder_config
from scale_rae.errors import CheckpointError, DeviceError, OptionError
from scale_rae.footprint import Footprint, Way
from scale_rae.machine import describe, measure
from scale_rae.memory_plan import possible_ways
from scale_rae.options import ModelChoice, Speed, memory_bytes
from scale_rae.pipeline import ScaleRAE
from scale_rae.scaling.settings import Settings
from scale_rae.training.settings import TrainingOptions
from tests.cli.conftest import Cli
from tests.scaling.conftest import Scale, scale  # noqa: F401 - a fixture

DRAW = ("t2i", "--model-path", "shapes", "--prompt", "Can you generate a photo of a red circle?", "--device", "cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 << 30), ("6.5GiB", 13 << 29), ("6000M", 6000 << 20), ("8gb", 8 << 30), ("auto", None)],
)
def test_sizes_of_memory_are_numbers_with_units(text: str, size: int | None) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8", "G", "-8G", "0G", "8T", "8 G", "1e9G", "٨G", "auto8G", "9" * 99 + "G"])
def test_what_is_no_size(text: str, cli: Cli) -> None:
    with pytest.raises(OptionError, match="must be a size like 8G or 6000M, or auto"):
        memory_bytes(text)
    assert cli(*DRAW, f"--memory={text}").code == 2


def test_manifests_record_request_and_choice(cli: Cli, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = cli(*DRAW, "--steps", "2", "--output-dir", out, "--json")
    limited = cli(*DRAW, "--steps", "2", "--output-dir", out, "--json", "--memory", "2G")
    (before,), (after,) = plain.manifests, limited.manifests
    (line,) = caplog.messages
    assert line.startswith("memory 2G: unquantised, all on the device, 8 images at once, about 0.5 GiB at the peak; ")
    assert "memory" not in before
    assert after["memory"] == {"request": "2G", "bytes": 2 << 30, "batch_size": 8}
    assert (after["quantize"], after["offload"], after["batch_size"]) == (None, "none", 8)
    first, second = (Path(m["output_images"][0]).read_bytes() for m in (before, after))
    assert first == second


def test_flags_narrow_what_is_chosen(cli: Cli, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = cli(*DRAW, "--steps", "2", "--output-dir", out, "--json", "--memory", "auto", "--quantize", "int8")
    assert result.manifests[0]["quantize"] == "int8"
    assert result.manifests[0]["memory"]["request"] == "auto"
    assert result.manifests[0]["memory"]["bytes"] > 1 << 30
    assert re.match(r"memory auto \(\d+\.\d GiB\): --quantize int8, ", caplog.messages[0])


@pytest.mark.parametrize("memory", [(), ("--memory", "2G")])
def test_none_is_no_quantisation(cli: Cli, out: Path, memory: tuple[str, ...]) -> None:
    (manifest,) = cli(*DRAW, "--steps", "2", "--output-dir", out, "--json", "--quantize", "none", *memory).manifests
    assert manifest["quantize"] is None


def test_none_narrows_what_is_chosen() -> None:
    assert possible_ways("cuda", "none", "none") == [(None, "none"), (None, "model"), (None, "stream")]
    assert Speed(quantize="none") == Speed()
    assert TrainingOptions(quantize="none") == TrainingOptions()
    settings = Settings("", "", "shapes").with_model(ModelChoice("shapes", quantize="none"))
    assert settings.quantize is None


def test_a_choice_is_announced_for_files_that_can_be_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["siglip"], folder)
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1))
    assert file.read_bytes() != data
    with pytest.raises(CheckpointError, match=r"its header is wrong: .* of F64 takes"):
        ScaleRAE.from_pretrained(folder, device="cpu", memory="8G")
    assert not caplog.messages


def test_a_limit_frees_what_nothing_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that is made up: the allocator's settings, the driver's call, and the share of the memory."""
    said: list[object] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: said.append(share))
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    driver = SimpleNamespace(cuCtxSetLimit=lambda kind, size: said.append((kind, size.value)) or 0)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    machine.limit_process(torch.device("cuda:0"), 4 << 30)
    share = ((4 << 30) - footprint.CONTEXT["cuda"]) / (8 << 30)
    assert said == ["max_split_size_mb:64,expandable_segments:True", (0, 0), share]
    said.clear()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    machine.limit_process(torch.device("cuda:0"), 4 << 30)
    assert said == [(0, 0), share]


def test_too_little_memory_is_refused_with_the_least_that_is_needed(cli: Cli, out: Path) -> None:
    result = cli(*DRAW, "--output-dir", out, "--memory", "64M")
    assert result.code == 1
    assert result.error.startswith("--memory 64M: this model needs at least 0.")


def test_what_cannot_go_together(cli: Cli, out: Path) -> None:
    cli(*DRAW, "--steps", "2", "--output-dir", out)
    (manifest,) = out.glob("*_manifest.json")
    again = cli("t2i", "--from-manifest", manifest, "--memory", "8G", "--output-dir", out)
    assert again.code == 2
    assert "the manifest says --quantize and --offload already" in " ".join(again.err.replace("│", "").split())
    # The CPU has nowhere to offload to.
    assert cli(*DRAW, "--memory", "8G", "--offload", "model", "--output-dir", out).code == 2


def test_less_memory_takes_smaller_weights(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where quantised weights need no copies, and without the memory of Python itself, which is more than the small model's."""
    monkeypatch.setitem(footprint.CONTEXT, "cpu", 0)
    monkeypatch.setattr(footprint, "PLAIN_FORM", 0)
    folder = checkpoints["siglip"]
    config = load_config(folder)
    decoder = load_decoder_config(folder.parent / "decoder", config.channels)
    limit = Footprint(config, decoder, "cpu", "float32").peak(Way("int8"))
    with caplog.at_level(logging.WARNING, "scale_rae"):
        model = ScaleRAE.from_pretrained(folder, device="cpu", memory=f"{limit / 2**20 + 1e-5:.6f}M")
    assert model.speed.quantize == "int8"
    assert model.batch_size == 1
    assert model.memory_plan is not None
    assert caplog.messages == [str(model.memory_plan)]
    assert model.generate("a cat", steps=2, num_images=2).images


def test_a_device_and_what_it_does() -> None:
    cpu = torch.device("cpu")
    found = describe(cpu, torch.float32)
    assert found.kind == "cpu"
    assert 0 < found.usable < found.free <= found.total
    rates = measure(cpu, torch.float32)
    assert rates.products > 1e8
    assert rates.memory == rates.bus > 1e7


def test_where_the_free_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_host_memory", lambda: (0, 0))
    with pytest.raises(DeviceError, match="this model needs at least"):
        ScaleRAE.from_pretrained("shapes", device="cpu", memory="auto")


def test_scale_chooses_once_for_all_workers(scale: Scale) -> None:  # noqa: F811
    result = scale("--memory", "2G")
    assert result.code == 0
    assert "memory 2G: unquantised, all on the device, 8 images at once" in result.err
    recorded = json.loads((scale.folder / "experiment.json").read_text())["settings"]
    assert (recorded["memory"], recorded["batch_size"], recorded["quantize"]) == ("2048M", 2, None)  # 2 as given
    assert scale("--memory", "4G").code == 0  # goes on with the same experiment
    assert scale("--memory", "2G", "--launcher", "ray", device=False).code == 2


def test_an_experiments_model_is_chosen_for_good() -> None:
    settings = Settings("prompts", "model", quantize="int8", memory="2048M")
    assert (settings.model_choice("cpu").quantize, settings.model_choice("cpu").memory) == ("int8", None)


def test_a_number_is_no_size() -> None:
    """As from a script: `scale_rae.load(..., memory=8)`, which has no unit."""
    with pytest.raises(OptionError, match=r"^memory 8: must be a size like 8G or 6000M, or auto$"):
        memory_bytes(8)
