"""The networks of one checkpoint: loading, sharing the device's memory, running in batches."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor

from scale_rae.adapters import find_adapters, read_adapter
from scale_rae.compiling import attention_kernels
from scale_rae.config import ScaleRAEConfig, load_config
from scale_rae.cpu import keep_freed_memory
from scale_rae.cuda_graphs import Captures
from scale_rae.decoder import PixelDecoder, to_uint8
from scale_rae.dit import DiT
from scale_rae.encoder import Encoder
from scale_rae.errors import InputError
from scale_rae.hub import Source, find
from scale_rae.language import LanguageModel
from scale_rae.loading import (
    LoadProgress,
    check_headers,
    find_decoder,
    load_decoder,
    load_encoder,
    load_networks,
    load_tokenizer,
)
from scale_rae.machine import limit_process, plan
from scale_rae.memory import MemoryErrors, in_batches, pick_device, pick_dtype, savings
from scale_rae.memory_plan import Plan
from scale_rae.options import LANGUAGE_KINDS, ModelChoice, Speed, check_offload, default_batch_size, memory_bytes
from scale_rae.prompt import ChatTokenizer
from scale_rae.quantization import Place, check_quantize
from scale_rae.residency import Residency
from scale_rae.sampling import LatentSampler, NormStats
from scale_rae.toolchain import check_compile

if TYPE_CHECKING:
    from scale_rae.vae import VaeDecoder

_MOST_GRAPHS = 8  # captured passes of the decoder, one per batch size
_log = logging.getLogger("scale_rae")
T = TypeVar("T")


def load(
    choice: ModelChoice,
    source: Source | None = None,
    progress: LoadProgress | None = None,
    split_batches: bool = True,
) -> Networks:
    """The networks of the chosen model, prepared for their device.

    `source` are the model's files, where they have been found already. `ScaleRAE.from_pretrained` documents the rest.

    Raises:
        ConfigError, CheckpointError, HubError, DeviceError, InputError: each says what is wrong and what to do.
    """
    speed, offload = Speed(choice.compile, choice.quantize), choice.offload
    device = pick_device(choice.device)
    dtype = pick_dtype(choice.dtype, device)
    check_offload(offload, device.type)
    speed.check()
    check_quantize(speed.quantize, device, dtype)
    check_compile(speed.compile, device)
    if choice.memory is not None:
        memory_bytes(choice.memory)  # an invalid size raises an error before anything is downloaded
    if device.type == "cpu":
        keep_freed_memory()
    source = source or find(choice.model_path, "model", revision=choice.revision)
    config = load_config(source.config_folder)
    found = find_adapters(choice.lora)
    adapters = [read_adapter(files, weight) for files, weight in found]
    memory_plan = None
    if choice.memory is not None:
        check_headers(source)  # the choice is for files that can be loaded
        memory_plan = plan(choice, source, config, device, dtype)
        speed, offload = replace(speed, quantize=memory_plan.way.quantize), memory_plan.way.offload
        limit_process(device, memory_plan.limit)
        _log.warning("%s", memory_plan)
    residency = Residency(offload, device)
    speed = residency.speed(speed)
    tokenizer = load_tokenizer(source, config)
    language, dit, norm_stats = load_networks(source, config, dtype, device, speed, progress, residency.home, adapters)
    flags = savings(device, speed.quantize, offload)
    with MemoryErrors(device, dtype, "preparing the weights", "a smaller checkpoint", flags):
        return Networks(
            *(config, tokenizer, language, dit, norm_stats, source, choice.decoder_repo, dtype, device),
            speed=speed,
            split_batches=split_batches,
            residency=residency,
            memory_plan=memory_plan,
            adapters=found,
        )


class Networks:
    """Language model, sampler, and the encoder and decoder, which load when first used.

    The constructor prepares the weights of `language` and `dit` in place: they are padded, stacked and fused. `decoder_name` is a
    folder or hub id, or None for the decoder that belongs to the model. Arguments with a default are as in
    `ScaleRAE.from_pretrained`.
    """

    def __init__(
        self,
        config: ScaleRAEConfig,
        tokenizer: ChatTokenizer,
        language: LanguageModel,
        dit: DiT,
        norm_stats: NormStats | None,
        source: Source,
        decoder_name: str | None,
        dtype: torch.dtype,
        device: torch.device,
        speed: Speed | None = None,
        split_batches: bool = True,
        residency: Residency | None = None,
        memory_plan: Plan | None = None,
        adapters: Sequence[tuple[Source, float]] = (),
    ) -> None:
        self.config, self.tokenizer, self.language, self.dit = config, tokenizer, language, dit
        self.norm_stats = norm_stats
        self.source, self.dtype, self.device = source, dtype, device
        self.residency = residency or Residency("none", device)
        self.speed = self.residency.speed(speed or Speed())
        self.residency.settle(dit, [dit.dit_blocks])
        self.residency.settle(language, [language.model.layers, language.model.embed_tokens, language.lm_head])
        language.fuse(self.residency)
        self.sampler = LatentSampler(config, dit, norm_stats, self.speed, self.residency)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of weights from before they were padded, stacked and fused
        self._decodes = Captures(self.speed.graph and device.type == "cuda", _MOST_GRAPHS)
        self.split_batches, self.memory_plan, self.adapters = split_batches, memory_plan, tuple(adapters)
        self.batch_size = memory_plan.way.batch if memory_plan else default_batch_size(device.type)
        self._decoder_name = decoder_name
        self._encoder: Encoder | None = None
        self._decoder: PixelDecoder | VaeDecoder | None = None
        self.encoder_source: Source | None = None
        self.decoder_source: Source | None = None

    def with_speed(self, speed: Speed) -> Networks:
        """The same networks, sharing their weights, with another `speed`, as `ScaleRAE.with_speed` documents.

        Raises:
            InputError, DeviceError: for a choice that does not exist, or that this device does not support.
        """
        if self.speed.quantize is not None and not speed.same_network(self.speed):
            raise InputError(f"speed: this model is quantised ({self.speed.quantize}) already; load it anew")
        if speed.quantize in LANGUAGE_KINDS and speed.quantize != self.speed.quantize:
            raise InputError(
                f"speed: quantize {speed.quantize} quantises the language model too; load the model anew with it"
            )
        speed = self.residency.speed(speed)
        if self.residency.offloads and not speed.same_network(self.speed):
            raise InputError(
                f"speed: only compile can change with --offload {self.residency.mode}; load the model anew"
            )
        other = copy.copy(self)
        other.speed = speed
        other.language = self.language.with_speed(speed)
        other.sampler = self.sampler.with_speed(speed)
        if not speed.same_network(self.speed):
            other._decodes = Captures(speed.graph and self.device.type == "cuda", _MOST_GRAPHS)
        return other

    # --- pixels --------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The representation encoder."""
        if self._encoder is None:
            with self.residency.lock:
                if self._encoder is None:  # no other thread has loaded it meanwhile
                    self.encoder_source = find(self.config.encoder_name, "encoder", self.source.folder)
                    self._encoder = load_encoder(
                        self.encoder_source, self.config, self.dtype, self.device, self.residency
                    )
        return self._encoder

    @property
    def decoder(self) -> PixelDecoder | VaeDecoder:
        """The decoder of latents; for a FLUX-VAE-aligned checkpoint that of a VAE (extra `vae`)."""
        if self._decoder is None:
            with self.residency.lock:
                if self._decoder is None:  # no other thread has loaded it meanwhile
                    self._decoder = self._load_decoder()
        return self._decoder

    def _load_decoder(self) -> PixelDecoder | VaeDecoder:
        kind = lambda: self.encoder.kind  # noqa: E731 - the encoder is loaded only if its kind decides
        self.decoder_source = find_decoder(self._decoder_name, self.source, self.config, kind)
        with torch.inference_mode(False):
            place = Place(self.residency.home, self.device, self.dtype)
            decoder = load_decoder(self.decoder_source, self.config, place, self.speed.quantize)
        self.residency.keep("decoder", decoder, [decoder])
        return decoder

    @property
    def image_size(self) -> int:
        """Pixels along each edge of a decoded picture; loads the decoder."""
        decoder = self.decoder
        return decoder.config.image if isinstance(decoder, PixelDecoder) else decoder.image_size(self.config.tokens)

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Latents [L, C] on the CPU of a batch of normalised pixels [N, 3, H, W]."""
        with attention_kernels(self.device):
            return list(self.encoder.encode(pixels).cpu().unbind())

    def decoding(self) -> Callable[[Sequence[Tensor]], list[Image.Image]]:
        """A function that decodes a batch of latents [L, C]. The decoder is loaded now, not within a batch."""
        decoder, (mean, std) = self.decoder, self._pixel_scale()

        def decode(latents: Sequence[Tensor]) -> list[Image.Image]:
            batch = torch.stack([latent.to(self.device) for latent in latents]).to(self.dtype)
            with attention_kernels(self.device):
                pixels = self._decodes.run(len(batch), decoder, batch)
            pixels = to_uint8(pixels, mean, std)
            return [Image.fromarray(array) for array in pixels.cpu().numpy()]

        return decode

    def _pixel_scale(self) -> tuple[list[float], list[float]]:
        """(mean, std) of the decoder's pixels, by channel."""
        if self.config.vae is not None:
            from scale_rae.vae import MEAN, STD

            return MEAN, STD
        return self.encoder.image_mean, self.encoder.image_std

    # --- memory --------------------------------------------------------------------------------------------------

    def in_batches(
        self,
        part: str,
        count: int,
        size: int,
        run: Callable[[int, int], list[T]],
        doing: str,
        noun: str,
        remedy: str = "fewer at once",
    ) -> list[T]:
        """`memory.in_batches` while `part` has its turn on the device. Every network runs through this method."""
        if not count:  # nothing needs the part
            return []
        release = self.release_memory if self.split_batches else None
        with self.residency.use(part):
            return in_batches(count, size, run, self.memory_errors, doing, noun, remedy, release)

    def release_memory(self) -> None:
        """Frees what is kept between calls: captured graphs and KV caches."""
        self.sampler.fast_dit.forget()
        self.language.forget()
        self._decodes.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_errors(self, what: str, remedy: str = "fewer at once") -> MemoryErrors:
        """A context that turns running out of memory into a DeviceError with `what` was done and the `remedy`."""
        flags = savings(self.device, self.speed.quantize, self.residency.mode)
        return MemoryErrors(self.device, self.dtype, what, remedy, flags)
