"""A picture depends on checkpoint, prompt, seed, guidance, solver and steps, and on nothing else."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_overloads

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import scale_rae
from scale_rae.acceptance import Candidate, Look
from scale_rae.errors import DeviceError, InputError, ScaleRAEError
from scale_rae.kv_cache import KVCache
from scale_rae.language import Conversation, Reply
from scale_rae.memory import MemoryErrors
from scale_rae.noise import draw_noise, image_seed
from scale_rae.options import (
    COMPILE,
    DTYPES,
    OFFLOAD,
    QUANTIZE,
    CompileMode,
    Dtype,
    ModelChoice,
    OffloadMode,
    QuantizeKind,
    SamplingOptions,
)
from scale_rae.pipeline import GenerateOptions, ScaleRAE
from scale_rae.results import GeneratedImage
from scale_rae.sampling import Trajectory
from tests.test_language import PROMPTS

DRAW = PROMPTS[0]
DRAWING = [DRAW, "Can you generate a photo of a cat?", "Can you generate it?"]


@pytest.fixture(scope="module", params=["siglip", "wide"])
def model(request: pytest.FixtureRequest, models: dict[str, ScaleRAE]) -> ScaleRAE:
    return models[request.param]


@pytest.fixture(scope="module")
def siglip(models: dict[str, ScaleRAE]) -> ScaleRAE:
    return models["siglip"]


@pytest.fixture
def calls(siglip: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the velocity network's evaluations, of both branches of guidance."""
    seen: list[int] = []
    original = siglip.sampler.fast_dit.evaluate

    def evaluate(
        parts: Any, x: Tensor, time: Tensor, condition: Tensor, null_modulations: Tensor | None = None, **more: Any
    ) -> Tensor:
        seen.extend([len(x)] * (1 if null_modulations is None else 2))
        return original(parts, x, time, condition, null_modulations, **more)

    monkeypatch.setattr(siglip.sampler.fast_dit, "evaluate", evaluate)
    return seen


def latents(model: ScaleRAE, prompts: Any = DRAW, **options: Any) -> list[Tensor]:
    results = model.generate(prompts, decode=False, **{"steps": 4} | options)
    return [image.latent for r in (results if isinstance(results, list) else [results]) for image in r.images]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_image_5_of_8_is_the_one_drawn_alone(model: ScaleRAE, solver: str) -> None:
    batch = latents(model, num_images=8, seed=7, solver=solver, guidance=1.5)
    alone = latents(model, image_seeds=[[image_seed(7, 0, 5)]], solver=solver, guidance=1.5)
    close(batch[5], alone[0])
    assert float((batch[4] - batch[5]).abs().max()) > 0.1


def test_image_5_of_8_through_the_whole_published_loop(siglip: ScaleRAE) -> None:
    together = latents(siglip, num_images=6, steps=49, batch_size=6)
    close(together[5], latents(siglip, image_seeds=[[image_seed(42, 0, 5)]], steps=49)[0])


def test_batch_size_changes_nothing(model: ScaleRAE) -> None:
    whole = latents(model, num_images=5, batch_size=5)
    for size in (1, 2, 3):
        for a, b in zip(latents(model, num_images=5, batch_size=size), whole, strict=True):
            close(a, b)


def test_many_prompts_at_once_are_each_alone(siglip: ScaleRAE) -> None:
    together = siglip.generate(PROMPTS, steps=4, num_images=2, max_new_tokens=20, decode=False)
    for i, (prompt, result) in enumerate(zip(PROMPTS, together, strict=True)):
        seeds = [[image_seed(42, i, j) for j in range(2)]]
        alone = siglip.generate(prompt, steps=4, image_seeds=seeds, max_new_tokens=20, decode=False)
        assert (result.prompt, result.text, result.reply.ids) == (prompt, alone.text, alone.reply.ids)
        assert [x.seed for x in result.images] == [x.seed for x in alone.images]
        for a, b in zip(result.images, alone.images, strict=True):
            close(a.latent, b.latent, 1e-4)
    assert sum(len(r.images) for r in together) >= 2


