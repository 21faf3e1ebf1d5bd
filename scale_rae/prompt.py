"""The tokenizer and the chat layout: text and images -> token ids. No prompt can forge a control token.

In a conversation's token ids, IMAGE stands for the L projected latents of one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_rae.errors import CheckpointError, InputError
from scale_rae.tokenizer_file import read_qwen2, reading

IMAGE = -200  # not a token: the place of an image's latents among token ids
SYSTEM = "You are a helpful assistant."
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
QUESTION = "Does this image align with the prompt: {prompt}?"
DESCRIBE = "Describe this image."
_END_MARKS = (".", "?", "!", "…", "。", "？", "！")  # of sentences
_PROBE = "A photo of 12 cats, é 猫!\n"
IMAGE_PLACEHOLDER = "<image-placeholder>"  # the official code removes it from prompts


@dataclass(frozen=True)
class Turn:
    """One turn: text, and the number of images before it (user) or after it (assistant)."""

    role: str  # user or assistant
    text: str
    images: int = 0


class ChatTokenizer:
    """A checkpoint's Qwen2 tokenizer, split in two: `plain` for people's text, control tokens by name.

    Raises:
        CheckpointError: naming the folder, when tokenizer files are missing or damaged or lack a control token.
    """

    def __init__(self, folder: Path, image_markers: bool) -> None:
        self.image_markers = image_markers
        # What people write goes through a tokenizer that knows no control tokens.
        self._backend, self._plain = read_qwen2(folder)
        self.size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self.chat_start, self.chat_end, self.image_start, self.image_end = (
            self._control(folder, token) for token in (CHAT_START, CHAT_END, IMAGE_START, IMAGE_END)
        )
        with reading(folder):
            whole = self.decode(self.plain(_PROBE)) == _PROBE
        if not whole:  # a vocabulary that lacks letters drops them
            raise CheckpointError(f"{folder}: the tokenizer loses text; its vocabulary is damaged")

    def _control(self, folder: Path, token: str) -> int:
        index: int | None = self._backend.token_to_id(token)
        if index is None:
            raise CheckpointError(f"{folder}: the tokenizer has no token {token}; this is not a Scale-RAE tokenizer")
        return index

    def plain(self, text: str) -> list[int]:
        """Token ids of text; anything in it that looks like a control token is spelt out."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens and without ids beyond the vocabulary."""
        known = [i for i in ids if i not in self.special and i < self.size]
        return str(self._backend.decode(known, skip_special_tokens=True))

    def text_stream(self) -> TextStream:
        """A decoder of token ids that come one by one."""
        return TextStream(self)

    def image(self) -> list[int]:
        """Ids of an image as it stands at the beginning of a message or in a reply."""
        return [self.image_start, IMAGE, self.image_end] if self.image_markers else [IMAGE]

    def chat(self, message: str, image: bool = False) -> list[int]:
        """Ids of system and user turns with the assistant's turn open, the image (if any) before the text.

        Raises:
            InputError: when the message is empty.
        """
        return self.conversation([Turn("user", message, int(image))])

    def conversation(self, turns: Sequence[Turn], system: str = SYSTEM) -> list[int]:
        """Ids of a system turn and `turns`, with the assistant's next turn open.

        Raises:
            InputError: when a user's turn has neither text nor image.
        """
        newline = self.plain("\n")
        ids = [self.chat_start, *self.plain(f"system\n{system}"), self.chat_end, *newline]
        for turn in turns:
            ids += [self.chat_start, *(self._user(turn) if turn.role == "user" else self._assistant(turn))]
            ids += [self.chat_end, *newline]
        return [*ids, self.chat_start, *self.plain("assistant\n")]

    def _user(self, turn: Turn) -> list[int]:
        is_text = turn.text.replace(IMAGE_PLACEHOLDER, "").strip() or not turn.images  # a picture alone is a message
        message = clean_message(turn.text) if is_text else ""
        # A run of text between control tokens is tokenized as one, so "user\n" goes with the text that follows it.
        if not turn.images:
            return self.plain("user\n" + message)
        shown = [*self.image(), *self.plain("\n")] * (turn.images - 1) + self.image()
        return [*self.plain("user\n"), *shown, *self.plain("\n" + message)]

    def _assistant(self, turn: Turn) -> list[int]:
        # "assistant\n" apart from the text, since the model wrote the text after it.
        return [*self.plain("assistant\n"), *self.plain(turn.text), *self.image() * turn.images]


class TextStream:
    """Text of token ids that come one by one, as `decode` has it, in time linear in their number.

    Tokens are parts of UTF-8, so half a character waits for its other half. `tokenizers.decoders.DecodeStream` decodes all waiting
    tokens again for each new token, so its time grows with the square if no token completes a character.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []  # since the last whole character

    def add(self, token: int) -> str:
        """The text that this token completes; empty for a control token and in the middle of a character."""
        if not self._tokenizer.decode([token]):
            return ""
        self._waiting.append(token)
        # A character has at most four bytes and a token at least one, so the last four tokens tell whether it is whole.
        if self._tokenizer.decode(self._waiting[-4:]).endswith("\ufffd"):
            return ""
        return self.rest()

    def rest(self) -> str:
        """The text of the waiting tokens; bytes that make no character become U+FFFD."""
        text = self._tokenizer.decode(self._waiting)
        self._waiting.clear()
        return text


def ask_question(template: str, prompt: str) -> str:
    """The question about a prompt: `{prompt}` in the template replaced, or the prompt appended when it has none."""
    if "{prompt}" in template:
        return put_prompt(template, prompt)
    return f"{template.rstrip()} {prompt}"


def put_prompt(template: str, prompt: str) -> str:
    """The template with each `{prompt}` replaced; a mark that follows it replaces the mark at the prompt's end.

    "Does it show {prompt}?" asks about "a cat?", "a cat." and "a cat" in the same words, and never about "a cat??".
    """
    first, *rest = template.split("{prompt}")
    unmarked = prompt.rstrip("".join(_END_MARKS)) or prompt
    return first + "".join((unmarked if after.startswith(_END_MARKS) else prompt) + after for after in rest)


def chat_text(message: str) -> str:
    """A message in the chat layout as text, with the assistant's turn open; `ChatTokenizer.chat` gives the ids.

    This text is for people and records; the model reads the ids, in which a message cannot forge control tokens.
    """
    turns = (("system", SYSTEM), ("user", clean_message(message)))
    return "".join(f"{CHAT_START}{role}\n{text}{CHAT_END}\n" for role, text in turns) + f"{CHAT_START}assistant\n"


def clean_message(text: str) -> str:
    """The text a person meant: without the image placeholder of the official code.

    Raises:
        InputError: when nothing is left, or it holds half of a surrogate pair (not Unicode text).
    """
    text = text.replace(IMAGE_PLACEHOLDER, "")
    if not text.strip():
        raise InputError("the prompt is empty; say what to draw, or what to ask")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"the prompt is not valid Unicode text (character {e.start})") from e
    return text
