"""Text of tokens that come one by one is the text of all of them, and comes in the same pieces as by decoding all anew."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import ChatTokenizer, TextStream
from scale_rae.tokenizer_file import read_qwen2


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, ScaleRAE]) -> ChatTokenizer:
    return models["siglip"].tokenizer


def pieces(tokenizer: ChatTokenizer, ids: list[int]) -> tuple[list[str], str]:
    """The text that each token completes, and what waits at the end."""
    stream = tokenizer.text_stream()
    return [stream.add(token) for token in ids], stream.rest()


def pieces_anew(tokenizer: ChatTokenizer, ids: list[int]) -> tuple[list[str], str]:
    """The same by decoding all tokens again for each."""
    given, new = "", []
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        new.append("" if text.endswith("\ufffd") else text[len(given) :])
        given += new[-1]
    return new, tokenizer.decode(ids)[len(given) :]


BytesOf = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def bytes_of(checkpoints: dict[str, Path], tokenizer: ChatTokenizer) -> BytesOf:
    """A function that gives a token for each byte of a text."""
    backend, _ = read_qwen2(checkpoints["siglip"])
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as their own character
    names = {byte: chr(byte) for byte in plain}
    names |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in plain)}

    def ids(text: str) -> list[int]:
        found = [i for byte in text.encode() if (i := backend.token_to_id(names[byte])) is not None]
        assert tokenizer.decode(found) == text
        return found

    return ids


@pytest.mark.parametrize(
    "text", ["a red circle.", "né 猫!", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "Ω≈ç√∫˜µ≤≥÷", "\ufffd", "a\ufffdb", "", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 हिन्दी"]
)
def test_characters_come_whole(tokenizer: ChatTokenizer, bytes_of: BytesOf, text: str) -> None:
    for ids in (tokenizer.plain(text), bytes_of(text)):
        new, rest = pieces(tokenizer, ids)
        assert (new, rest) == pieces_anew(tokenizer, ids)
        assert "".join(new) + rest == text
        if "\ufffd" not in text:
            assert rest == ""
            assert not any("\ufffd" in piece for piece in new)


def test_control_tokens_and_ids_beyond_the_vocabulary_have_no_text(tokenizer: ChatTokenizer, bytes_of: BytesOf) -> None:
    """Also between the halves of a character."""
    silent = [tokenizer.chat_start, tokenizer.image_start, tokenizer.image_end, tokenizer.chat_end, tokenizer.size + 9]
    ids = [j for i in bytes_of("é 猫👍🏽") for j in (i, *silent)]
    new, rest = pieces(tokenizer, ids)
    assert (new, rest) == pieces_anew(tokenizer, ids)
    assert ("".join(new), rest) == ("é 猫👍🏽", "")


def test_tokens_of_any_bytes_stream_as_they_decode(tokenizer: ChatTokenizer) -> None:
    """Random ids are mostly not UTF-8 at all."""
    rng = random.Random(0)
    for _ in range(300):
        limit = rng.choice([256, tokenizer.size, tokenizer.size + 20])
        ids = [rng.randrange(limit) for _ in range(rng.randrange(40))]
        assert pieces(tokenizer, ids) == pieces_anew(tokenizer, ids)


def test_each_token_is_decoded_a_few_times_at_most(tokenizer: ChatTokenizer, bytes_of: BytesOf) -> None:
    """However long the text is, and though no character comes to its end."""
    decoded = 0

    class Counting:
        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids)

    for text in ("a red circle " * 100, "猫"):
        ids = bytes_of(text) if len(text) > 1 else bytes_of(text)[:2] * 600
        decoded, stream = 0, TextStream(Counting())
        for token in ids:
            stream.add(token)
        stream.rest()
        assert decoded <= 6 * len(ids)
