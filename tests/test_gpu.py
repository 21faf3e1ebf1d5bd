"""The same pictures on a GPU as on the CPU, up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scale_rae.pipeline import ScaleRAE
from tests.test_goldens import DRAW

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_same_latent_as_on_the_cpu(checkpoints: dict[str, Path], dtype: str, tolerance: float) -> None:
    folder = str(checkpoints["webssl"])
    reference = ScaleRAE.from_pretrained(folder, device="cpu").generate(DRAW, decode=False).images[0].latent
    latent = ScaleRAE.from_pretrained(folder, device="cuda", dtype=dtype).generate(DRAW, decode=False).images[0].latent
    assert (latent - reference).norm() <= tolerance * reference.norm()


def test_bundled_model_draws_and_reads_on_the_gpu() -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cuda")
    assert model.dtype == torch.bfloat16
    drawn = model.generate("Can you generate a photo of a blue cross and a pink square?", num_images=4, guidance=3.0)
    answers = model.answer("Describe this image.", latents=[image.latent for image in drawn.images])
    assert sum("blue cross" in a.text and "pink square" in a.text for a in answers) >= 3
