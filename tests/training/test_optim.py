"""The optimizer: its state, shared by several processes, and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scale_rae.training.optim import ALIGN, FlatModel, OptimizerOptions
from scale_rae.training.parallel import Group


def test_each_process_keeps_its_part_of_the_state_and_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "send", lambda group, tensor, source: None)
    models, networks = [], []
    for group in (Group(), *(Group(index, 3) for index in range(3))):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
        options = OptimizerOptions(kind="adamw", lr=1e-2, weight_decay=0.0, warmup=1)
        model = FlatModel({"": network}, torch.device("cpu"), torch.bfloat16, options, 4, rate=len, group=group)
        gradients = [torch.ones_like(p) * (i + 1) for i, p in enumerate(model.parameters)]
        model.update(gradients)
        models.append(model)
        networks.append(network)
    alone, *shared = models
    assert all(alone.size <= 3 * len(model.master) < alone.size + 3 * ALIGN for model in shared)
    for name in ("master", "ema", "mean", "square"):
        joined = torch.cat([getattr(model, name) for model in shared])
        assert torch.equal(joined[: alone.size], getattr(alone, name))
    weights = [network[0].weight for network in networks]
    assert torch.equal(weights[1][:6], weights[0][:6])  # the first process's part
    with pytest.raises(ValueError, match="only the state of AdamW"):
        FlatModel({"": networks[0]}, torch.device("cpu"), torch.float32, OptimizerOptions(), 4, group=Group(0, 2))


@pytest.mark.parametrize(("clip", "moved"), [(0.0, 6.0), (1.0, 2.0), (4.0, 6.0)])
def test_gradients_are_clipped_unless_the_norm_is_zero(clip: float, moved: float) -> None:
    network = nn.Linear(4, 1, bias=False)
    options = OptimizerOptions(kind="adamw", betas=(0.5, 0.5), weight_decay=0.0, warmup=1, clip=clip)
    model = FlatModel({"": network}, torch.device("cpu"), torch.float32, options, 4)
    model.update([torch.full((1, 4), 1.5)])  # of norm 3
    assert model.mean.sum() == pytest.approx(moved / 2, rel=1e-5)
