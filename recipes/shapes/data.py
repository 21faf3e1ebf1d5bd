"""Training data as arrays: scenes of the world, and their captions, requests and questions as token ids.

Worker processes make it in chunks. A chunk depends on (seed, stream, chunk number) alone, so the data is the same for any
number of workers. Nothing that training may not see is ever sampled: every scene comes from `world.sample(..., "exclude")`.
Nothing here imports torch, and workers are forked: make data before CUDA starts.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recipes.shapes.settings import CAPTION_TOKENS
from scale_rae.prompt import IMAGE, ChatTokenizer
from scale_rae.shapes import world
from scale_rae.shapes.world import Scene, SceneBatch

CHUNK = 10_000
DRAW_KINDS = (
    *("single_object",) * 1,
    *("colors",) * 2,
    *("counting",) * 3,
    *("two_object",) * 3,
    *("position",) * 4,
    *("color_attr",) * 4,
    *("mixed",) * 12,
)
"""Kinds of scene that are drawn, weighted: the hard ones more."""
DEFAULT_WORDING = "Can you generate {prompt}"
DEFAULT_WORDING_SHARE = 0.3  # the scaling experiment's prefix

Ids = NDArray[np.int16]
_PIECES = re.compile(r" ?[A-Za-z]+|\n|[^A-Za-z\s]")


class WordEncoder:
    """The tokenizer as a table of the world's words: quick, and small enough to send to workers.

    Raises KeyError for a text with anything else in it.
    """

    def __init__(self, tokenizer: ChatTokenizer, words: Iterable[str], pad: int) -> None:
        self.table = {word: tokenizer.plain(word) for word in [*words, *".,:?!", "\n"]}
        # What stands around a message in the chat layout, without and with an image before the text.
        probe = "Hello"
        mark = tokenizer.plain(probe)
        plain, image = tokenizer.chat(probe), tokenizer.chat(probe, image=True)
        at, place = _find(plain, mark), image.index(IMAGE)
        self.head, self.tail = plain[:at], plain[at + len(mark) :]
        self.image_head = image[:place]
        self.image_between = image[place + 1 : _find(image, mark)]
        self.start, self.end, self.pad = tokenizer.image_start, tokenizer.chat_end, pad
        self.reply = [*self(world.REPLY), self.start]

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text made of the world's words."""
        return [i for piece in _PIECES.findall(text) for i in self.table[piece]]

    def request(self, message: str) -> list[int]:
        """A request for a picture and the reply to it, up to and with <im_start>."""
        return [*self.head, *self(message), *self.tail, *self.reply]

    def chat(self, message: str, answer: str) -> tuple[list[int], int]:
        """A text-only turn and its answer with <|im_end|>, and the answer's first place."""
        before = [*self.head, *self(message), *self.tail]
        return [*before, *self(answer), self.end], len(before)

    def question(self, question: str, answer: str) -> tuple[list[int], int]:
        """What follows the image of a question about it, with the answer and <|im_end|>, and the answer's first place."""
        before = [*self.image_between, *self(question), *self.tail]
        return [*before, *self(answer), self.end], len(before)


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    return next(i for i in range(len(ids)) if list(ids[i : i + len(part)]) == list(part))


@dataclass(frozen=True)
class Texts:
    """N token sequences, padded on the right."""

    ids: Ids
    """[N, W]."""
    length: NDArray[np.int16]
    """[N], tokens that are not padding."""
    answer: NDArray[np.int16]
    """[N], place of the first token that is learnt (0 where nothing is)."""

    def __len__(self) -> int:
        return len(self.ids)


def as_texts(sequences: Sequence[tuple[list[int], int]], pad: int) -> Texts:
    """Pads (ids, answer place) to the longest."""
    width = max(len(ids) for ids, _ in sequences)
    return Texts(
        np.array([ids + [pad] * (width - len(ids)) for ids, _ in sequences], dtype=np.int16),
        np.array([len(ids) for ids, _ in sequences], dtype=np.int16),
        np.array([answer for _, answer in sequences], dtype=np.int16),
    )


def captions(encoder: WordEncoder, scenes: Iterable[Scene]) -> Ids:
    """Descriptions of scenes as SigLIP's text tower reads them: [N, CAPTION_TOKENS], padded on the right."""
    rows = [encoder(world.describe(scene)) for scene in scenes]
    return np.array([row + [encoder.pad] * (CAPTION_TOKENS - len(row)) for row in rows], dtype=np.int16)


NAMED_COLOR = 0.6  # how often a mixed scene's prompt names an object's colour

ATTRIBUTES = (*(len(world.SHAPES) + 1,) * world.MAX_OBJECTS, *(len(world.COLORS) + 1,) * world.MAX_OBJECTS, 5, 4)
"""What a prompt says, taken apart: shapes and colours in the order it names them, the relation, the number of things; how many
values each has, the last of a shape, colour or relation being "none"."""


