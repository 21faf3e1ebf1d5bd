"""What only a GPU can show: the same pictures as on the CPU up to rounding, however they are made fast."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_rae.pipeline import SamplingOptions, ScaleRAE, image_seed
from scale_rae.speed import Speed
from tests.test_goldens import DRAW

pytestmark = pytest.mark.gpu

PLAIN: dict[str, Any] = {"graph": False, "pad": False, "group": False}


def off_by(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def latents(
    model: ScaleRAE, speed: Speed | None = None, count: int = 1, condition: Tensor | None = None, **options: object
) -> Tensor:
    """Latents of the golden prompt, [count, L, C], or of a condition."""
    if speed is not None:
        model.speed = speed
        model._fast_dit = type(model._fast_dit)(model.dit, speed)
    condition = model.reply([DRAW])[0].condition if condition is None else condition
    assert condition is not None
    seeds = [image_seed(42, 0, i) for i in range(count)]
    return torch.stack(model.sample([condition] * count, seeds, SamplingOptions(**options)))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["webssl", "wide"])
def folder(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> str:
    return str(checkpoints[request.param])


@pytest.fixture(scope="module")
def reference(folder: str) -> ScaleRAE:
    return ScaleRAE.from_pretrained(folder, device="cpu")


WAYS = {
    "plain float32": ("float32", Speed("off", **PLAIN), 1e-4),
    "captured float32": ("float32", Speed("off"), 1e-4),
    "captured": ("bfloat16", Speed("off"), 2e-2),
    "captured, nothing computed before": ("bfloat16", Speed("off", before=False, null=False, ahead=False), 2e-2),
    "captured, one branch after the other": ("bfloat16", Speed("off", together=False), 2e-2),
    "compiled float32": ("float32", Speed("on"), 1e-4),
    "compiled": ("bfloat16", Speed("on"), 2e-2),
    "compiled, overlapped": ("bfloat16", Speed("on", overlap=True), 2e-2),
    "compiled float8": ("bfloat16", Speed("on", "fp8"), 1.5e-1),
}


@pytest.mark.parametrize("way", WAYS)
def test_same_latents_as_on_the_cpu(folder: str, reference: ScaleRAE, way: str) -> None:
    """Of one condition. (The language model's own rounding to bfloat16 is another 1e-2 on these made-up weights.)

    Compilation takes seconds for each shape, so that what is compiled is tried with guidance only.
    """
    dtype, speed, tolerance = WAYS[way]
    condition = reference.reply([DRAW])[0].condition
    for guidance in (1.5,) if speed.compile == "on" else (1.5, 1.0):
        exact = latents(reference, condition=condition, guidance=guidance)
        model = ScaleRAE.from_pretrained(folder, device="cuda", dtype=dtype)
        assert off_by(latents(model, speed, condition=condition, guidance=guidance), exact) <= tolerance


@pytest.mark.parametrize("case", ["siglip", "webssl"])
def test_bfloat16_from_prompt_to_latent(checkpoints: dict[str, Path], case: str) -> None:
    exact = latents(ScaleRAE.from_pretrained(str(checkpoints[case]), device="cpu"))
    assert off_by(latents(ScaleRAE.from_pretrained(str(checkpoints[case]), device="cuda")), exact) <= 2e-2


def test_float8_is_not_bf16(checkpoints: dict[str, Path]) -> None:
    """Quantisation is there: results differ, by less than would change a picture."""
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cuda")
    exact = latents(model, steps=8)
    rough = latents(model, Speed("off", "fp8"), steps=8)
    assert 1e-3 < off_by(rough, exact) < 1.5e-1


@pytest.mark.parametrize("compile", ["off", "on"], ids=["captured", "compiled"])
def test_batch_changes_rounding_only(checkpoints: dict[str, Path], compile: str) -> None:
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cuda", dtype="float32", compile=compile)
    together = latents(model, count=5, steps=8, guidance=1.5)
    condition = model.reply([DRAW])[0].condition
    assert condition is not None
    options = SamplingOptions(steps=8, guidance=1.5)
    for size in (1, 2) if compile == "off" else (1,):
        seeds = [image_seed(42, 0, i) for i in range(5)]
        apart = torch.stack(model.sample([condition] * 5, seeds, options, batch_size=size))
        assert off_by(apart, together) <= 1e-5


@pytest.mark.parametrize("compile", ["off", "on"], ids=["captured", "compiled"])
def test_replies_on_the_gpu_are_those_of_the_cpu(checkpoints: dict[str, Path], compile: str) -> None:
    """Captured decoding steps against the CPU's plain loop, several rows, with latents shown and without."""
    folder = str(checkpoints["siglip"])
    cpu = ScaleRAE.from_pretrained(folder, device="cpu")
    shown = list(torch.randn(3, 256, 768, generator=torch.Generator().manual_seed(5)))
    questions = ["A cat", "What is it? " * 6, "x"]
    gpu = ScaleRAE.from_pretrained(folder, device="cuda", dtype="float32", compile=compile)
    for seen in (None, shown):
        expected = cpu.reply(questions, latents=seen, max_new_tokens=24)
        for again in range(2):  # the second time from the captured graph
            replies = gpu.reply(questions, latents=seen, max_new_tokens=24)
            assert [r.ids for r in replies] == [r.ids for r in expected], f"run {again}"
            for reply, one in zip(replies, expected, strict=True):
                torch.testing.assert_close(reply.logits, one.logits, rtol=1e-4, atol=1e-4)
                if one.condition is not None and reply.condition is not None:
                    assert off_by(reply.condition.cpu(), one.condition) <= 1e-4


def test_scores_on_the_gpu_are_those_of_the_cpu(checkpoints: dict[str, Path]) -> None:
    folder = str(checkpoints["siglip"])
    shown = list(torch.randn(3, 256, 768, generator=torch.Generator().manual_seed(5)))
    exact, rough = (
        ScaleRAE.from_pretrained(folder, device=device, dtype="float32").score(shown, "a cat", max_new_tokens=9)
        for device in ("cpu", "cuda")
    )
    for a, b in zip(exact, rough, strict=True):
        assert a.reply == b.reply
        for name in ("prompt_loss", "prompt_conf_score", "image_conf_score", "response_conf_score"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-3, abs=1e-4)


def test_out_of_memory_halves_the_batch(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """A limit that the real allocator enforces: 8 images do not fit, fewer do, and the pictures are the same."""
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cuda", dtype="float32", compile="off")
    condition = model.reply([DRAW])[0].condition
    assert condition is not None
    count, options = 512, SamplingOptions(steps=2)
    seeds = list(range(count))
    whole = torch.stack(model.sample([condition] * count, seeds, options, batch_size=64))
    model._fast_dit.forget()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_allocated() + 6 * count * 256 * 768 * 4  # noise and a few of its size
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        with caplog.at_level(logging.WARNING):
            parts = torch.stack(model.sample([condition] * count, seeds, options, batch_size=count))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory drawing 512 images at once; going on with 256" in caplog.text
    assert off_by(parts, whole) <= 1e-4


def test_bundled_model_draws_and_reads_on_the_gpu() -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cuda")
    assert model.dtype == torch.bfloat16
    drawn = model.generate("Can you generate a photo of a blue cross and a pink square?", num_images=4, guidance=3.0)
    answers = model.answer("Describe this image.", latents=[image.latent for image in drawn.images])
    assert sum("blue cross" in a.text and "pink square" in a.text for a in answers) >= 3


def test_bundled_model_in_float8() -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cuda", quantize="fp8", compile="off")
    drawn = model.generate("Can you generate a photo of a blue cross and a pink square?", num_images=4, guidance=3.0)
    answers = model.answer("Describe this image.", latents=[image.latent for image in drawn.images])
    assert sum("blue cross" in a.text and "pink square" in a.text for a in answers) >= 3