@pytest.mark.parametrize(
    ("counts", "batch_size", "prompts"),
    [
        ([4], 4, [1]),
        ([4], 3, [1, 1]),
        ([2, 2, 2], 6, [3]),
        ([2, 2, 2], 4, [2, 1]),
        ([3, 3, 3], 8, [2, 1]),
        ([1, 2], 3, [3]),
        ([1, 1], 2, [2]),
    ],
)
def test_images_of_one_prompt_are_drawn_from_one_condition(
    siglip: ScaleRAE,
    batches: list[tuple[int, int]],
    counts: list[int],
    batch_size: int,
    prompts: list[int],
) -> None:
    """Those that follow each other in a batch, if all prompts have as many there; what is drawn is the same."""
    conditions = [torch.randn(siglip.config.tokens, siglip.config.dit.condition_width) for _ in counts]
    given = [c for c, count in zip(conditions, counts, strict=True) for _ in range(count)]
    options, seeds = SamplingOptions(steps=3, guidance=1.5), list(range(len(given)))
    together = siglip.sample(given, seeds, options, batch_size)
    assert [conditions for conditions, _ in batches] == prompts
    for latent, condition, seed in zip(together, given, seeds, strict=True):
        close(latent, siglip.sample([condition], [seed], options)[0])
    batches.clear()
    alone = siglip.with_speed(replace(siglip.speed, shared=False))
    for a, b in zip(together, alone.sample(given, seeds, options, batch_size), strict=True):
        close(a, b)
    assert sum(conditions for conditions, _ in batches) == len(given)


def test_order_changes_nothing(siglip: ScaleRAE) -> None:
    seeds = [[1, 2], [3], [4]]
    forward = latents(siglip, DRAWING, image_seeds=seeds)
    backward = latents(siglip, DRAWING[::-1], image_seeds=seeds[::-1])
    assert len(forward) == 4
    for a, b in zip(forward, [*backward[2:], backward[1], backward[0]], strict=True):
        close(a, b, 1e-4)


def test_every_image_has_a_seed_of_its_own() -> None:
    assert image_seed(42) == 42
    seeds = {image_seed(s, i, j) for s in (0, 1, 42) for i in range(20) for j in range(20)}
    assert len(seeds) == 3 * 400
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("seed", ["7", [1, 2], 1.5, None])
def test_a_seed_that_is_no_number(siglip: ScaleRAE, seed: Any) -> None:
    with pytest.raises(InputError, match=r"^seed .*: must be a whole number; several .* image_seeds=\[\[1, 2\]\]"):
        siglip.generate(DRAW, seed=seed)


def test_a_message_alone_is_no_list(siglip: ScaleRAE) -> None:
    with pytest.raises(InputError, match=r"^messages 'Draw .*: give a list of texts"):
        siglip.reply("Draw a cat")


