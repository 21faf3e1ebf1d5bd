"""Token sequences of conversations, and which tokens are targets (REFERENCE §13). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scale_rae.prompt import IMAGE, SYSTEM, ChatTokenizer

PICTURE = "<image>"  # a picture's place in a message, as the official data writes it
QUERIES = -201  # not a token: the place of the latent queries of a picture that is drawn


class Message(NamedTuple):
    """What the user or the assistant says; each PICTURE in `text` is one picture."""

    role: str  # "user" or "assistant"
    text: str


class TokenSequence(NamedTuple):
    """Token ids, with IMAGE and QUERIES for L places each, and which of them the text loss learns."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    def __repr__(self) -> str:
        """As checkpoints of trainings know it, which keep a hash of all sequences (`Prepared.identity`)."""
        return f"Layout(ids={self.ids}, learnt={self.learnt})"

    def length(self, tokens: int) -> int:
        """The places of the sequence where a picture has `tokens` of them."""
        return len(self.ids) + (tokens - 1) * sum(i in (IMAGE, QUERIES) for i in self.ids)

    @property
    def learnt_tokens(self) -> int:
        """How many tokens the text loss learns."""
        return sum(flag and i not in (IMAGE, QUERIES) for i, flag in zip(self.ids[1:], self.learnt[1:], strict=True))


def tokenized(tokenizer: ChatTokenizer, messages: Sequence[Message], targets: str = "turns") -> TokenSequence:
    """The sequence of a conversation, as inference would have it, up to the last `<|im_end|>`.

    Learnt are the assistant's turns, headers included, without the picture's places; and besides every newline token,
    `<|im_start|>` and `<|im_end|>` anywhere, as in the official code. With `targets` "replies", only what the assistant says.
    """
    everything = targets == "turns"
    newline = tokenizer.plain("\n")
    everywhere = {*newline, tokenizer.chat_start, tokenizer.chat_end}
    ids = [tokenizer.chat_start, *tokenizer.plain(f"system\n{SYSTEM}"), tokenizer.chat_end]
    learnt = [everything and i in everywhere for i in ids]
    header = 1 + len(tokenizer.plain("assistant\n"))
    for role, text in messages:
        ids += newline
        learnt += [everything] * len(newline)
        turn = [tokenizer.chat_start, *_turn(tokenizer, role, text), tokenizer.chat_end]
        ids += turn
        if role == "assistant":
            learnt += [i != QUERIES and (everything or place >= header) for place, i in enumerate(turn)]
        else:
            learnt += [everything and i in everywhere for i in turn]
    return TokenSequence(tuple(ids), tuple(learnt))


def _turn(tokenizer: ChatTokenizer, role: str, text: str) -> list[int]:
    """The ids between a turn's control tokens. Each side of a picture is tokenized apart."""
    first, *rest = text.split(PICTURE)
    if role == "assistant":
        ids = [*tokenizer.plain("assistant\n"), *tokenizer.plain(first)]
        end = [tokenizer.image_end] if tokenizer.image_markers else []
        # Replies ask for a picture by this token also where shown pictures have no markers.
        picture = [tokenizer.image_start, QUERIES, *end]
    else:
        ids, picture = tokenizer.plain("user\n" + first), tokenizer.image()
    for part in rest:
        ids += [*picture, *tokenizer.plain(part)]
    return ids
