"""AdamW with 8-bit moments moves weights as AdamW does, and goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scale_rae.errors import MissingExtraError
from scale_rae.training.optim import FlatModel, OptimizerOptions
from scale_rae.training.settings import TrainingOptions

CPU = torch.device("cpu")


def trained(kind: str, steps: int, first: FlatModel | None = None) -> FlatModel:
    """A model after `steps` steps, the last of them from the state of `first` if that is given."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.Linear(10, 1))
    nn.init.zeros_(network[3].weight)  # so the others' first gradients are 0, as those of a LoRA's A are
    options = OptimizerOptions(kind=kind, lr=1e-2, weight_decay=0.0, ema=0.9)
    rate = lambda name: 2.0 if name.startswith("2") else 1.0  # noqa: E731
    model = FlatModel({"": network}, CPU, torch.float32, options, 12, rate=rate, schedule=lambda step, total: 1 / step)
    if first is not None:
        model.load_state(first.state())
    done = int(model.step)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(16, 20, generator=generator)
        if step >= done:
            loss = (network(x)[:, 0] - x.sum(1)).square().mean()
            model.update(torch.autograd.grad(loss, model.parameters))
    return model


def test_it_moves_weights_as_adamw_does_and_goes_on_to_the_bit() -> None:
    pytest.importorskip("bitsandbytes")
    plain, begun, eight = (trained(kind, steps) for kind, steps in (("adamw", 12), ("adamw8bit", 5), ("adamw8bit", 12)))
    start = trained("adamw", 0)
    moved, off = (plain.master - start.master).norm(), (plain.master - eight.master).norm()
    assert moved > 0.3
    assert 0 < off < 0.05 * moved
    resumed = trained("adamw8bit", 12, begun)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state().values(), eight.state().values(), strict=True))
    sizes = [sum(t.numel() * t.element_size() for t in model.state().values()) / model.size for model in (plain, eight)]
    assert sizes[0] - sizes[1] > 5.9  # bytes per element


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="--optimizer adamw8bit: needs bitsandbytes"):
        TrainingOptions(data=(Path(),), optimizer="adamw8bit").check()
