"""What only a GPU can show: the same pictures as on the CPU up to rounding, however they are made fast."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_rae import flow
from scale_rae.dit import attend, rope_table, rotate
from scale_rae.fast_blocks import Deferred, spread, summed
from scale_rae.float8 import FLOAT8, quantize
from scale_rae.noise import draw_noise, image_seed
from scale_rae.options import SamplingOptions, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import Trajectory
from tests.test_goldens import DRAW

pytestmark = pytest.mark.gpu

PLAIN: dict[str, Any] = {"graph": False, "pad": False, "group": False, "defer": False, "kernels": False}


def off_by(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def latents(
    model: ScaleRAE, speed: Speed | None = None, count: int = 1, condition: Tensor | None = None, **options: object
) -> Tensor:
    """Latents of the golden prompt, [count, L, C], or of a condition."""
    if speed is not None:
        model = model.with_speed(speed)
    condition = model.reply([DRAW])[0].condition if condition is None else condition
    assert condition is not None
    seeds = [image_seed(42, 0, i) for i in range(count)]
    return torch.stack(model.sample([condition] * count, seeds, SamplingOptions(**options)))


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
    "compiled, our attention": ("bfloat16", Speed("on", attention="own"), 2e-2),
    "compiled, PyTorch's attention": ("bfloat16", Speed("on", attention="flash"), 2e-2),
    "captured, PyTorch's attention": ("bfloat16", Speed("off", attention="flash"), 2e-2),
    "captured without kernels of our own": ("bfloat16", Speed("off", kernels=False), 2e-2),
    "captured, the kernels for few images": ("bfloat16", Speed("off", few=True), 2e-2),
    "compiled, the kernels for few images": ("bfloat16", Speed("on", few=True), 2e-2),
    "compiled, nothing deferred": ("bfloat16", Speed("on", defer=False), 2e-2),
    "captured float8": ("bfloat16", Speed("off", "fp8"), 1.5e-1),
    "compiled float8": ("bfloat16", Speed("on", "fp8"), 1.5e-1),
    "captured float8, the kernels for few images": ("bfloat16", Speed("off", "fp8", few=True), 1.5e-1),
    "compiled float8, PyTorch's attention": ("bfloat16", Speed("on", "fp8", attention="flash"), 1.5e-1),
    "compiled float8 without kernels of our own": ("bfloat16", Speed("on", "fp8", kernels=False), 1.5e-1),
}


@pytest.mark.parametrize("way", WAYS)
def test_same_latents_as_on_the_cpu(folder: str, reference: ScaleRAE, way: str) -> None:
    """Of one condition. (The language model's own rounding to bfloat16 is another 1e-2 on these made-up weights.)

    Compilation takes seconds for each shape, so that what is compiled is tried with guidance only.
    """
    from scale_rae import kernels

    dtype, speed, tolerance = WAYS[way]
    assert kernels.usable(torch.device("cuda")), "what is tried here would not run"
    condition = reference.reply([DRAW])[0].condition
    for guidance in (1.5,) if speed.compile == "on" else (1.5, 1.0):
        exact = latents(reference, condition=condition, guidance=guidance)
        model = ScaleRAE.from_pretrained(folder, device="cuda", dtype=dtype)
        assert off_by(latents(model, speed, condition=condition, guidance=guidance), exact) <= tolerance


@pytest.mark.parametrize("case", ["siglip", "webssl"])
def test_bfloat16_from_prompt_to_latent(checkpoints: dict[str, Path], case: str) -> None:
    exact = latents(ScaleRAE.from_pretrained(str(checkpoints[case]), device="cpu"))
    assert off_by(latents(ScaleRAE.from_pretrained(str(checkpoints[case]), device="cuda")), exact) <= 2e-2


@pytest.mark.parametrize("compile", ["off", "on"], ids=["captured", "compiled"])
@pytest.mark.parametrize("kind", ["int8", "int8-products", "fp8-storage", "nf4"])
def test_quantised_latents_are_those_of_the_cpu(checkpoints: dict[str, Path], kind: str, compile: str) -> None:
    """Our kernels against the plain forms in float32, for few images and for more."""
    folder = str(checkpoints["ddt" if kind == "nf4" else "siglip"])  # nf4 needs widths that are multiples of 64
    exact = ScaleRAE.from_pretrained(folder, device="cpu", dtype="float32", quantize=kind)
    condition = exact.reply([DRAW])[0].condition
    model = ScaleRAE.from_pretrained(folder, device="cuda", quantize=kind, compile=compile)
    # Another rounding of activations moves some to the next integer.
    tolerance = 6e-2 if kind == "int8-products" else 2e-2
    if kind == "nf4":  # that checkpoint's latents depend more on the rounding of activations to bfloat16
        whole = [ScaleRAE.from_pretrained(folder, device=where) for where in ("cpu", "cuda")]
        rounded, whole_latents = (latents(m, condition=condition, steps=8) for m in reversed(whole))
        tolerance = 1.5 * off_by(rounded, whole_latents)
        print(f"off by {tolerance / 1.5:.4f} without quantisation")
    for count in (1, 4):
        wanted = latents(exact, count=count, condition=condition, steps=8)
        assert off_by(latents(model, count=count, condition=condition, steps=8), wanted) <= tolerance


def test_float8_is_not_bf16(checkpoints: dict[str, Path]) -> None:
    """Quantisation is there: results differ, by less than would change a picture."""
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cuda")
    exact = latents(model, steps=8)
    rough = latents(model, Speed("off", "fp8"), steps=8)
    assert 1e-3 < off_by(rough, exact) < 1.5e-1


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(len(shape))).to(dtype)


def assert_quantized(values: Tensor, scale: Tensor, exact: Tensor) -> None:
    """As near to the exact float32 rows as `quantize` brings them."""
    best = quantize(exact)
    assert values.shape == exact.shape
    assert (values.dtype, scale.dtype) == (FLOAT8, torch.float32)
    torch.testing.assert_close(scale, best.scale, rtol=4e-3, atol=0)
    assert off_by(values.float() * scale, exact) <= 1.05 * off_by(best.values.float() * best.scale, exact)


@pytest.mark.parametrize("width", [160, 2048, 3072])
def test_kernels_quantize_what_they_are_said_to(width: int) -> None:
    from scale_rae import kernels

    x = 3 * random(2, 5, width)
    assert_quantized(*kernels.quantize_rows(x), x.float())
    pairs = random(2, 5, 2 * width)
    gate, value = pairs.float().chunk(2, dim=-1)
    assert_quantized(*kernels.quantize_swiglu(pairs), torch.nn.functional.silu(gate) * value)
    x[0, 1, 7] = torch.nan
    for values, scale in (kernels.quantize_rows(x), kernels.quantize_swiglu(torch.cat([x, x], dim=-1))):
        there = (values.float() * scale).isnan()
        assert there[0, 1, 7]
        assert int(there.sum()) == 1
    rows, scale = kernels.quantize_rows(torch.zeros_like(x))
    assert not rows.float().any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("heads", [6, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_rotates(heads: int, dtype: torch.dtype) -> None:
    from scale_rae import kernels

    cos, sin = (table.cuda() for table in rope_table(4, 16))
    x = random(3, 16, heads + 1, 16, dtype=dtype)[:, :, :heads]  # in larger rows
    angles = kernels.of_axis(cos), kernels.of_axis(sin)
    torch.testing.assert_close(kernels.rotate_pairs(x, *angles), rotate(x, cos, sin))


SIZES = [
    (2, 4, 3, 16),
    (1, 3, 2, 32),
    (2, 8, 4, 64),
    (3, 16, 4, 64),
    (2, 16, 32, 64),
    (4, 16, 32, 64),
    (6, 14, 43, 64),
    (8, 16, 32, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_attends(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Images few and many enough for one, two and four blocks of queries together, whole ones and not."""
    from scale_rae import kernels

    batch, side, heads, head = size
    cos, sin = (table.cuda() for table in rope_table(side, head))
    qkv = random(batch, side * side, 3 * heads * head, dtype=dtype)
    exact = attend(qkv.float(), heads, cos, sin)
    flash = attend(qkv, heads, cos, sin)
    own = kernels.attend_pairs(qkv, heads, kernels.of_axis(cos), kernels.of_axis(sin))
    assert off_by(own.float(), exact) <= 1.2 * off_by(flash.float(), exact)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("guided", [False, True])
def test_kernel_of_sum_norm_and_modulation(guided: bool, each: int) -> None:
    from scale_rae import kernels

    width, weight, images = 176, random(176, dtype=torch.float32), (4 if guided else 2) * each
    modulation, before = random(2, 5, 6 * width), random(2, 5, 12 * width)[..., 6 * width :]  # one of a group
    null, null_before = random(6 * width), random(6 * width).flip(0)
    x, update = random(images, 5, width), random(images, 5, width).flip(0)
    of = modulation.chunk(6, dim=-1), null.chunk(6)
    got, values, scale = kernels.quantize_normed(
        x,
        update,
        before.chunk(6, dim=-1)[5],
        null_before.chunk(6)[5] if guided else None,
        *of[0][:2],
        *(of[1][:2] if guided else (None, None)),
        weight,
        1e-6,
    )
    state = Deferred(x, update, before, null_before if guided else None)
    summed_ = summed(Deferred(*(None if t is None else t.float() for t in state)))
    torch.testing.assert_close(got.float(), summed_, rtol=1 / 128, atol=1e-6)
    shift, factor, *_ = spread(modulation.float(), null.float() if guided else None, images).chunk(6, dim=-1)
    normed = torch.nn.functional.rms_norm(got.float(), (width,), weight, 1e-6)
    assert_quantized(values, scale, normed * (1 + factor) + shift)


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


@pytest.mark.parametrize(
    ("dtype", "speed", "tolerance"),
    [("float32", Speed("off"), 1e-4), ("float32", Speed("on"), 1e-4), ("bfloat16", Speed("on", "fp8"), 1e-1)],
    ids=["captured", "compiled", "compiled float8"],
)
@pytest.mark.parametrize("case", ["siglip", "webssl", "wide"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_images_of_one_prompt_share_its_modulations(
    checkpoints: dict[str, Path], case: str, dtype: str, speed: Speed, tolerance: float, guidance: float
) -> None:
    model = ScaleRAE.from_pretrained(str(checkpoints[case]), device="cuda", dtype=dtype)
    one = model.reply([DRAW])[0].condition
    assert one is not None
    two = one.flip(0)
    options, drawn = SamplingOptions(steps=8, guidance=guidance), list[Tensor]()
    for shared in (True, False):
        model = ScaleRAE.from_pretrained(str(checkpoints[case]), device="cuda", dtype=dtype)
        model = model.with_speed(replace(speed, shared=shared))
        drawn.append(torch.stack(model.sample([one, one, one, two, two, two], [1, 2, 3, 1, 2, 3], options)))
    assert off_by(drawn[0][:3], drawn[0][3:]) > 2 * tolerance
    assert off_by(*drawn) <= tolerance


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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_that_stop_on_their_way(checkpoints: dict[str, Path], guidance: float) -> None:
    """Five images of two prompts, which run as six: each ends at the latent that it has alone, and early ones are estimates."""
    model = ScaleRAE.from_pretrained(str(checkpoints["webssl"]), device="cuda", dtype="float32", compile="off")
    conditions = [model.reply([text])[0].condition for text in (DRAW, f"{DRAW} again")]
    options = SamplingOptions(solver="ab2", steps=6, guidance=guidance)
    begun = [Trajectory(conditions[i // 3], seed) for i, seed in enumerate(range(5)) if conditions[i // 3] is not None]
    early = model.advance(begun, 2, options)
    assert len(begun) == len(early) == 5
    late = [*model.advance(early[:1], 6, options), *model.advance(early[1:], 6, options)]
    for trajectory, estimate in zip(late, early, strict=True):
        (alone,) = model.sample([trajectory.condition], [trajectory.seed], options)
        assert trajectory.latent is not None
        assert off_by(trajectory.latent, alone) < 1e-4
        assert estimate.latent is not None
        assert off_by(estimate.latent, alone) > 1e-3


def official_noise(seed: int, channels: int, side: int) -> Tensor:
    """The noise of the official code on a GPU."""
    torch.manual_seed(seed)
    return torch.randn(1, channels, side, side, device="cuda")


@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**63 - 1])
@pytest.mark.parametrize("channels", [1152, 1024])
def test_noise_of_a_gpu_is_the_official_codes_to_the_bit(seed: int, channels: int) -> None:
    expected = official_noise(seed, channels, 16)
    for name in ("cuda", "cpu"):
        device = torch.device(name)
        assert torch.equal(draw_noise([7, seed, 9], channels, 16, device, "cuda")()[1:2], expected.to(device))
    torch.manual_seed(1)
    before = torch.cuda.get_rng_state()
    draw_noise([seed], channels, 16, torch.device("cuda"), "cuda")()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("case", ["siglip", "wide"])
def test_latents_of_the_official_codes_noise(checkpoints: dict[str, Path], case: str) -> None:
    """Those of the plain float32 network, solved step by step from that noise."""
    model = ScaleRAE.from_pretrained(str(checkpoints[case]), device="cuda", dtype="float32")
    condition, options, seeds = model.reply([DRAW])[0].condition, SamplingOptions(noise="cuda"), [42, 43]
    assert condition is not None

    @torch.inference_mode()
    def plain(seed: int) -> Tensor:
        def velocity(x: Tensor, t: float) -> Tensor:
            return model.dit(x, torch.tensor([t], device="cuda"), condition[None]).float()

        noise = official_noise(seed, model.config.channels, model.config.dit.side)
        x = flow.solve(flow.SAMPLERS["euler"], velocity, noise, model.sampler.times(options))
        return model.sampler.latents(x)[0].cpu()

    exact = torch.stack([plain(seed) for seed in seeds])
    on_the_gpu = torch.stack(model.sample([condition] * 2, seeds, options))
    assert off_by(on_the_gpu, exact) <= 1e-5
    on_the_cpu = ScaleRAE.from_pretrained(str(checkpoints[case]), device="cpu")
    assert off_by(torch.stack(on_the_cpu.sample([condition.cpu()] * 2, seeds, options)), exact) <= 1e-4
    assert off_by(torch.stack(model.sample([condition] * 2, seeds)), exact) > 0.1  # the CPU's noise is other noise


def test_out_of_memory_halves_the_batch(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """A limit that the real allocator enforces: 8 images do not fit, fewer do, and the pictures are the same."""
    model = ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cuda", dtype="float32", compile="off")
    model = model.with_speed(replace(model.speed, shared=False))
    condition = model.reply([DRAW])[0].condition
    assert condition is not None
    count, options = 512, SamplingOptions(steps=2)
    seeds = list(range(count))
    whole = torch.stack(model.sample([condition] * count, seeds, options, batch_size=64))
    model.release_memory()
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
