"""Offloading on a GPU: the same bits as with all weights there, with captured graphs and a stream of copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_rae.options import SamplingOptions, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.residency import to_host
from tests.test_goldens import DRAW

pytestmark = pytest.mark.gpu

NOT_CAPTURED = Speed("off", graph=False, group=False, ahead=False)  # as streamed blocks run


def loaded(folder: Path, **options: Any) -> ScaleRAE:
    return ScaleRAE.from_pretrained(str(folder), device="cuda", **{"compile": "off", **options})


def is_locked(memory: Tensor) -> bool:
    """Whether the HostMemory that a tensor lies in is page-locked; `is_pinned` knows torch's own page-locked memory alone."""
    runtime: Any = torch.cuda.cudart()
    storage, page = memory.untyped_storage(), 4096
    address = -(-storage.data_ptr() // page) * page
    if int(runtime.cudaHostUnregister(address)) != 0:
        return False
    return int(runtime.cudaHostRegister(address, storage.nbytes() - page, 0)) == 0


def drawn(model: ScaleRAE, count: int = 3) -> dict[str, Any]:
    """Twice: the second time, passes are replayed, and each part was away in between."""
    guidance = 3.0 if model.config.dit.null_condition else 1.0
    found: list[Any] = []
    for _ in range(2):
        result = model.generate(DRAW, num_images=count, steps=5, guidance=guidance, batch_size=2)
        latents = [image.latent for image in result.images]
        found.append((result.reply.ids, [x.tolist() for x in latents], model.score(latents, "a red circle")))
        found.append([image.image.tobytes() for image in result.images if image.image is not None])
    return {"found": found}


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("case", ["siglip", "wide"])
def test_parts_that_come_and_go_change_no_bit(checkpoints: dict[str, Path], case: str, quantize: str | None) -> None:
    model = loaded(checkpoints[case], offload="model", quantize=quantize)
    assert drawn(model) == drawn(loaded(checkpoints[case], quantize=quantize))
    assert model.residency.copies["dit"] == 2


@pytest.mark.parametrize("case", ["siglip", "wide"])
def test_streamed_blocks_change_no_bit(checkpoints: dict[str, Path], case: str) -> None:
    expected = drawn(loaded(checkpoints[case]).with_speed(NOT_CAPTURED))["found"]
    for _ in range(3):  # a missing event would show now and then
        found = drawn(loaded(checkpoints[case], offload="stream"))["found"]
        assert found[1::2] == expected[1::2]  # pictures
        for (ids, latents, scores), (its_ids, its_latents, its_scores) in zip(found[::2], expected[::2], strict=True):
            assert (ids, latents) == (its_ids, its_latents)
            # The language model's head is computed in chunks, which may round otherwise.
            for score, its in zip(scores, its_scores, strict=True):
                assert score.prompt_loss == pytest.approx(its.prompt_loss, rel=1e-2)
                assert score.prompt_conf_score == pytest.approx(its.prompt_conf_score, rel=1e-2)


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp8-storage", "int8-products"])
def test_streamed_blocks_that_are_quantised(checkpoints: dict[str, Path], quantize: str) -> None:
    stays, streams = (loaded(checkpoints["ddt"], quantize=quantize, offload=mode) for mode in ("none", "stream"))
    condition = stays.reply([DRAW])[0].condition
    assert condition is not None
    options = SamplingOptions(steps=5)
    (mine,), (its,) = (model.sample([condition], [1], options) for model in (streams, stays))
    torch.testing.assert_close(mine, its, rtol=0.05, atol=0.05)


def test_streamed_blocks_compiled(checkpoints: dict[str, Path]) -> None:
    """Blocks of one kind share a compilation, in whichever buffer they lie."""
    streams = loaded(checkpoints["wide"], offload="stream", compile="on", dtype="float32")
    stays = loaded(checkpoints["wide"], dtype="float32")
    condition = stays.reply([DRAW])[0].condition
    assert condition is not None

    def latent(model: ScaleRAE) -> Tensor:
        return model.sample([condition], [1], SamplingOptions(steps=4))[0]

    torch.testing.assert_close(latent(streams), latent(stays), rtol=1e-3, atol=1e-3)


def test_large_networks_are_nowhere_whole_on_the_device(checkpoints: dict[str, Path]) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = loaded(checkpoints["wide"], offload="model")
    weights = sum(t.nbytes for t in (*model.language.model.layers.parameters(), *model.dit.dit_blocks.parameters()))
    assert torch.cuda.memory_allocated() - before < weights
    model.generate(DRAW, steps=2)
    assert all(t.is_cuda for t in model.dit.dit_blocks.parameters())
    streams = loaded(checkpoints["wide"], offload="stream")
    streams.generate(DRAW, steps=2)
    assert all(is_locked(t) for t in streams.dit.dit_blocks.parameters())


def test_host_memory_is_page_locked_until_it_is_freed() -> None:
    for _ in range(3):  # memory that was freed while locked could not be locked again
        tensors = [torch.arange(1 << 20, dtype=torch.float32), torch.ones(3)]
        _, memory = to_host(tensors, lock=True)
        assert memory.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
        assert is_locked(memory)
        del memory, tensors
