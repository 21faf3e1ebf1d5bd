"""Small made-up checkpoints of GenEval's two networks, in the published files' form, on which the goldens were recorded."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from scale_rae.geneval.mask2former import Architecture
from tests.helpers.made_checkpoints import GOLDENS, made

FOLDER = GOLDENS / "geneval"


def record(name: str) -> Any:
    """A golden file of JSON: "color", "crops", "mask2former"."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def write_clip(folder: Path) -> Path:
    """CLIP's folder: config, weights and a tokenizer that knows the captions of the recorded classes, with their real ids."""
    folder.mkdir(parents=True, exist_ok=True)
    color = record("color")
    config, arrays = color["config"], np.load(FOLDER / "color.npz")
    fields = {"model_type": "clip", "projection_dim": config["projection_dim"], "logit_scale_init_value": 2.6592}
    parts = {"text_config": config["text"], "vision_config": config["vision"]}
    (folder / "config.json").write_text(json.dumps(fields | parts))
    weights = {name: torch.from_numpy(made(name, shape)) for name, shape in color["tensors"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {}
    for number, name in enumerate(color["classes"]):
        for row, tint in zip(arrays[f"{number}.token_ids"], color["colors"], strict=True):
            words = f"a photo of a {tint} - colored {name}".split()
            ids |= dict(zip(words, (int(i) for i in row[1][1:]), strict=False))
        ids["object"] = int(arrays[f"{number}.token_ids"][0, 2, 6])
    taken = set(ids.values())
    start, end, size = "<|startoftext|>", "<|endoftext|>", config["text"]["vocab_size"]
    vocabulary = ids | {f"#{i}": i for i in range(size - 2) if i not in taken} | {start: size - 2, end: size - 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[token], "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token in (start, end)
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "RobertaProcessing", "sep": [end, size - 1], "cls": [start, size - 2]}
        | {"trim_offsets": False, "add_prefix_space": False},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": end},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def detector_tensors() -> dict[str, Tensor]:
    """The reduced detector's tensors under mmdet's names, as they were recorded."""
    case = record("mask2former")
    scales = case["multiply"]
    tensors = {name: torch.from_numpy(made(name, shape)) for name, shape in case["tensors"].items()}
    return {name: tensor * scales.get(name, 1.0) for name, tensor in tensors.items()}


def small_architecture() -> Architecture:
    """The sizes of the reduced detector."""
    config = record("mask2former")["config"]
    backbone, pixels, decoder = config["backbone"], config["pixel_decoder"], config["transformer_decoder"]
    return Architecture(
        embed_dim=backbone["embed_dim"],
        depths=tuple(backbone["depths"]),
        num_heads=tuple(backbone["num_heads"]),
        window_size=backbone["window_size"],
        channels=pixels["channels"],
        encoder_layers=pixels["encoder_layers"],
        encoder_width=pixels["ffn"],
        decoder_layers=decoder["layers"],
        decoder_width=decoder["ffn"],
        num_queries=config["num_queries"],
    )


def write_detector(file: Path) -> Path:
    """The reduced detector's .pth file, in the form in which MMDetection publishes: old format, weights beside metadata."""
    case = record("mask2former")
    tensors = detector_tensors()
    tensors |= {name: torch.zeros(shape, dtype=torch.int64) for name, shape in case["buffers_not_drawn"].items()}
    meta = {"mmdet_version": "2.24.1", "CLASSES": ("person", "bicycle"), "epoch": 50, "seed": None, "lr": 1e-4}
    torch.save({"meta": meta, "state_dict": OrderedDict(tensors)}, file, _use_new_zipfile_serialization=False)
    return file
