"""ScaleRAEPipeline: a model behind the interface of diffusers' pipelines. Needs the extra `diffusers`.

    pipe = ScaleRAEPipeline.from_pretrained("shapes").to("cuda")
    pipe("Can you generate a photo of a red circle?", generator=torch.Generator().manual_seed(42)).images[0]

The pictures are those of `ScaleRAE.generate`: noise drawn by a CPU generator with an image's seed is that image's noise.
`autoencoder_rae` gives a model's encoder and decoder as diffusers' AutoencoderRAE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scale_rae.decoder import PixelDecoder
from scale_rae.encoder import Encoder
from scale_rae.errors import InputError, counted, need, shorten
from scale_rae.flow import State, joined, parted
from scale_rae.memory import pick_device
from scale_rae.options import DEFAULT_MODEL, DEFAULT_NEW_TOKENS, SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import Trajectory
from scale_rae.wording import after_no_drawing

need("diffusers", "scale_rae.diffusers", "diffusers")
from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

OUTPUTS = ("pil", "np", "pt", "latent")
StepEnd = Callable[["ScaleRAEPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]


class LoadOptions(TypedDict, total=False):
    """Options of `ScaleRAE.from_pretrained`, which says what they are."""

    decoder: str | None
    revision: str | None
    compile: str
    quantize: str | None
    memory: str | None
    lora: Sequence[str]


@dataclass
class ScaleRAEPipelineOutput(BaseOutput):
    """Pictures, as `output_type` says; the drawn latents [N, L, C]; and the model's reply to each prompt."""

    images: list[Image.Image] | np.ndarray | Tensor
    latents: Tensor
    texts: list[str]


