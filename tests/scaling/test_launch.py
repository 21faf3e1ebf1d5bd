"""How processes of a launcher share an experiment, and what a device has memory for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scale_rae.errors import DeviceError, InputError
from scale_rae.pipeline import ScaleRAE
from scale_rae.scaling.experiment import Settings
from scale_rae.scaling.launch import World
from scale_rae.scaling.worker import measure_batch_size


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, World(3, 8, 3)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            World(2, 4, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),  # a batch script, not started by srun
    ],
)
def test_world(environment: dict[str, str], world: World) -> None:
    assert World.from_environment(environment) == world


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}],
)
def test_bad_world(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="RANK"):
        World.from_environment(environment)


def test_measured_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cpu")
    sample = ScaleRAE.sample

    def limited(self: ScaleRAE, conditions: Any, seeds: Any, *args: Any, **options: Any) -> list[torch.Tensor]:
        if len(seeds) > 4:
            raise DeviceError("out of GPU memory") from torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, conditions, seeds, *args, **options)

    monkeypatch.setattr(ScaleRAE, "sample", limited)
    prompt = "a photo of a red circle"
    assert measure_batch_size(model, Settings("", "shapes", scaling_rounds=4), prompt) == 2
    assert measure_batch_size(model, Settings("", "shapes", scaling_rounds=1), prompt) == 4
