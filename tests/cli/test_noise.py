"""Noise "cuda": the official code's on a GPU, recorded only where it is chosen, refused where there is no GPU.

There is no GPU here: a GPU is pretended, whose generator is the CPU's with other numbers. tests/test_gpu.py compares bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from scale_rae import noise
from scale_rae.errors import DeviceError
from scale_rae.noise import draw_noise
from scale_rae.options import SamplingOptions, from_record, to_record
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import Trajectory
from scale_rae.scaling.experiment import experiment_record, setting_differences
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, work
from tests.cli.conftest import DRAW, Cli, only_manifest
from tests.scaling.conftest import Scale

CPU = torch.device("cpu")
ON_A_GPU = SamplingOptions(noise="cuda")


def numbers_of_a_gpu(seeds: Sequence[int], channels: int, side: int, device: torch.device) -> Tensor:
    """Noise [B, C, S, S] that stands for a GPU's."""
    return torch.cat([-torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(s)) for s in seeds])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(noise, "gpu_noise", numbers_of_a_gpu)


def test_noise_is_the_first_draw_after_seeding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "gpu_of_noise", lambda device: CPU)
    drawn = draw_noise([42, 2**63 - 1, 42], 6, 4, CPU, "cuda")()
    before = torch.get_rng_state()
    for seed, one in zip((42, 2**63 - 1, 42), drawn, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(one[None], torch.randn(1, 6, 4, 4))
    torch.set_rng_state(before)
    draw_noise([42], 6, 4, CPU, "cuda")()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_drawn_by_the_models_gpu_or_the_first() -> None:
    of = {name: str(noise.gpu_of_noise(torch.device(name))) for name in ("cuda", "cuda:1", "cpu", "mps")}
    assert of == {"cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cuda:0", "mps": "cuda:0"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("stops", [False, True])
def test_latents_begin_with_it(models: dict[str, ScaleRAE], stops: bool) -> None:
    model = models["siglip"]
    condition = model.reply([DRAW])[0].condition
    assert condition is not None
    options, seeds, begun = SamplingOptions(noise="cuda", steps=3), [5, 6], list[Tensor]()

    def see(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        begun.append(x)

    if stops:
        model.advance([Trajectory(condition, seed) for seed in seeds], 2, options, callback=see)
    else:
        model.sample([condition] * 2, seeds, options, callback=see)
    shape = model.config.channels, model.config.dit.side
    assert torch.equal(begun[0], numbers_of_a_gpu(seeds, *shape, CPU))


def test_records_name_it_only_where_it_is_chosen() -> None:
    assert "noise" not in to_record(SamplingOptions())
    assert to_record(SamplingOptions(), complete=True)["noise"] == "cpu"
    assert to_record(ON_A_GPU)["noise"] == "cuda"
    assert from_record(SamplingOptions, to_record(ON_A_GPU)) == ON_A_GPU
    assert from_record(SamplingOptions, to_record(SamplingOptions())) == SamplingOptions()


@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")])
def test_an_experiment_goes_on_with_its_own(here: str, there: str) -> None:
    begun, now = (
        experiment_record(Settings("p", "shapes", options=SamplingOptions(noise=name)), []) for name in (there, here)
    )
    differs = [] if here == there else [f'noise "{here}" here, "{there}" there']
    assert setting_differences(begun, now) == differs


@pytest.mark.usefixtures("gpu")
def test_a_manifest_draws_it_again(
    t2i: Cli, cli: Cli, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--prompt", DRAW, "--device", "cpu", "--save-latent"]
    assert t2i(*options, "--output-dir", tmp_path / "cpu").code == 0
    usual = only_manifest(tmp_path / "cpu")
    assert {"noise", "noise_gpu"}.isdisjoint({*usual, *Image.open(usual["output_images"][0]).text})
    assert t2i(*options, "--noise", "cuda").code == 0
    first = only_manifest(out)
    assert (first["noise"], first["noise_gpu"]) == ("cuda", "GPU cuda:0")
    assert Image.open(first["output_images"][0]).text["noise"] == "cuda"
    (path,) = out.glob("*_manifest.json")
    again = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "again", "--save-latent")
    assert (again.code, again.err) == (0, "")
    latents = [torch.load(m["latent_path"]) for m in (usual, first, only_manifest(tmp_path / "again"))]
    assert torch.equal(latents[1], latents[2])
    assert not torch.equal(latents[0], latents[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    other = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "other")
    assert other.code == 0
    assert "drawn by another GPU here, by GPU cuda:0 then: the images may be others" in other.err


@pytest.mark.usefixtures("gpu")
def test_an_experiments_settings_and_pictures_name_it(tmp_path: Path) -> None:
    scale = Scale(tmp_path)
    assert scale("--limit", 1, "--noise", "cuda").code == 0
    assert json.loads((scale.folder / "experiment.json").read_text())["settings"]["noise"] == "cuda"
    assert Image.open(scale.folder / "00000" / "samples" / "00000.png").text["noise"] == "cuda"


@pytest.mark.usefixtures("no_loading")
def test_without_a_gpu_it_is_refused_before_anything_is_fetched(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("scale_rae.cli.runs.find_model", lambda choice: pytest.fail("the model is looked for"))
    scale = Scale(tmp_path, capsys)
    result = cli("t2i", "--prompt", DRAW, "--noise", "cuda", "--output-dir", tmp_path / "out", "--model-path", "a/b")
    assert result.code == 1
    assert result.error.startswith(
        "noise cuda: is drawn by a GPU, and torch finds no CUDA devices here; use --noise cpu"
    )
    refused = scale("--noise", "cuda")
    assert refused.code == 1
    assert "noise cuda: is drawn by a GPU" in refused.err
    assert not scale.out.exists() or not any(scale.out.iterdir())


def test_without_a_gpu_python_refuses_it_too(models: dict[str, ScaleRAE]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="noise cuda: is drawn by a GPU"):
        models["siglip"].generate(DRAW, options=ON_A_GPU)


def test_a_node_of_a_cluster_without_a_gpu_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other workers then take over, as for a device without memory for the model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings("p", "a/b", options=ON_A_GPU)
    with pytest.raises(DeviceError, match="noise cuda: is drawn by a GPU"):
        work(Store(tmp_path, settings), settings, Assignment(0, "cpu", [], [], {}), lambda event: None)
