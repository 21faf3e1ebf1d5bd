"""Noise seeds of images, and the noise drawn from them."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from scale_rae.errors import DeviceError, InputError


def image_seed(seed: int, prompt_index: int = 0, sample_index: int = 0) -> int:
    """The seed of one image's noise. The first image of the first prompt uses `seed` as it is."""
    if prompt_index == 0 and sample_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{prompt_index}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a non-negative 63-bit number, as torch's generators take


def image_seeds(prompts: int, images: int, seed: int) -> list[list[int]]:
    """The seeds of `images` images of each of several prompts.

    Raises:
        InputError: when there are to be no images, or the seed is no whole number.
    """
    if images < 1:
        raise InputError(f"number of images {images}: must be at least 1")
    try:
        seed = operator.index(seed)
    except TypeError as e:
        raise InputError(
            f"seed {seed!r:.40}: must be a whole number; several noise seeds are given as image_seeds=[[1, 2]], a list per prompt"
        ) from e
    return [[image_seed(seed, i, j) for j in range(images)] for i in range(prompts)]


def new_seed() -> int:
    """A random seed, for runs where none is chosen: of 31 bits, which every client's and browser's integers hold."""
    return secrets.randbits(31)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads that draw noise, kept because starting them takes half as long as drawing the noise of a batch."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "noise")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def check_noise(where: str) -> None:
    """Raises DeviceError when noise is to be drawn by CUDA's generator (`where` "cuda") and torch finds no CUDA device."""
    if where == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "noise cuda: is drawn by a GPU, and torch finds no CUDA devices here; use --noise cpu, which draws other images"
        )


def gpu_of_noise(device: torch.device) -> torch.device:
    """The GPU that draws noise "cuda" for a model on `device`: that device, or the first GPU for a model elsewhere."""
    return device if device.type == "cuda" else torch.device("cuda", 0)


def gpu_name(device: torch.device) -> str:
    """The name of the GPU that draws noise "cuda" for a model on `device`: GPUs of other names may draw other noise."""
    return torch.cuda.get_device_name(gpu_of_noise(device))


def gpu_noise(seeds: Sequence[int], channels: int, side: int, device: torch.device) -> Tensor:
    """Noise [B, C, S, S] float32 on `device`, drawn as the official code does on a GPU, one seed per image.

    Each image's noise has the bits of `torch.manual_seed(seed); torch.randn(1, C, S, S, device="cuda")` (REFERENCE §6): a
    generator of our own gives the same numbers as torch's, and leaves torch's as it is. Value i comes from thread i mod T of
    PyTorch's T threads, so GPUs that run fewer threads at once than C S S draw numbers that depend on T: an A100 draws a quarter
    of a SigLIP-2 latent's 294,912 values otherwise than an H100.
    """
    gpu = gpu_of_noise(device)
    generator = torch.Generator(gpu)
    shape = (1, channels, side, side)
    drawn = [torch.randn(shape, device=gpu, generator=generator.manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn).to(device)


def draw_noise(
    seeds: Sequence[int], channels: int, side: int, device: torch.device, where: str = "cpu"
) -> Callable[[], Tensor]:
    """A function that returns standard normal noise [B, C, S, S] float32 on the device, one seed per image.

    By default each image's noise is `torch.randn(1, C, S, S)` of its seed on the CPU, so that a seed means one picture
    everywhere. Threads start to draw it at once, while the device prepares; the returned function waits for them. With `where`
    "cuda" it is that of `gpu_noise`.
    """
    if where == "cuda":
        return functools.partial(gpu_noise, seeds, channels, side, device)
    noise = torch.empty(len(seeds), channels, side, side, pin_memory=device.type == "cuda")

    @torch.inference_mode()
    def draw(place: int, seed: int) -> None:
        noise[place].normal_(generator=torch.Generator("cpu").manual_seed(seed))

    drawn = [_threads().submit(draw, place, seed) for place, seed in enumerate(seeds)]

    def wait() -> Tensor:
        for one in drawn:
            one.result()
        return noise.to(device, non_blocking=device.type == "cuda")  # MPS may read the memory after it was freed

    return wait
