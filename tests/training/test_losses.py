"""The losses of training agree with the official ones (tests/goldens/README.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scale_rae.pipeline import ScaleRAE
from scale_rae.training import flow_loss, sample_times
from scale_rae.training.losses import training_shift
from tests.helpers.made_checkpoints import GOLDENS, made

PREFIX = "grad/diff_head.model."


def given(model: ScaleRAE) -> tuple[Tensor, Tensor, Tensor]:
    """The goldens' latents, conditions and noise."""
    config, side = model.config, model.config.dit.side
    shapes = {
        "x": [2, config.tokens, config.channels],
        "z": [2, config.tokens, config.dit.condition_width],
        "noise": [2, config.channels, side, side],
    }
    x, z, noise = (torch.from_numpy(made(f"golden.train_{name}", shape)) for name, shape in shapes.items())
    return x, z, noise


def close(actual: Any, expected: Any) -> None:
    """Within 1e-5 of the golden's scale."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["siglip", "ddt"])
def test_flow_loss_and_its_gradients_are_the_official_ones(models: dict[str, ScaleRAE], case: str) -> None:
    golden = np.load(GOLDENS / f"train_{case}.npz", allow_pickle=False)
    dit = models[case].dit
    names = [name.removesuffix("/norm") for name in golden if name.endswith("/norm")]
    parameters = dict(dit.named_parameters())
    leaves = {name: parameters[name.removeprefix(PREFIX)].detach().requires_grad_() for name in names}
    x, z, noise = given(models[case])

    def loss(dit: Any) -> Tensor:
        return flow_loss(dit, x, z, torch.from_numpy(golden["t"]), noise)

    def with_leaves(*inputs: Tensor) -> Tensor:
        by_name = {name.removeprefix(PREFIX): leaf for name, leaf in leaves.items()}
        return torch.func.functional_call(dit, by_name, inputs)

    losses = loss(with_leaves)
    close(losses.detach(), golden["loss"])
    gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient.norm(), golden[f"{name}/norm"])
        close(gradient.flatten()[:16], golden[f"{name}/head"])


@pytest.mark.parametrize("case", ["siglip", "ddt"])
def test_times_have_the_official_quantiles(models: dict[str, ScaleRAE], case: str) -> None:
    golden = np.load(GOLDENS / f"train_{case}.npz", allow_pickle=False)
    shift = training_shift(models[case].config)
    assert 1 / shift == pytest.approx(float(golden["size_ratio"]), rel=1e-6)
    times = sample_times(100_000, shift, torch.Generator().manual_seed(0)).numpy()
    assert np.quantile(times, [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx(golden["t_quantiles"], abs=0.01)