class ScaleRAEPipeline(DiffusionPipeline):
    """Draws images of prompts, with the arguments that diffusers' pipelines have. `model` is the ScaleRAE.

    The weights are read when `model` is first used, so that `to` and the offloading methods before it cost nothing. After it they
    read the weights again.
    """

    def __init__(
        self,
        name: str | os.PathLike[str] = DEFAULT_MODEL,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        """As `from_pretrained`."""
        if unknown := sorted(options.keys() - LoadOptions.__annotations__):
            known = ", ".join(("torch_dtype", "dtype", "device", *LoadOptions.__annotations__))
            raise InputError(f"from_pretrained: no argument {', '.join(unknown)}; a Scale-RAE model takes {known}")
        super().__init__()
        self.register_to_config()
        self._name, self._options, self._offload = name, options, "none"
        self._dtype_name, self._device_name = _dtype_name(dtype), None if device is None else str(device)
        self._model: ScaleRAE | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[LoadOptions],
    ) -> ScaleRAEPipeline:
        """The pipeline of a model: "shapes" (bundled), a folder, or a hub id.

        `torch_dtype` and `dtype` mean the same; by default float32 on the CPU and bfloat16 elsewhere. By default the model runs on
        the best device here. Other options are those of `ScaleRAE.from_pretrained`.

        Raises:
            InputError: for an argument that other pipelines have, such as `variant` or `device_map`, and this one has not.
        """
        return cls(name, dtype if dtype is not None else torch_dtype, device, **options)

    @property
    def model(self) -> ScaleRAE:
        """The model, loaded when first used.

        Raises:
            ConfigError, CheckpointError, HubError, DeviceError, InputError: as `ScaleRAE.from_pretrained` does.
        """
        if self._model is None:
            self._model = ScaleRAE.from_pretrained(
                self._name, device=self._device_name, dtype=self._dtype_name, offload=self._offload, **self._options
            )
        return self._model

    # --- where it runs -------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> ScaleRAEPipeline:
        """The pipeline itself, on another device, in another dtype, or both, as in `pipe.to("cuda", torch.bfloat16)`."""
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        kwargs.pop("silence_dtype_warnings", None)
        if kwargs:
            raise TypeError(f"to: no argument {', '.join(kwargs)}")
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        if dtype is not None:
            self._set("_dtype_name", _dtype_name(dtype))
        if device is not None:
            self._set("_device_name", str(torch.device(device)))
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keeps each part of the model in the host's memory until it has its turn: `offload="model"`."""
        self._offloaded("model", gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keeps the weights in the host's memory, and two blocks at a time on the GPU: `offload="stream"`."""
        self._offloaded("stream", gpu_id, device)

    def _offloaded(self, mode: str, gpu_id: int | None, device: torch.device | str | None) -> None:
        named = device if device is not None else "cuda" if gpu_id is None else f"cuda:{gpu_id}"
        self._set("_device_name", str(named))
        self._set("_offload", mode)

    def _set(self, name: str, value: str | None) -> None:
        """Changes how the model is loaded; a model that was loaded otherwise is given up."""
        if getattr(self, name) != value:
            setattr(self, name, value)
            self._model = None

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return pick_device(self._device_name) if self._model is None else self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks."""
        return self.model.dtype

    @property
    def components(self) -> dict[str, Any]:
        """No parts that another pipeline could use."""
        return {}

    def load_lora_weights(self, name: str | os.PathLike[str]) -> None:
        """Adds a LoRA adapter in PEFT's form to those that are merged into the weights, which are read again.

        `name` is a folder or hub id, with ":WEIGHT" behind it if it is to count more or less than it was trained to.
        """
        before = self._options.get("lora", ())
        self._options["lora"] = [*([before] if isinstance(before, str) else before), os.fspath(name)]
        self._model = None

    def unload_lora_weights(self) -> None:
        """Drops all LoRA adapters; the weights are read again."""
        self._options["lora"] = []
        self._model = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises InputError: the files are already there."""
        raise InputError(f"save_pretrained: the pipeline has no files of its own; copy {self._folders()}")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Raises InputError before a repository is made on the hub: the pipeline has no files to put there."""
        raise InputError(f"push_to_hub: the pipeline has no files of its own; upload {self._folders()}")

    def _folders(self) -> str:
        """The model's folder; a student's and its base model's."""
        source = self.model.source
        return " and ".join(dict.fromkeys([str(source.config_folder), str(source.folder)]))

    # --- drawing -------------------------------------------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        """Whether a step's callback has asked to stop, by `pipe._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        *,
        solver: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        batch_size: int | None = None,
    ) -> ScaleRAEPipelineOutput | tuple[Any, ...]:
        """Images of prompts, those of the first prompt first.

        What is not described here is as in `ScaleRAE.generate`.

        Args:
            num_inference_steps: by default 49; a student has its own number and refuses others.
            guidance_scale: by default 1, none; a student has its own and refuses others.
            generator: draws the noise: one for all images, or one each. `torch.Generator().manual_seed(s)` each means the pictures
                that `ScaleRAE.generate` draws with `image_seeds` s. None: other pictures each time.
            latents: the noise itself, [N, C, S, S], N = prompts times `num_images_per_prompt`.
            output_type: "pil"; "np", [N, H, W, 3] float32 in [0, 1]; "pt", [N, 3, H, W] float32 in [0, 1], both made of 8-bit
                pictures; or "latent", the drawn latents [N, L, C].
            callback_on_step_end: `callback(pipe, step, t, {"latents": x})` after each step, with the state x [N, C, S, S] and the
                time t (1 is noise) that the step went to. A dict that it returns may have another state under "latents", also
                the same tensor with other values; the last step's is the image.
                `pipe._interrupt = True` ends the drawing, and the images are what they were going to be.

        Raises:
            InputError: for an option out of range or of a wrong kind, or a prompt that the model answers without drawing.
            ScaleRAEError: when a latent is not finite. DeviceError: when memory runs out.
        """
        if output_type not in OUTPUTS:
            raise InputError(f"output_type {output_type!r}: use one of {', '.join(OUTPUTS)}")
        if isinstance(prompt, str):
            prompts = [prompt]
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(one, str) for one in prompt):
            prompts = list(prompt)
        else:
            raise InputError(f"prompt {shorten(str(prompt))}: must be a string, or a list of at least one")
        if list(callback_on_step_end_tensor_inputs or ["latents"]) != ["latents"]:
            raise InputError(
                f'callback_on_step_end_tensor_inputs {callback_on_step_end_tensor_inputs!r}: only ["latents"]'
            )
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt {num_images_per_prompt}: must be at least 1")
        model = self.model
        options = model.sampler.called_with(guidance_scale, guidance_interval, num_inference_steps, solver)
        model.sampler.check(options)
        count = len(prompts) * num_images_per_prompt
        noise = self._noise(count, generator, latents)
        replies = model.reply(prompts, max_new_tokens=max_new_tokens)
        texts = [model.tokenizer.decode(reply.ids) for reply in replies]
        trajectories: list[Trajectory] = []
        for text, asked, reply in zip(texts, prompts, replies, strict=True):
            if reply.condition is None:
                raise InputError(
                    f"prompt {shorten(asked)!r}: the model answered without drawing: {shorten(text)!r}; "
                    f"{after_no_drawing(model.source)}"
                )
            trajectories += [Trajectory(reply.condition, 0)] * num_images_per_prompt
        trajectories = _with_states(trajectories, State(noise))
        drawn = torch.stack(self._drawn(trajectories, options, batch_size, callback_on_step_end))
        images = drawn if output_type == "latent" else _as_type(model.decode(list(drawn)), output_type)
        if not return_dict:
            return (images, drawn, texts)
        return ScaleRAEPipelineOutput(images, drawn, texts)

    def _noise(
        self, count: int, generator: torch.Generator | Sequence[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Noise [N, C, S, S] float32 on the model's device.

        Raises:
            InputError: for noise of another shape, or another number of generators, or what is neither.
        """
        config = self.model.config
        shape = (count, config.channels, config.dit.side, config.dit.side)
        if latents is not None:
            if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
                raise InputError(f"latents: {_shape(latents)}; the noise of {counted(count, 'image')} is {list(shape)}")
            return latents.to(self.model.device, torch.float32)
        if isinstance(generator, Sequence) and len(generator) != count:
            raise InputError(
                f"generator: {counted(len(generator), 'generator')} for {counted(count, 'image')}; give one each, or one"
            )
        many = list(generator) if isinstance(generator, Sequence) else generator
        for one in many if isinstance(many, list) else [many]:
            if not isinstance(one, torch.Generator | None):
                raise InputError(f"generator {shorten(str(one))}: must be a torch.Generator, or a list of them")
        drawn: Tensor = randn_tensor(shape, generator=many, device=self.model.device, dtype=torch.float32)
        return drawn

    def _drawn(
        self,
        trajectories: list[Trajectory],
        options: SamplingOptions,
        batch_size: int | None,
        step_end: StepEnd | None,
    ) -> list[Tensor]:
        """The latents [L, C] at the trajectories' ends, with a bar that moves and `step_end` called after each step."""
        model = self.model
        times = model.sampler.times(options)
        self._interrupt = False
        with self.progress_bar(total=0) as bar:

            def moved(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
                bar.total = evaluations * len(trajectories)
                bar.update(len(x))

            if step_end is None:
                trajectories = model.advance(trajectories, len(times), options, batch_size, moved)
            for step, (_, then) in enumerate(times if step_end is not None else ()):
                assert step_end is not None
                trajectories = model.advance(trajectories, step + 1, options, batch_size, moved)
                state = joined([one.state for one in trajectories if one.state is not None])
                x = _after_callback(step_end(self, step, then, {"latents": state.x}), state.x)
                trajectories = _with_states(trajectories, state._replace(x=x))
                if step + 1 == len(times):
                    return list(model.sampler.latents(x).cpu())
                if self._interrupt:
                    break
        return [one.latent for one in trajectories if one.latent is not None]


def _with_states(trajectories: Sequence[Trajectory], state: State) -> list[Trajectory]:
    """The trajectories with the images of a batch as their states."""
    return [
        Trajectory(one.condition, one.seed, part, one.latent)
        for one, part in zip(trajectories, parted(state), strict=True)
    ]


def _after_callback(returned: Any, x: Tensor) -> Tensor:
    """The state [N, C, S, S] to go on with: what a step's callback returned under "latents", by default `x`.

    Raises:
        InputError: for anything but None or a dict, or a state of another shape.
    """
    if returned is not None and not isinstance(returned, dict):
        raise InputError(f"callback_on_step_end: returned {type(returned).__name__}; must return None or a dict")
    state = (returned or {}).get("latents", x)
    if not isinstance(state, Tensor) or state.shape != x.shape:
        raise InputError(f"callback_on_step_end: returned latents {_shape(state)}; the state is {list(x.shape)}")
    return state.to(x)


def _shape(value: Any) -> str:
    """A tensor's shape, or the type of what is none, for errors."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _as_type(pictures: Sequence[Image.Image], output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Pictures as `output_type` says."""
    if output_type == "pil":
        return list(pictures)
    pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


# --- the encoder and the decoder alone -------------------------------------------------------------------------------

# Our names of a decoder's tensors -> AutoencoderRAE's.
_RENAMED = {
    "attention.attention.query.": "attention.to_q.",
    "attention.attention.key.": "attention.to_k.",
    "attention.attention.value.": "attention.to_v.",
    "attention.output.dense.": "attention.to_out.0.",
}
_DROPPED = 5  # a class token and four registers


def autoencoder_rae(model: ScaleRAE) -> Any:
    """diffusers' AutoencoderRAE with the model's encoder and pixel decoder, whose weights it shares.

    `encode` takes pixels [N, 3, H, W] in [0, 1] and gives latents [N, C, S, S]; `decode` does the opposite, without clipping. Pixels
    and latents are the model's own as long as the images have the size that the encoder takes: AutoencoderRAE resizes others
    with torch, the model with Pillow. AutoencoderRAE itself cannot build these encoders (all of its encoders have heads of 64, and
    its SigLIP has layers of 3072), so what `save_pretrained` of the result writes cannot be read again.

    Raises:
        InputError: for a FLUX-VAE-aligned checkpoint, sizes that AutoencoderRAE cannot have, or a diffusers without it.
        ConfigError, CheckpointError, HubError: when encoder or decoder cannot be loaded.
    """
    try:
        from diffusers import AutoencoderRAE
    except ImportError as e:
        raise InputError("autoencoder_rae: this version of diffusers has no AutoencoderRAE; install a later one") from e
    decoder, encoder = model.decoder, model.encoder
    if not isinstance(decoder, PixelDecoder):
        raise InputError(f"autoencoder_rae: {model.source.name} has a VAE as its decoder")
    sizes = decoder.config
    side = encoder.preprocess([Image.new("RGB", (8, 8))]).shape[-1]
    if side % sizes.patches:
        raise InputError(
            f"autoencoder_rae: the encoder's {side} pixels do not divide into the decoder's {sizes.patches} patches"
        )
    with torch.device("meta"):  # without weights, and an encoder that is replaced
        made = AutoencoderRAE(
            encoder_type="dinov2",
            encoder_hidden_size=sizes.channels,
            encoder_patch_size=side // sizes.patches,
            encoder_num_hidden_layers=1,
            encoder_input_size=side,
            decoder_hidden_size=sizes.width,
            decoder_num_hidden_layers=sizes.depth,
            decoder_num_attention_heads=sizes.heads,
            decoder_intermediate_size=sizes.inner,
            patch_size=sizes.patch,
            encoder_norm_mean=encoder.image_mean,
            encoder_norm_std=encoder.image_std,
        )
    made.encoder = _EncoderModule(encoder)
    tensors = {_renamed(name): tensor for name, tensor in decoder.state_dict().items()}
    made.decoder.decoder_pos_embed = tensors.pop("decoder_pos_embed")
    made.decoder.load_state_dict(tensors, assign=True)
    for name, values in (("encoder_mean", encoder.image_mean), ("encoder_std", encoder.image_std)):
        setattr(made, name, torch.tensor(values, device=model.device).view(1, 3, 1, 1))
    # AutoencoderRAE adds 1e-5 to the deviation of latents; the sum is to be 1.
    identity = {"_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1) - 1e-5}
    for name, tensor in identity.items():
        setattr(made, name, tensor.to(model.device))
    for part in made.decoder.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = sizes.eps
    return made.eval()


class _EncoderModule(nn.Module):
    """An encoder as AutoencoderRAE calls those of type dinov2, whose first tokens it drops."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = encoder
        self.model = encoder.model

    def forward(self, images: Tensor, **_: Any) -> BaseOutput:
        return BaseOutput(last_hidden_state=nn.functional.pad(self._encoder.encode(images), (0, 0, _DROPPED, 0)))


def _renamed(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name