def test_same_seed_same_picture(siglip: ScaleRAE) -> None:
    first, second = siglip.generate(DRAW, steps=3, seed=11), siglip.generate(DRAW, steps=3, seed=11)
    assert torch.equal(first.images[0].latent, second.images[0].latent)
    assert np.array_equal(np.asarray(first.images[0].image), np.asarray(second.images[0].image))
    other = siglip.generate(DRAW, steps=3, seed=12)
    assert not torch.equal(first.images[0].latent, other.images[0].latent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_draws_noise_after_a_fork() -> None:
    """As torch's loaders and pools of processes fork: a child has none of its parent's threads."""
    cpu = torch.device("cpu")
    expected = torch.cat([torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    assert torch.equal(draw_noise([3, 4], 6, 4, cpu)(), expected)
    time.sleep(0.1)  # until the threads wait for more
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the test's own limit
        signal.alarm(240)
        os._exit(0 if torch.equal(draw_noise([3], 6, 4, cpu)(), expected[:1]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_does_not_touch_torchs_own_randomness(siglip: ScaleRAE) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    latents(siglip)
    assert torch.equal(torch.get_rng_state(), before)


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_is_the_meant_formula(siglip: ScaleRAE) -> None:
    """v_null + g (v_cond - v_null) at the first evaluation, seen through the callback."""
    seen: dict[float, Tensor] = {}
    for g in (0.0, 1.0, 2.5):
        latents(siglip, guidance=g, callback=lambda i, n, t, x, v, g=g: seen.setdefault(g, v))
    close(seen[2.5], seen[0.0] + 2.5 * (seen[1.0] - seen[0.0]))


def test_guidance_0_ignores_the_prompt(siglip: ScaleRAE) -> None:
    a, b = latents(siglip, DRAWING[:2], guidance=0.0, image_seeds=[[1], [1]])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": 1.0}, 6),
        ({"guidance": 0.0}, 6),
        ({"guidance": 2.0}, 12),
        ({"guidance": 2.0, "guidance_interval": (0.0, 1.0)}, 12),
        ({"guidance": 2.0, "guidance_interval": (0.0, 1e-6)}, 6),
        ({"guidance": 1.0, "solver": "heun"}, 11),
        ({"guidance": 3.0, "solver": "dpmpp_2m"}, 12),
    ],
)
def test_network_calls(siglip: ScaleRAE, calls: list[int], options: dict[str, Any], expected: int) -> None:
    latents(siglip, steps=6, **options)
    assert len(calls) == expected


def test_guidance_outside_its_interval_is_none(siglip: ScaleRAE) -> None:
    assert torch.equal(latents(siglip, guidance=5.0, guidance_interval=(0.0, 1e-6))[0], latents(siglip)[0])
    inside = latents(siglip, guidance=5.0, guidance_interval=(0.9, 1.0))[0]
    assert not torch.equal(inside, latents(siglip)[0])
    assert not torch.equal(inside, latents(siglip, guidance=5.0)[0])


def test_callback_of_every_batch(siglip: ScaleRAE) -> None:
    seen: list[tuple[int, int, int]] = []
    latents(siglip, num_images=3, batch_size=2, steps=5, callback=lambda i, n, t, x, v: seen.append((i, n, len(x))))
    assert seen == [(i, 5, 2) for i in range(1, 6)] + [(i, 5, 1) for i in range(1, 6)]


def test_progress_over_all_batches(siglip: ScaleRAE) -> None:
    seen: list[tuple[str, int, int]] = []
    calls: list[int] = []
    options: dict[str, Any] = {"num_images": 3, "batch_size": 2, "num_inference_steps": 2}
    drawn = latents(
        siglip, **options, steps=49, progress=lambda *done: seen.append(done), callback=lambda i, *_: calls.append(i)
    )
    assert seen == [("images", done, 6) for done in (2, 4, 5, 6)]
    assert calls == [1, 2, 1, 2]
    assert torch.equal(drawn[0], latents(siglip, num_images=3, batch_size=2, steps=2)[0])


def test_the_names_that_diffusers_has(siglip: ScaleRAE) -> None:
    ours, theirs = (
        latents(siglip, guidance=2.0, steps=3),
        latents(siglip, guidance_scale=2.0, num_inference_steps=3, steps=49),
    )
    assert torch.equal(ours[0], theirs[0])
    with pytest.raises(InputError, match=r"guidance 2.0 and guidance_scale 3: they are one option"):
        siglip.generate(DRAW, guidance=2.0, guidance_scale=3)
    with pytest.raises(InputError, match=r"guidance level -1"):
        siglip.generate(DRAW, guidance_scale=-1)


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"steps": 0},
        {"steps": 1},
        {"steps": 1001},
        {"solver": "magic"},
        {"guidance_interval": (0.9, 0.1)},
        {"num_images": 0},
        {"num_images": -2},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"batch_size": -1},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"image_seeds": [[1], [2]]},
    ],
)
def test_bad_options(siglip: ScaleRAE, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        siglip.generate(DRAW, **{"steps": 2, "decode": False} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(siglip: ScaleRAE, prompt: str) -> None:
    with pytest.raises(InputError, match="empty"):
        siglip.generate(prompt)


def test_latents_that_are_not_finite_are_refused(siglip: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siglip.sampler.fast_dit, "evaluate", lambda parts, x, *rest: torch.full_like(x, torch.nan))
    with pytest.raises(ScaleRAEError, match=r"seed 5 .*not finite; try --dtype float32"):
        latents(siglip, seed=5)


def test_out_of_memory_says_what_would_fit(siglip: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(siglip.sampler.fast_dit, "evaluate", full)
    with pytest.raises(
        DeviceError,
        match=r"^cpu: out of memory while drawing 1 image at once; try --dtype bfloat16, which takes half of it$",
    ):
        latents(siglip, num_images=3)
    monkeypatch.setattr(KVCache, "forward", full)
    with pytest.raises(DeviceError, match=r"out of memory while answering 1 message at once"):
        siglip.reply([DRAW])
    monkeypatch.setattr(siglip.encoder, "encode", full)
    with pytest.raises(DeviceError, match=r"out of memory while encoding 1 image at once"):
        siglip.encode([Image.new("RGB", (9, 9))])
    monkeypatch.setattr(siglip.decoder, "forward", full)
    with pytest.raises(DeviceError, match=r"out of memory while decoding 1 latent at once"):
        siglip.decode([torch.zeros(256, 768)])
    with pytest.raises(DeviceError, match=r"out of memory while scoring 1 latent at once"):
        siglip.score([torch.zeros(256, 768)], "a cat", request_reply=Reply([65]))


@pytest.mark.parametrize(
    ("device", "dtype", "remedy", "advice"),
    [
        (
            "cuda",
            "bfloat16",
            "a smaller --batch-size",
            "a smaller --batch-size, ending what else uses the device, or --device cpu",
        ),
        (
            "mps",
            "float32",
            "",
            "--dtype bfloat16, which takes half of it, ending what else uses the device, or --device cpu",
        ),
        ("cpu", "bfloat16", "", "ending what else uses the memory"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_the_advice_when_memory_runs_out(
    device: str, dtype: str, remedy: str, advice: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(DeviceError, match=f"^{device}: out of .*memory while drawing; try {advice}$"),
        MemoryErrors(torch.device(device), getattr(torch, dtype), "drawing", remedy),
    ):
        raise error


@pytest.mark.parametrize("at_most", [1, 2, 3, 5])
def test_out_of_memory_halves_the_batch(
    siglip: ScaleRAE, calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_most: int
) -> None:
    whole = latents(siglip, num_images=7, seed=3)
    counted = siglip.sampler.fast_dit.evaluate

    def evaluate(parts: Any, x: Tensor, *rest: Any) -> Tensor:
        if len(x) > at_most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return counted(parts, x, *rest)

    monkeypatch.setattr(siglip.sampler.fast_dit, "evaluate", evaluate)
    calls.clear()
    for a, b in zip(latents(siglip, num_images=7, seed=3), whole, strict=True):
        close(a, b)
    assert max(calls) <= at_most
    assert sum(calls) == 7 * 4
    assert "out of memory drawing 7 images at once; going on with 3" in caplog.text


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(checkpoints: Any) -> dict[str, ScaleRAE]:
    return {
        n: ScaleRAE.from_pretrained(str(checkpoints[n]), device="cpu", dtype="bfloat16")
        for n in ("siglip", "wide", "ddt")
    }


def test_bfloat16_is_near_float32(models: dict[str, ScaleRAE], halves: dict[str, ScaleRAE]) -> None:
    """The made-up ddt is chaotic: rounding its weights alone changes its latents by 1.8 % (docs/performance.md)."""
    for name, half in halves.items():
        reply = models[name].reply([DRAW])[0]
        assert reply.condition is not None
        exact = models[name].sample([reply.condition], [42])[0]
        rough = half.sample([reply.condition.to(torch.bfloat16)], [42])[0]
        assert rough.dtype == torch.float32
        assert float((rough - exact).norm() / exact.norm()) < (4e-2 if name == "ddt" else 2e-2)
        assert half.reply([DRAW])[0].ids == reply.ids


def test_what_stays_float32(halves: dict[str, ScaleRAE]) -> None:
    half = halves["siglip"]
    seen: set[torch.dtype] = set()
    time: list[torch.dtype] = []
    hook = half.dit.t_embedder.register_forward_hook(lambda module, inputs, output: time.append(output.dtype))
    condition = half.reply([DRAW])[0].condition
    assert condition is not None
    assert condition.dtype == torch.bfloat16
    half.sample(
        [condition], [1], SamplingOptions(steps=2), callback=lambda i, n, t, x, v: seen.update((x.dtype, v.dtype))
    )
    hook.remove()
    assert seen == {torch.float32}
    assert set(time) == {torch.float32}
    assert dict(half.dit.named_parameters())["dit_blocks.0.norm1.weight"].dtype == torch.float32


# --- the package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, scale_rae; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_out_of_memory_while_loading(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("scale_rae.loading.fill", full)
    with pytest.raises(
        DeviceError,
        match=r"^cpu: out of memory while loading the weights, \d+\.\d GiB as float32; try a smaller checkpoint, or --dtype bfloat16",
    ):
        ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cpu")


def test_pictures_are_images_or_paths(models: dict[str, ScaleRAE], tmp_path: Path) -> None:
    model = models["siglip"]
    picture = Image.effect_noise((30, 20), 90).convert("RGB")
    picture.save(tmp_path / "cat.png")
    (expected,) = model.encode([picture])
    for given in (tmp_path / "cat.png", str(tmp_path / "cat.png"), [tmp_path / "cat.png"], picture):
        (latent,) = model.encode(given)
        assert torch.equal(latent, expected)
    said = [
        model.answer("What is it?", images=given, max_new_tokens=3)[0].reply.ids
        for given in (picture, tmp_path / "cat.png", str(tmp_path / "cat.png"), [str(tmp_path / "cat.png")])
    ]
    assert said == [said[0]] * 4
    with pytest.raises(InputError, match=r"none\.png: no such image"):
        model.answer("What is it?", images=tmp_path / "none.png")
    with pytest.raises(InputError, match="a picture must be a PIL image or a path, not int"):
        model.answer("What is it?", images=[3])


@pytest.mark.filterwarnings("ignore")
def test_a_single_latent_needs_no_list(models: dict[str, ScaleRAE]) -> None:
    model, latent = models["siglip"], torch.zeros(256, 768)
    assert model.decode(latent)[0].tobytes() == model.decode([latent])[0].tobytes()
    assert model.score(latent, "a cat", max_new_tokens=1) == model.score([latent], "a cat", max_new_tokens=1)


def test_dtypes_and_devices_as_torch_has_them() -> None:
    model = scale_rae.load("shapes", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)


def test_tensors_that_are_no_latents(models: dict[str, ScaleRAE]) -> None:
    model = models["siglip"]
    latent = torch.zeros(256, 768)
    for kind, tensor in {
        "meta": latent.to("meta"),
        "nested": torch.nested.nested_tensor([latent, latent[:2]]),
        "sparse": latent.to_sparse(),
    }.items():
        with pytest.raises(InputError, match=f"the latent is a {kind} tensor"):
            model.check_latent(tensor)
    negative = torch.complex(latent, latent + 1).conj().imag
    assert negative.is_neg()
    assert torch.equal(model.check_latent(negative), latent - 1)


def test_options_have_names_that_a_type_checker_knows() -> None:
    """So that `load(devcie="cpu")` and `generate(prompt, step=3)` are found before they run."""
    loads = [inspect.signature(f).parameters for f in (ScaleRAE.from_pretrained, scale_rae.load)]
    options, of_load = ({n: p.default for n, p in parameters.items() if n != "name"} for parameters in loads)
    assert of_load == options
    choice = {"decoder" if f.name == "decoder_repo" else f.name: f.default for f in fields(ModelChoice)[1:]}
    assert options == choice | {"progress": None, "split_batches": True}
    for kind, values in ((Dtype, DTYPES), (CompileMode, COMPILE), (QuantizeKind, QUANTIZE), (OffloadMode, OFFLOAD)):
        assert get_args(kind) == values  # so that misspelt values are found, too
    assert not any(p.kind is p.VAR_KEYWORD for p in loads[1].values())
    generate = inspect.signature(ScaleRAE.generate).parameters
    keywords = [n for n, p in generate.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == list(GenerateOptions.__annotations__)
    for overload in get_overloads(ScaleRAE.generate):
        assert inspect.signature(overload).parameters["options"].annotation == "Unpack[GenerateOptions]"


def test_what_the_model_gives_back_is_shown_in_a_line(models: dict[str, ScaleRAE]) -> None:
    model = models["siglip"]
    result = model.generate("a cat " * 30, steps=2)
    answer = model.answer("What is it?", latents=torch.zeros(256, 768), max_new_tokens=4)[0]
    score = model.score([torch.zeros(256, 768)], "a cat", max_new_tokens=4)[0]
    trajectory = model.advance([Trajectory(model.reply([DRAW])[0].condition, 1)], 1, SamplingOptions(steps=2))[0]
    conversation = Conversation([1] * 500, torch.zeros(4, 3))
    parts = (model, trajectory, trajectory.state, conversation, Candidate(0, 1, [Look(0.5, {"answer": "yes"})] * 9))
    for value in (result, [result], *result.images, result.reply, answer, score, *parts):
        text = repr(value)
        assert len(text) < 220
        assert "tensor(" not in text
        assert "\n" not in text
    assert repr(GeneratedImage(torch.zeros(4, 3), None, 7)) == "GeneratedImage(latent [4, 3], not decoded, seed 7)"
    assert repr(Reply([1, 2], condition=torch.zeros(4, 3))) == "Reply(2 tokens, condition [4, 3])"
