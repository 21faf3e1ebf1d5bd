"""What `--memory` chooses: the order of ways, narrowing, limits, and batches."""

from __future__ import annotations

import pytest

from scale_rae.errors import DeviceError
from scale_rae.footprint import Way
from scale_rae.memory_plan import WAYS, choose, possible_ways
from tests.test_footprint import GIB, H100, SMALL, published


def chosen(size: str, memory: str, **narrowed: str) -> Way:
    return choose(memory, int(float(memory[:-1]) * GIB), published(size), lambda: SMALL, **narrowed).way


@pytest.mark.parametrize(
    ("size", "memory", "quantize", "offload"),
    [
        ("1.5b", "80G", None, "none"),
        ("1.5b", "12G", None, "none"),
        ("1.5b", "8G", None, "model"),
        ("1.5b", "5G", "int8", "model"),
        ("1.5b", "3G", "nf4", "model"),
        ("1.5b", "2G", "int8", "stream"),
        ("7b", "80G", None, "none"),
        ("7b", "24G", None, "model"),
        ("7b", "16G", "int8", "model"),
        ("7b", "8G", "nf4", "model"),
        ("7b", "4G", "int8", "stream"),
    ],
)
def test_published_sizes(size: str, memory: str, quantize: str | None, offload: str) -> None:
    way = chosen(size, memory)
    assert (way.quantize, way.offload) == (quantize, offload)


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_every_limit_is_kept_and_more_memory_is_never_worse(size: str) -> None:
    footprint = published(size)
    places = []
    for tenths in range(20, 500, 3):
        limit = tenths * GIB // 10
        try:
            plan = choose(f"{tenths / 10}G", limit, footprint, lambda: H100)
        except DeviceError:
            assert not places
            continue
        assert plan.peak <= limit
        assert plan.peak == footprint.peak(plan.way)
        places.append(WAYS.index((plan.way.quantize, plan.way.offload)))
    assert places == sorted(places, reverse=True)
    assert {0, 1} < set(places)


def test_flags_narrow_the_choice() -> None:
    assert chosen("1.5b", "80G", quantize="int8") == Way("int8", "none", 32)
    assert chosen("1.5b", "4G", quantize="int8").offload == "model"
    assert chosen("1.5b", "80G", offload="stream").offload == "stream"
    assert chosen("1.5b", "80G", offload="stream").quantize == "int8"
    assert chosen("1.5b", "80G", quantize="fp8") == Way("fp8", "none", 32)
    assert chosen("1.5b", "4G", quantize="fp8-storage").offload == "model"
    assert (None, "stream") not in WAYS
    assert possible_ways("cuda", None, "stream") == [("int8", "stream"), ("nf4", "stream"), (None, "stream")]
    assert possible_ways("cpu", None, "none") == [(None, "none"), ("int8", "none"), ("nf4", "none")]


def test_too_little_says_what_would_do() -> None:
    footprint = published("7b")
    with pytest.raises(DeviceError) as caught:
        choose("1G", GIB, footprint)
    text = str(caught.value)
    assert text.startswith("--memory 1G: this model needs at least ")
    least = text.removeprefix("--memory 1G: this model needs at least ").split(" ")[0]
    assert choose(least, int(float(least[:-1]) * GIB), footprint).way.offload == "stream"
    with pytest.raises(
        DeviceError, match=r"--memory auto \(1\.0 GiB\): .* at least 17\.\dG with --offload none|at least"
    ):
        choose("auto", GIB, footprint, quantize="int8", offload="model")


def test_the_line_says_what_and_why() -> None:
    text = str(choose("8G", 8 * GIB, published("1.5b")))
    assert text.startswith("memory 8G: --offload model, 32 images at once, about ")
    assert "; unquantised, all on the device would take " in text
    text = str(choose("8G", 8 * GIB, published("1.5b"), quantize="nf4"))
    assert text.endswith("that fits with the given --quantize nf4")  # not "as it is"
    text = str(choose("auto", 80 * GIB, published("1.5b")))
    assert text.startswith("memory auto (80.0 GiB): unquantised, all on the device, 32 images at once")


def test_streaming_draws_as_many_images_as_hide() -> None:
    footprint = published("1.5b")
    for rates in (SMALL, H100):
        plan = choose("3G", 3 * GIB, footprint, lambda rates=rates: rates, offload="stream")
        assert plan.way.batch == min(footprint.hidden_images(plan.way, rates), 64) or plan.way.batch in (16, 32)
        assert plan.way.batch > 1


def test_small_batches_where_memory_is_short() -> None:
    footprint = published("1.5b")
    peak = footprint.peak(Way("nf4", "stream", 4))
    assert choose("x", peak, footprint, lambda: H100, quantize="nf4", offload="stream").way.batch == 4
