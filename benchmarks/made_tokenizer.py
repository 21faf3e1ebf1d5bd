"""A small made-up tokenizer: a byte-level BPE in Qwen2's file layout. The golden checkpoints of tests/ have it too."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.shapes.tokenizer import END_OF_TEXT, SPECIAL, special_tokens, write_bpe
from scale_rae.prompt import CHAT_END

MERGES = (
    ["t h", "i n", "a n", "r e", "o n", "e r", "a t", "th e", "Ġ a", "Ġ the", "Ġ o", "i s", "o f", "Ġ of", "g e", "m a", "ma ge", "i mage", "Ġ image", "an d"]
)  # fmt: skip
SIZE = 256 + len(MERGES) + len(SPECIAL)  # tokens


def write_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json: 256 bytes, 20 merges, the five special tokens."""
    base = write_bpe(folder, [(left, right) for left, _, right in (merge.partition(" ") for merge in MERGES)])
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": special_tokens(base),
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": CHAT_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
