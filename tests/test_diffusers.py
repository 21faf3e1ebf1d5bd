"""ScaleRAEPipeline draws what ScaleRAE.generate draws; AutoencoderRAE encodes and decodes as ScaleRAE does."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scale_rae import ScaleRAE
from scale_rae.errors import InputError, OptionError
from scale_rae.noise import image_seed
from tests.helpers.late import Late
from tests.helpers.made_checkpoints import golden_case, write_checkpoint

if TYPE_CHECKING:
    from scale_rae.diffusers import ScaleRAEPipeline

diffusers: Any = Late("scale_rae.diffusers")

PROMPTS = ["Can you generate a photo of a red circle?", "Can you generate a photo of a blue star?"]
STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> ScaleRAEPipeline:
    made = diffusers.ScaleRAEPipeline.from_pretrained("shapes", device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_generator_for_each_image_draws_the_images_of_its_seed(pipe: ScaleRAEPipeline) -> None:
    seeds = [image_seed(42, i, j) for i in range(2) for j in range(2)]
    options: dict[str, Any] = {"guidance_scale": 3.0, "num_images_per_prompt": 2, "generator": seeded(seeds)}
    drawn = pipe(PROMPTS, num_inference_steps=2, **options)
    expected = pipe.model.generate(PROMPTS, num_images=2, seed=42, guidance=3.0, steps=2)
    images = [one for result in expected for one in result.images]
    assert all(torch.equal(latent, one.latent) for latent, one in zip(drawn.latents, images, strict=True))
    assert [np.asarray(image).tobytes() for image in drawn.images] == [
        np.asarray(one.image).tobytes() for one in images
    ]
    assert drawn.texts == [result.text for result in expected]


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_one_generator_given_noise_and_callbacks_draw_the_same(pipe: ScaleRAEPipeline, solver: str) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "solver": solver, "output_type": "latent"}
    plain = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(7), **options).images
    assert torch.equal(plain[0], pipe.model.generate(PROMPTS[0], seed=7, steps=STEPS, solver=solver).images[0].latent)
    noise = torch.randn(1, 96, 8, 8, generator=torch.Generator().manual_seed(7))
    seen: list[tuple[int, float]] = []

    def watch(of: ScaleRAEPipeline, step: int, t: float, tensors: dict[str, Tensor]) -> None:
        assert of is pipe
        assert tensors["latents"].shape == noise.shape
        seen.append((step, t))

    watched = pipe(PROMPTS[0], latents=noise, callback_on_step_end=watch, **options).images
    assert torch.equal(watched, plain)
    times = pipe.model.sampler.times(pipe_options(solver))
    assert seen == [(step, then) for step, (_, then) in enumerate(times)]


def pipe_options(solver: str) -> Any:
    from scale_rae.options import SamplingOptions

    return SamplingOptions(steps=STEPS, solver=solver)


def test_a_callback_can_change_the_state_and_stop(pipe: ScaleRAEPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "solver": "ab2", "output_type": "latent"}
    steps: list[int] = []

    def other(of: ScaleRAEPipeline, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        of._interrupt = step == 1
        return {"latents": tensors["latents"] + 1}

    plain = pipe(PROMPTS[0], generator=seeded([1]), **options).images
    assert (
        pipe.model.generate(PROMPTS[0], image_seeds=[[1]], steps=STEPS, solver="ab2").images[0].latent.equal(plain[0])
    )
    changed = pipe(PROMPTS[0], generator=seeded([1]), callback_on_step_end=other, **options).images
    assert steps == [0, 1]
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("first", [0, STEPS - 1])
def test_a_callback_can_change_the_state_in_place_at_the_last_step_too(pipe: ScaleRAEPipeline, first: int) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "solver": "ab2", "output_type": "latent"}

    def in_place(of: ScaleRAEPipeline, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step >= first:
            tensors["latents"].fill_(0.5)
        return tensors

    changed = pipe(PROMPTS[0], generator=seeded([1]), callback_on_step_end=in_place, **options).images
    assert torch.equal(changed, pipe.model.sampler.latents(torch.full((1, 96, 8, 8), 0.5)))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"latents": torch.zeros(3)}, r"returned latents \[3\]; the state is \[1, 96, 8, 8\]"),
        ({"latents": 3}, r"returned latents int; the state is"),
        (torch.zeros(3), "returned Tensor; must return None or a dict"),
    ],
)
def test_what_a_callback_must_return(pipe: ScaleRAEPipeline, returned: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipe(PROMPTS[0], num_inference_steps=2, callback_on_step_end=lambda *_: returned)


def test_output_types(pipe: ScaleRAEPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "solver": "ab2"}
    (image,) = pipe(PROMPTS[0], generator=seeded([3]), **options).images
    assert isinstance(image, Image.Image)
    array = pipe(PROMPTS[0], generator=seeded([3]), output_type="np", **options).images
    tensor, latents, texts = pipe(PROMPTS[0], generator=seeded([3]), output_type="pt", return_dict=False, **options)
    assert np.array_equal((array[0] * 255).round().astype(np.uint8), np.asarray(image))
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array[0])
    assert latents.shape == (1, 64, 96)
    assert texts == ["Sure, here it is:"]
    assert not torch.equal(pipe(PROMPTS[0], output_type="latent", **options).images, latents)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_inference_steps": 49}, "steps 49"),
        ({"guidance_scale": 1.0}, "guidance level 1"),
        ({"solver": "ab2"}, "solver"),
    ],
)
def test_a_student_refuses_other_values_than_its_own(arguments: dict[str, Any], said: str) -> None:
    student = diffusers.ScaleRAEPipeline.from_pretrained("shapes-4", device="cpu")
    with pytest.raises(OptionError, match=f"{said}.*: this model is a student"):
        student(PROMPTS[0], **arguments)
    with pytest.raises(InputError, match=r"copy \S+shapes-4 and \S+shapes$"):
        student.save_pretrained("x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "How are you?"}, r"without drawing: 'I only draw.*'; the bundled model draws one to four shapes"),
        ({"prompt": []}, r"prompt \[\]: must be a string, or a list of at least one"),
        ({"prompt": ["a", 3]}, r"prompt \['a', 3\]: must be a string"),
        ({"prompt": None}, "prompt None: must be a string"),
        ({"output_type": "jpg"}, "output_type 'jpg': use one of pil"),
        ({"latents": torch.zeros(1, 2, 3, 4)}, r"latents: \[1, 2, 3, 4\]; the noise of 1 image is \[1, 96, 8, 8\]"),
        ({"latents": [1]}, r"latents: list; the noise of 1 image is"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 image"),
        ({"generator": 42}, "generator 42: must be a torch.Generator, or a list of them"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"\['prompt_embeds'\]: only \[\"latents\"\]"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "inputs 'latents': only"),
        ({"guidance_scale": -1.0}, "guidance level -1"),
    ],
)
def test_wrong_arguments(pipe: ScaleRAEPipeline, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipe(**({"prompt": PROMPTS[0]} | arguments))


def test_where_it_runs_is_chosen_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []
    original = ScaleRAE.from_pretrained
    monkeypatch.setattr(ScaleRAE, "from_pretrained", lambda name, **options: loaded.append({"name": name} | options))
    pipe = diffusers.ScaleRAEPipeline.from_pretrained("owner/model", torch_dtype=torch.float16, quantize="int8")
    assert pipe.to("cuda:1", torch.bfloat16) is pipe
    _ = pipe.model
    pipe.to(device="cpu")
    _ = pipe.model
    pipe.enable_model_cpu_offload()
    _ = pipe.model
    pipe.enable_sequential_cpu_offload(gpu_id=1)
    _ = pipe.model
    shared = {"name": "owner/model", "quantize": "int8", "dtype": "bfloat16"}
    assert loaded == [
        shared | {"device": device, "offload": offload}
        for device, offload in (("cuda:1", "none"), ("cpu", "none"), ("cuda", "model"), ("cuda:1", "stream"))
    ]
    assert pipe.components == {}
    elsewhere = {"name", "device", "dtype", "offload", "progress", "split_batches"}  # arguments of other methods
    assert diffusers.LoadOptions.__annotations__.keys() == inspect.signature(original).parameters.keys() - elsewhere
    with pytest.raises(TypeError, match="no argument memory_format"):
        pipe.to("cpu", memory_format=torch.channels_last)
    with pytest.raises(InputError, match=r"no argument use_safetensors, variant; a Scale-RAE model takes torch_dtype"):
        diffusers.ScaleRAEPipeline.from_pretrained("owner/model", use_safetensors=True, variant="fp16")


def test_loras_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(ScaleRAE, "from_pretrained", lambda name, **options: loaded.append(options["lora"]) or name)
    pipe = diffusers.ScaleRAEPipeline.from_pretrained("owner/model", lora="first")
    _ = pipe.model
    pipe.load_lora_weights(Path("second:0.5"))
    _ = pipe.model
    pipe.unload_lora_weights()
    _ = pipe.model
    assert loaded == ["first", ["first", "second:0.5"], []]


def test_nothing_is_made_on_the_hub(pipe: ScaleRAEPipeline) -> None:
    for method in (pipe.push_to_hub, pipe.save_pretrained):
        with pytest.raises(InputError, match="the pipeline has no files of its own; "):
            method("owner/model")


@pytest.mark.parametrize("name", ["shapes", "webssl"])
def test_autoencoder_rae_has_the_models_pixels_and_latents(name: str, pipe: ScaleRAEPipeline, tmp_path: Path) -> None:
    model = pipe.model
    if name != "shapes":
        model = ScaleRAE.from_pretrained(write_checkpoint(golden_case(name), tmp_path), device="cpu")
    autoencoder = diffusers.autoencoder_rae(model)
    tokens, channels = model.config.tokens, model.config.channels
    latents = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(0))
    grid = latents.transpose(1, 2).unflatten(2, (model.config.dit.side, -1))
    decoded = autoencoder.decode(grid).sample.clamp(0, 1)
    pixels = (decoded * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, np.stack([np.asarray(image) for image in model.decode(list(latents))]))
    side = autoencoder.encoder_input_size
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    images = torch.from_numpy(noise.astype(np.float32) / 255).permute(0, 3, 1, 2)
    encoded = autoencoder.encode(images).latent.flatten(2).transpose(1, 2)
    expected = torch.stack(model.encode([Image.fromarray(image) for image in noise]))
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)
    shared = {p.data_ptr() for p in model.decoder.parameters()}
    assert {p.data_ptr() for p in autoencoder.decoder.parameters()} <= shared
