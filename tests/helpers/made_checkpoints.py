"""Small checkpoints in the published layout, which the goldens were recorded on.

Every tensor is a function of its name and shape (tests/goldens/README.md), so no weights are stored.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from benchmarks.made_tokenizer import write_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"


def made(name: str, shape: list[int]) -> NDArray[np.float32]:
    """The golden checkpoints' tensor `name`: normal draws seeded by the name's CRC, scaled by its role."""
    seed = zlib.crc32(name.encode()) & 0x7FFF_FFFF
    values = np.random.RandomState(seed).standard_normal(tuple(shape))  # the recorded generator
    role = name.split(".")[-1]
    if role == "weight" and len(shape) == 1:
        values = 1 + 0.1 * values
    elif role == "weight" and "embed_tokens" not in name:
        values = values * (1.0 / np.sqrt(np.prod(shape[1:])))
    elif role == "logit_scale":
        values = np.full(tuple(shape), 2.0)
    else:
        values = 0.2 * values
    return values.astype(np.float32)


def golden_case(name: str) -> dict[str, Any]:
    """Configs and tensor shapes of a golden checkpoint."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def write_checkpoint(case: dict[str, Any], folder: Path) -> Path:
    """Writes model, encoder (beside the model, by its name) and decoder; returns the model's folder."""
    model = folder / "model"
    write_tokenizer(model)
    weights = {n: torch.from_numpy(made(n, s)) for n, s in case["model"]["tensors"].items()}
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for a, b in case["model"].get("swap_lm_head_rows", []):
        head[[a, b]] = head[[b, a]]  # so that the reply to the golden prompt asks for an image
    (model / "config.json").write_text(json.dumps(case["model"]["config"]))
    save_file(weights, model / "model.safetensors", {"format": "pt"})

    encoder = folder / case["model"]["config"]["mm_vision_tower_aux_list"][0]
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps(case["vision"]["config"]))
    (encoder / "preprocessor_config.json").write_text(json.dumps(case["vision"]["preprocessor"]))
    tensors = {n: torch.from_numpy(made(n, s)) for n, s in case["vision"]["tensors"].items()}
    save_file(tensors, encoder / "model.safetensors", {"format": "pt"})

    decoder = folder / "decoder"
    decoder.mkdir()
    (decoder / "config.json").write_text(json.dumps(case["decoder"]["config"]))
    tensors = {n: torch.from_numpy(made("decoder/" + n, s)) for n, s in case["decoder"]["tensors"].items()}
    torch.save(tensors, decoder / "model.pt")
    return model
