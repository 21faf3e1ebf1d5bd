"""Noise seeds of images, and the noise drawn from them."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def image_seed(seed: int, prompt_index: int = 0, sample_index: int = 0) -> int:
    """The seed of one image's noise. The first image of the first prompt uses `seed` as it is."""
    if prompt_index == 0 and sample_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{prompt_index}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a non-negative 63-bit number, as torch's generators take


def new_seed(bits: int = 63) -> int:
    """A random seed of at most `bits` bits, for runs where none is chosen."""
    return secrets.randbits(bits)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads that draw noise, kept because starting them takes half as long as drawing the noise of a batch."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "noise")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def draw_noise(seeds: Sequence[int], channels: int, side: int, device: torch.device) -> Callable[[], Tensor]:
    """A function that returns standard normal noise [B, C, S, S] float32 on the device, one seed per image.

    Each image's noise is `torch.randn(1, C, S, S)` of its seed on the CPU, so that a seed means one picture everywhere.
    Threads start to draw it at once, while the device prepares; the returned function waits for them.
    """
    noise = torch.empty(len(seeds), channels, side, side, pin_memory=device.type == "cuda")

    @torch.inference_mode()
    def draw(place: int, seed: int) -> None:
        noise[place].normal_(generator=torch.Generator("cpu").manual_seed(seed))

    drawn = [_threads().submit(draw, place, seed) for place, seed in enumerate(seeds)]

    def wait() -> Tensor:
        for one in drawn:
            one.result()
        return noise.to(device, non_blocking=True)

    return wait
