"""What other devices lack: no float64, no copies in the background and missing operations on Apple's MPS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scale_rae.errors import DeviceError
from scale_rae.memory import MemoryErrors
from scale_rae.noise import draw_noise
from scale_rae.options import SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.quantization import Place
from scale_rae.sampling import LatentSampler
from tests.cli.conftest import DRAW

CPU, MPS = torch.device("cpu"), torch.device("mps")
MISSING = (  # PyTorch's own words
    "The operator 'aten::_some.out' is not currently implemented for the MPS device. If you want this op to be considered for "
    "addition please comment on https://github.com/pytorch/pytorch/issues/141287 and mention use-case, that resulted in missing "
    "op as well as commit hash. As a temporary fix, you can set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use "
    "the CPU as a fallback for this op. WARNING: this will be slower than running natively on MPS."
)


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that makes float64 numbers, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return out


@contextmanager
def as_on_mps(model: ScaleRAE, options: SamplingOptions, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    times = model.sampler.times(options)  # computed on the CPU, in float64
    monkeypatch.setattr(LatentSampler, "times", lambda self, options: times)
    with NoFloat64():
        yield


@pytest.mark.parametrize("case", ["siglip", "wide"])
def test_networks_compute_without_float64(
    models: dict[str, ScaleRAE], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = models[case], SamplingOptions(steps=2, guidance=1.5)
    picture = Image.new("RGB", (30, 20), "red")
    expected = model.generate(DRAW, options=options)
    with as_on_mps(model, options, monkeypatch):
        drawn = model.generate(DRAW, options=options)
        encoded = model.encode(picture)
        model.score(encoded, "a cat", request_reply=drawn.reply)
        model.answer("What is it?", latents=encoded, max_new_tokens=2)
    assert torch.equal(drawn.images[0].latent, expected.images[0].latent)


def test_float64_checkpoints_are_quantised_without_float64() -> None:
    place, weight = Place(CPU, CPU, torch.float32), torch.randn(4, 64, dtype=torch.float64)
    rooms = [place.room("int8", [4], 64) for _ in range(2)]
    place.sink(rooms[0], 64).store(0, weight.float())
    with NoFloat64():
        place.sink(rooms[1], 64).store(0, weight)
    assert torch.equal(rooms[0][0].values, rooms[1][0].values)


def test_noise_goes_to_mps_before_its_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in the background reads whatever is in that memory later (PyTorch's issues 139550 and 189690)."""
    copied = list[tuple[torch.device, bool]]()

    def to(self: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        copied.append((device, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "to", to)
    draw_noise([1, 2], 3, 4, MPS)()
    assert copied == [(MPS, False)]


def test_a_missing_operation_is_named(models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["siglip"]
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)

    def lacks(*args: object, **options: object) -> None:
        raise NotImplementedError(MISSING)

    monkeypatch.setattr(model.sampler.fast_dit, "evaluate", lacks)
    with pytest.raises(DeviceError) as error:
        model.generate(DRAW, steps=2)
    assert str(error.value) == (
        f"cpu: PyTorch {torch.__version__} has no operation aten::_some.out for MPS, needed for drawing 1 image at once; set "
        "PYTORCH_ENABLE_MPS_FALLBACK=1 to have that operation computed on the CPU, or use --device cpu"
    )
    assert "PYTORCH_ENABLE_MPS_FALLBACK" not in os.environ


@pytest.mark.parametrize("other", [NotImplementedError("of ours"), TypeError(MISSING)])
def test_other_errors_stay_what_they_are(other: Exception) -> None:
    with pytest.raises(type(other)), MemoryErrors(MPS, torch.float32, "drawing", ""):
        raise other
