"""Bytes of weights against those of loaded models; order and limits of the estimates of peak memory and seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from benchmarks.made_up import config_json, decoder_json
from scale_rae.config import load_config, load_decoder_config, parse_config, parse_decoder_config
from scale_rae.footprint import (
    CONTEXT,
    Footprint,
    Rates,
    Way,
    stored_bytes,
)
from scale_rae.hub import BUNDLED
from scale_rae.options import OFFLOAD, QUANTIZE
from scale_rae.pipeline import ScaleRAE

H100 = Rates(products=660e12, memory=2.9e12, bus=50e9)
SMALL = Rates(products=40e12, memory=0.3e12, bus=12e9)  # a laptop's GPU
GIB = 2**30


def published(size: str, **more: object) -> Footprint:
    config = parse_config(config_json(size), Path("config.json"))
    decoder = parse_decoder_config(decoder_json(size), Path("config.json"), config.channels)
    return replace(Footprint(config, decoder), **more)


def bytes_of(*networks: nn.Module) -> int:
    """Bytes of the memory that the networks' weights lie in; computed tables do not count."""
    tensors = [t for network in networks for t in network.state_dict(keep_vars=True).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# fp8 computes on GPUs only; the small checkpoint has widths that nf4 and int8-products do not take.
FORMS = [
    *(("shapes", kind) for kind in (None, *QUANTIZE) if kind != "fp8"),
    *(("wide", kind) for kind in (None, "int8")),
]


@pytest.mark.parametrize(("name", "quantize"), FORMS)
def test_bytes_are_those_of_the_loaded_weights(name: str, quantize: str | None, checkpoints: dict[str, Path]) -> None:
    folder = BUNDLED.get(name) or checkpoints[name]
    model = ScaleRAE.from_pretrained(folder, device="cpu", quantize=quantize)
    config = load_config(folder)
    decoder = folder / "decoder" if name == "shapes" else folder.parent / "decoder"
    footprint = Footprint(config, load_decoder_config(decoder, config.channels), "cpu", "float32")
    weights = footprint.weights(quantize)
    assert weights.language == bytes_of(model.language)
    assert weights.dit == bytes_of(model.dit)
    assert weights.decoder == bytes_of(model.decoder)


def test_parameters_of_the_published_sizes() -> None:
    assert published("1.5b").parameters == {"language": 1551387136, "dit": 2435944896, "decoder": 415587532}


def test_bytes_of_a_weight() -> None:
    assert stored_bytes(None, (6, 128), 2) == 6 * 128 * 2
    assert stored_bytes("int8", (6, 128), 2) == 6 * 128 + 6 * 4
    assert stored_bytes("nf4", (6, 128), 2) == 6 * 64 + 6 * 2 * 2


@pytest.mark.parametrize("size", ["1.5b", "7b"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_less_takes_less(size: str, device: str) -> None:
    footprint = published(size, device=device)
    for quantize in (None, *QUANTIZE):
        peaks = [footprint.peak(Way(quantize, offload)) for offload in OFFLOAD]
        assert peaks == sorted(peaks, reverse=True), quantize
    for offload in OFFLOAD if device == "cuda" else ("none",):
        assert (
            footprint.peak(Way("nf4", offload))
            < footprint.peak(Way("int8", offload))
            < footprint.peak(Way(None, offload))
        )
        assert footprint.drawing_peak(Way(None, offload)) < footprint.drawing_peak(Way(None, offload, 8))
    assert footprint.peak(Way()) > footprint.weights(None).total


def test_an_estimate_is_near_what_was_measured() -> None:
    """One NVIDIA H200, 1.5B/2.4B: GiB by the driver's count, or reserved; seconds (docs/figures/gpu.md)."""
    footprint = published("1.5b")
    for offload, driver in (("model", 5.62), ("stream", 1.98)):  # with a context of 0.75 GiB
        assert (footprint.peak(Way(offload=offload)) - CONTEXT["cuda"]) / GIB == pytest.approx(driver - 0.75, rel=0.04)
    within = ((None, "none", 9.17), ("int8", "none", 5.33), ("nf4", "none", 3.66), ("nf4", "model", 2.36))
    for quantize, offload, driver in within:  # a limit
        assert footprint.peak(Way(quantize, offload)) / GIB == pytest.approx(driver, rel=0.03)
    for batch, reserved in ((1, 8.79), (8, 9.05)):
        drawing = footprint.drawing_peak(Way(batch=batch)) - CONTEXT["cuda"]
        assert drawing / GIB == pytest.approx(reserved, rel=0.05)
    h200 = Rates(products=675e12, memory=4.15e12, bus=54e9)
    assert footprint.seconds(Way(batch=8), h200).each == pytest.approx(0.09, rel=0.35)
    assert footprint.seconds(Way(), h200).total == pytest.approx(0.265, rel=0.35)
    assert footprint.seconds(Way(offload="stream"), h200).sampling == pytest.approx(4.42, rel=0.05)
    assert footprint.seconds(Way(offload="stream", batch=8), h200).sampling == pytest.approx(4.42, rel=0.05)


def test_streaming_hides_images_behind_the_transfer() -> None:
    footprint = published("1.5b")
    for rates in (H100, SMALL):
        hidden = footprint.hidden_images(Way("int8", "stream"), rates)
        each = footprint.seconds(Way("int8", "stream"), rates)
        many = footprint.seconds(Way("int8", "stream", hidden), rates)
        more = footprint.seconds(Way("int8", "stream", hidden + 4), rates)
        assert hidden >= 2
        assert many.sampling == each.sampling < more.sampling
    assert footprint.hidden_images(Way("int8"), H100) == 1
