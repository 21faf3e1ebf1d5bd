"""The bundled model's tokenizer: a Qwen2-style byte-level BPE in which every word of the world is one token.

That of the last stages (`cased`) also has each of these words as a title and in capital letters: spelled letter by letter, words are hard
to read for so small a model.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from scale_rae.prompt import CHAT_END, CHAT_START, IMAGE_END, IMAGE_START, SYSTEM
from scale_rae.shapes import world

END_OF_TEXT = "<|endoftext|>"
SPECIAL = (END_OF_TEXT, CHAT_START, CHAT_END, IMAGE_START, IMAGE_END)
CHAT_WORDS = ("system", "user", "assistant", *SYSTEM.rstrip(".").split())
ANSWER_WORDS = ("yes", "Yes", "YES", "no", "No", "NO")


def byte_letters() -> list[str]:
    """GPT-2's letter for each of the 256 bytes, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    extra = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(extra)) for b in range(256)]


def words() -> list[str]:
    """Every word that must be a single token, without and with a space before it."""
    plain = sorted({*world.vocabulary(), *CHAT_WORDS, *ANSWER_WORDS})
    return [*plain, *(f" {word}" for word in plain)]


def cased_words() -> list[str]:
    """What `words` lacks of its words' titles and capitals, without and with a space before it."""
    known = set(words())
    plain = sorted({made for word in known for made in (word.strip().capitalize(), word.strip().upper())} - known)
    return [*plain, *(f" {word}" for word in plain)]


def train_merges(texts: Iterable[str], after: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """BPE merges in rank order that leave each of `texts` a single symbol; ties go to the first pair in sorted order.

    They follow the merges `after`, which are not among them.
    """
    letters = byte_letters()
    symbols = [[letters[b] for b in text.encode()] for text in texts]
    for pair in after:
        symbols = [_merged(word, pair) for word in symbols]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in symbols for pair in itertools.pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = [_merged(word, best) for word in symbols]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        # A merge makes a longer symbol, so the one just made cannot be half of the same pair again.
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write_bpe(folder: Path, merges: Sequence[tuple[str, str]]) -> int:
    """Writes vocab.json and merges.txt: 256 bytes and the merges. Returns the vocabulary's size without special tokens."""
    vocabulary = {letter: index for index, letter in enumerate(byte_letters())}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocabulary)


def special_tokens(first: int) -> dict[str, dict[str, str | bool]]:
    """`added_tokens_decoder` of tokenizer_config.json: the special tokens, with ids from `first` on."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(first + i): {"content": token, **flags} for i, token in enumerate(SPECIAL)}


def write_tokenizer(folder: Path, max_length: int = 1024, padding: bool = False, cased: bool = False) -> int:
    """Writes vocab.json, merges.txt and tokenizer_config.json; returns the vocabulary's size.

    With `padding`, the tokenizer pads to `max_length`, as the SigLIP text tower needs it. With `cased`, `cased_words` are tokens, too; all
    other tokens but the special ones keep their ids.
    """
    merges = train_merges(words())
    if cased:
        merges += train_merges(cased_words(), merges)
    base = write_bpe(folder, merges)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": special_tokens(base),
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": CHAT_END,
        "pad_token": END_OF_TEXT,
        "errors": "replace",
        "model_max_length": max_length,
        "split_special_tokens": False,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    if padding:
        settings |= {"padding_side": "right", "model_input_names": ["input_ids"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return base + len(SPECIAL)
