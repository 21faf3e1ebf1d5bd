"""Small checkpoints in the published layout, for tests: those the goldens were recorded on, and larger ones.

Every tensor is a function of its name and shape, as tests/goldens/README.md says, so nothing has to be stored.
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

GOLDENS = Path(__file__).parent / "goldens"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>")
MERGES = (
    ["t h", "i n", "a n", "r e", "o n", "e r", "a t", "th e", "Ġ a", "Ġ the", "Ġ o", "i s", "o f", "Ġ of", "g e", "m a", "ma ge", "i mage", "Ġ image", "an d"]
)  # fmt: skip


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


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE in Qwen2's file layout: 256 bytes, 20 merges, the five special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [b for b in range(256) if chr(b).isprintable() and b not in (32, 160, 173)]
    spare = iter(range(256, 512))
    alphabet = [chr(b) if b in letters else chr(next(spare)) for b in range(256)]
    vocabulary = {letter: b for b, letter in enumerate(alphabet)}
    for merge in MERGES:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(len(vocabulary) + i): {"content": token, **flags} for i, token in enumerate(SPECIAL)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def golden_case(name: str) -> dict[str, Any]:
    """Configs and tensor shapes of a golden checkpoint."""
    return json.loads((GOLDENS / f"{name}.json").read_text())  # type: ignore[no-any-return]


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
