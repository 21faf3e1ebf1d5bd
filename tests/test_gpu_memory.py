"""`--memory` on CUDA: the limit is kept, and what is estimated is what is taken."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from scale_rae.config import load_config, load_decoder_config
from scale_rae.footprint import CONTEXT, Footprint, Way
from scale_rae.hub import BUNDLED
from scale_rae.machine import describe, measure
from scale_rae.memory import out_of_memory
from scale_rae.pipeline import ScaleRAE

pytestmark = pytest.mark.gpu
PROMPT = "Can you generate a photo of a red circle?"


@pytest.fixture
def no_limit() -> Iterator[None]:
    """Begins without what earlier tests of this process left on the device, and takes the limit away again."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream that has multiplied matrices
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("no_limit")
def test_the_limit_holds_for_the_process() -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cuda", memory="2G")
    assert model.memory_plan is not None
    assert (model.memory_plan.way.offload, model.memory_plan.way.quantize, model.batch_size) == ("none", None, 32)
    assert model.generate(PROMPT, steps=4, num_images=8).images[7].image is not None
    assert torch.cuda.max_memory_reserved() <= (2 << 30) - CONTEXT["cuda"]
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    with pytest.raises(Exception, match="out of memory") as caught:
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    assert out_of_memory(caught.value)


@pytest.mark.usefixtures("no_limit")
def test_less_memory_takes_turns_and_draws_the_same() -> None:
    folder = BUNDLED["shapes"]
    config = load_config(folder)
    footprint = Footprint(config, load_decoder_config(folder / "decoder", config.channels))
    # The allocator's smallest pieces are as large as this model.
    limit = footprint.peak(Way(offload="model")) + (256 << 20)
    plain = ScaleRAE.from_pretrained("shapes", device="cuda").generate(PROMPT, steps=4)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = ScaleRAE.from_pretrained("shapes", device="cuda", memory=f"{limit / 2**20 + 0.01:.3f}M", offload="model")
    assert model.residency.mode == "model"
    drawn = model.generate(PROMPT, steps=4)
    assert torch.equal(drawn.images[0].latent, plain.images[0].latent)


def test_what_the_device_is_and_does() -> None:
    device = torch.device("cuda")
    machine = describe(device, torch.bfloat16)
    assert 0 < machine.usable < machine.free <= machine.total + CONTEXT["cuda"]
    rates = measure(device, torch.bfloat16)
    assert rates.products > 1e12
    assert rates.memory > rates.bus > 1e9
