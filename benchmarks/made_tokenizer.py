"""A small made-up tokenizer: a byte-level BPE in Qwen2's file layout. The golden checkpoints of tests/ have it too."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.shapes.tokenizer import END_OF_TEXT, SPECIAL, byte_letters
from scale_rae.prompt import CHAT_END

MERGES = (
    ["t h", "i n", "a n", "r e", "o n", "e r", "a t", "th e", "Ġ a", "Ġ the", "Ġ o", "i s", "o f", "Ġ of", "g e", "m a", "ma ge", "i mage", "Ġ image", "an d"]
)  # fmt: skip
SIZE = 256 + len(MERGES) + len(SPECIAL)  # tokens


def write_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json: 256 bytes, 20 merges, the five special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {letter: index for index, letter in enumerate(byte_letters())}
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
        "eos_token": CHAT_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
