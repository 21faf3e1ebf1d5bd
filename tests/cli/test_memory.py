"""`--memory`: what it chooses, what is recorded, and what cannot go with it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from scale_rae import footprint, machine
from scale_rae.config import load_config, load_decoder_config
from scale_rae.errors import DeviceError, OptionError
from scale_rae.footprint import Footprint, Way
from scale_rae.machine import describe, measure
from scale_rae.options import memory_bytes
from scale_rae.pipeline import ScaleRAE
from scale_rae.scaling.settings import Settings
from tests.cli.conftest import Cli
from tests.scaling.conftest import Scale, scale  # noqa: F401 - a fixture

DRAW = ("t2i", "--model-path", "shapes", "--prompt", "Can you generate a photo of a red circle?", "--device", "cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 << 30), ("6.5GiB", 13 << 29), ("6000M", 6000 << 20), ("8gb", 8 << 30), ("auto", None)],
)
def test_sizes(text: str, size: int | None) -> None:
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


def test_too_little(cli: Cli, out: Path) -> None:
    result = cli(*DRAW, "--output-dir", out, "--memory", "64M")
    assert result.code == 1
    assert result.error.startswith("--memory 64M: this model needs at least 0.")


def test_what_cannot_go_together(cli: Cli, out: Path) -> None:
    cli(*DRAW, "--steps", "2", "--output-dir", out)
    (manifest,) = out.glob("*_manifest.json")
    again = cli("t2i", "--from-manifest", manifest, "--memory", "8G", "--output-dir", out)
    assert again.code == 2
    assert "the manifest says --quantize and --offload already" in " ".join(again.err.replace("│", "").split())
    assert (
        cli(*DRAW, "--memory", "8G", "--offload", "model", "--output-dir", out).code == 2
    )  # the CPU has nowhere to offload to


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
        memory_bytes(8)  # type: ignore[arg-type]