def prompt_of(rng: random.Random, scene: Scene) -> tuple[str, tuple[int, ...]]:
    """A prompt for the scene ("a photo of …") and the class numbers of what it says, in the order of `ATTRIBUTES`.

    It is of the kind that the scene was sampled for. A mixed scene's prompt names every object, in any order, and some of
    their colours: conditions of that many combinations cannot be learnt one by one, as 25 pairs of shapes can, so that the
    model has to learn what the words mean each for itself, and gets pairs right that it never saw.
    """
    if scene.kind == "mixed":
        things = rng.sample(scene.objects, len(scene.objects))
        colors = [thing.color if rng.random() < NAMED_COLOR else "" for thing in things]
        shapes = [thing.shape for thing in things]
        names = [world.with_article(f"{color} {shape}".strip()) for color, shape in zip(colors, shapes, strict=True)]
        return f"a photo of {world.listed(names)}", _classes(shapes, colors, "", len(things))
    prompt = next(prompt for prompt in world.true_prompts(scene) if prompt.tag == scene.kind)
    return prompt.text, _classes(prompt.shapes, prompt.colors, prompt.relation, len(scene.objects))


def _classes(shapes: Sequence[str], colors: Sequence[str], relation: str, number: int) -> tuple[int, ...]:
    none_shape, none_color = len(world.SHAPES), len(world.COLORS)
    shape = [*map(world.SHAPES.index, shapes), *(none_shape,) * world.MAX_OBJECTS][: world.MAX_OBJECTS]
    color = [none_color if not name else world.COLORS.index(name) for name in colors]
    color = [*color, *(none_color,) * world.MAX_OBJECTS][: world.MAX_OBJECTS]
    return *shape, *color, world.RELATIONS.index(relation) if relation else len(world.RELATIONS), number - 1


def _wording(rng: random.Random) -> str:
    return DEFAULT_WORDING if rng.random() < DEFAULT_WORDING_SHARE else rng.choice(world.REQUEST_WORDINGS)


def chats(encoder: WordEncoder) -> Texts:
    """All small talk with its answer."""
    return as_texts([encoder.chat(message, world.CHAT_REPLY) for message in world.CHATS], encoder.pad)


Stream = Literal["encode", "draw", "read"]


@dataclass(frozen=True)
class Chunk:
    """Scenes with their texts; see `make` for which."""

    scenes: SceneBatch
    texts: Texts
    attributes: NDArray[np.int8]
    """[N, 10] of the prompts ("draw"), else [N, 0]."""


def make_chunk(
    number: int, count: int, stream: Stream, seed: int, kinds: tuple[str, ...], encoder: WordEncoder
) -> Chunk:
    """Chunk `number` of a stream: `count` scenes with captions, requests or questions."""
    code = ("encode", "draw", "read").index(stream)
    scenes = world.sample(np.random.default_rng([seed, code, number]), count, kinds, "exclude")
    rng = random.Random(f"{seed}/{stream}/{number}")
    listed = list(scenes)
    if stream == "encode":
        ids = captions(encoder, listed)
        texts = Texts(ids, np.full(count, CAPTION_TOKENS, np.int16), np.zeros(count, np.int16))
        return Chunk(scenes, texts, np.zeros((count, 0), np.int8))
    told = np.zeros((count, 0), np.int8)
    if stream == "draw":
        prompts = [prompt_of(rng, scene) for scene in listed]
        told = np.array([classes for _, classes in prompts], np.int8)
        sequences = [(encoder.request(world.request(_wording(rng), text)), 0) for text, _ in prompts]
    else:
        sequences = [encoder.question(question, answer) for question, answer in world.questions(rng, listed, "exclude")]
    return Chunk(scenes, as_texts(sequences, encoder.pad), told)


def make(stream: Stream, count: int, seed: int, encoder: WordEncoder, kinds: Sequence[str], workers: int = 0) -> Chunk:
    """`count` scenes with their texts: "encode" captions, "draw" requests and replies, "read" questions and answers.

    `workers` 0 picks one for each core but two; 1 works in this process.
    """
    workers = workers or max(1, len(os.sched_getaffinity(0)) - 2)
    work = functools.partial(make_chunk, stream=stream, seed=seed, kinds=tuple(kinds), encoder=encoder)
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    if workers == 1 or len(sizes) == 1:
        return _joined([work(number, size) for number, size in enumerate(sizes)], encoder.pad)
    with multiprocessing.get_context("fork").Pool(min(workers, len(sizes))) as pool:
        chunks = pool.starmap(_Call(work), enumerate(sizes), chunksize=1)
    return _joined(chunks, encoder.pad)


@dataclass(frozen=True)
class _Call:
    """starmap's arguments into a partial; a class, so that it pickles."""

    work: Callable[[int, int], Chunk]

    def __call__(self, number: int, size: int) -> Chunk:
        return self.work(number, size)


def _joined(chunks: Sequence[Chunk], pad: int) -> Chunk:
    width = max(chunk.texts.ids.shape[1] for chunk in chunks)
    ids = [np.pad(c.texts.ids, ((0, 0), (0, width - c.texts.ids.shape[1])), constant_values=pad) for c in chunks]
    scenes: dict[str, Any] = {
        f.name: np.concatenate([getattr(chunk.scenes, f.name) for chunk in chunks]) for f in fields(SceneBatch)
    }
    return Chunk(
        SceneBatch(**scenes),
        Texts(
            np.concatenate(ids),
            np.concatenate([chunk.texts.length for chunk in chunks]),
            np.concatenate([chunk.texts.answer for chunk in chunks]),
        ),
        np.concatenate([chunk.attributes for chunk in chunks]),
    )
