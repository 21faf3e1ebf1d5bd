"""Training data as arrays: scenes of the world, and their captions, requests and questions as token ids.

Worker processes make it in chunks. A chunk depends on (seed, stream, chunk number) alone, so the data is the same for any
number of workers. Nothing that training may not see is ever sampled: every scene comes from `world.sample(..., "exclude")`.
Workers are forked: make data before CUDA starts.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recipes.shapes import invented, spoilt
from recipes.shapes.invented import COLOR_NAMES, SHAPE_NAMES
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
READ_KINDS = (*world.SCENE_KINDS, "position", "position", "color_attr", "mixed", "mixed")
"""Kinds of scene that are read, weighted likewise."""
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


def captions(encoder: WordEncoder, texts: Iterable[str]) -> Ids:
    """Texts as SigLIP's text tower reads them: [N, CAPTION_TOKENS], padded on the right."""
    rows = [encoder(text) for text in texts]
    return np.array([row + [encoder.pad] * (CAPTION_TOKENS - len(row)) for row in rows], dtype=np.int16)


NAMED_COLOR = 0.6  # how often a mixed scene's prompt names an object's colour
INVENTED = 0.35  # how often a name in a quad of prompts is made up


ATTRIBUTES = (*(len(SHAPE_NAMES) + 1,) * world.MAX_OBJECTS, *(len(COLOR_NAMES) + 1,) * world.MAX_OBJECTS, 5, 4)
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
        return _said("mixed", [thing.shape for thing in things], colors)
    prompt = next(prompt for prompt in world.true_prompts(scene) if prompt.tag == scene.kind)
    return _said(scene.kind, prompt.shapes, prompt.colors, prompt.relation, prompt.number)


def _said(
    kind: str, shapes: Sequence[str], colors: Sequence[str], relation: str = "", number: int = 1
) -> tuple[str, tuple[int, ...]]:
    """A prompt of these names and its class numbers; of a mixed prompt, colours may be ""."""
    if kind == "mixed":
        names = [world.with_article(f"{color} {shape}".strip()) for color, shape in zip(colors, shapes, strict=True)]
        text = f"a photo of {world.listed(names)}"
    else:
        text = world.Prompt(kind, tuple(shapes), tuple(colors), relation, number).text
    return text, _classes(shapes, colors, relation, number if kind == "counting" else len(shapes))


QUAD_KINDS = tuple(kind for kind in DRAW_KINDS if kind != "single_object")


def quad(rng: random.Random) -> list[tuple[str, tuple[int, ...]]]:
    """Four prompts p, q, r, s with their class numbers, made of two prompts p and q of one form by exchanging some of their names: the
    conditions of p and q together should be those of r and s together.

    A share `INVENTED` of the names is made up (`NAMES`): nothing is drawn for these prompts. What a name means is learnt from
    pictures, of 25 pairs of shapes and 58 coloured shapes; that each name counts for itself is learnt here, of some 700 of either.
    Without it the language model learns which of the few go together, and that the held-out ones never do.
    """
    kind = rng.choice(QUAD_KINDS)
    count = {"colors": 1, "counting": 1, "mixed": rng.randrange(2, world.MAX_OBJECTS + 1)}.get(kind, 2)
    relation = rng.choice(world.RELATIONS) if kind == "position" else ""
    colored = [
        kind in ("colors", "color_attr") or (kind == "mixed" and rng.random() < NAMED_COLOR) for _ in range(count)
    ]
    made_up = 0 if kind == "counting" else INVENTED  # made-up names have no plural
    while True:
        # Shapes, then colours, of p and of q.
        names = [
            [[_name(rng, SHAPE_NAMES, len(world.SHAPES), made_up) for _ in range(count)] for _ in range(2)],
            [[_name(rng, COLOR_NAMES, len(world.COLORS), made_up) if has else "" for has in colored] for _ in range(2)],
        ]
        numbers = [rng.randrange(2, world.MAX_OBJECTS + 1) if kind == "counting" else 1 for _ in range(2)]
        swap = [[rng.random() < 0.5 for _ in range(count)] for _ in range(2)]
        exchanged = [
            [[row[side ^ flip][i] for i, flip in enumerate(flips)] for side in range(2)]
            for row, flips in zip(names, swap, strict=True)
        ]
        four = [(names[0][side], names[1][side], numbers[side]) for side in range(2)]
        four += [(exchanged[0][side], exchanged[1][side], numbers[side]) for side in range(2)]
        if (
            all(_has_form(kind, shapes, colors) for shapes, colors, _ in four)
            and not any(_is_held_out(*one) for one in four)
            and four[0] not in four[2:]
        ):
            break
    return [
        _said(kind, shapes, colors if kind == "mixed" else [color for color in colors if color], relation, number)
        for shapes, colors, number in four
    ]


def _name(rng: random.Random, names: Sequence[str], real: int, made_up: float) -> str:
    """One of the first `real` names, or one of the made-up others."""
    return names[rng.randrange(real, len(names)) if rng.random() < made_up else rng.randrange(real)]


def _has_form(kind: str, shapes: Sequence[str], colors: Sequence[str]) -> bool:
    """Whether a prompt of this kind may be made of these names: different ones where the kind wants it."""
    if kind in ("two_object", "position", "color_attr") and shapes[0] == shapes[1]:
        return False
    return kind != "color_attr" or colors[0] != colors[1]


def _is_held_out(shapes: Sequence[str], colors: Sequence[str], number: int) -> bool:
    things = [world.Object(shape, color, 0, 0, 0) for shape, color in zip(shapes, colors, strict=True)]
    return world.shows_held_out(things * number)


def _classes(shapes: Sequence[str], colors: Sequence[str], relation: str, number: int) -> tuple[int, ...]:
    none_shape, none_color = len(SHAPE_NAMES), len(COLOR_NAMES)
    shape = [*map(SHAPE_NAMES.index, shapes), *(none_shape,) * world.MAX_OBJECTS][: world.MAX_OBJECTS]
    color = [none_color if not name else COLOR_NAMES.index(name) for name in colors]
    color = [*color, *(none_color,) * world.MAX_OBJECTS][: world.MAX_OBJECTS]
    return *shape, *color, world.RELATIONS.index(relation) if relation else len(world.RELATIONS), number - 1


MATCHES = 6
"""Texts for each scene of the "match" stream: two true, four nearly so."""


def matches(rng: random.Random, scene: Scene) -> list[tuple[str, bool]]:
    """`MATCHES` texts for a scene and whether they describe it: its description and a prompt; the prompt with one attribute
    changed, twice; the description and a prompt of a scene with one object changed."""
    told = world.true_prompts(scene)
    prompt = rng.choice(told) if told else None
    other = altered(rng, scene)
    texts = [(world.describe(scene), True), (prompt.text if prompt else listing(rng, scene), True)]
    for _ in range(2):
        text = world.changed(rng, prompt).text if prompt else listing(rng, altered(rng, scene))
        texts.append((text, False))
    others = world.true_prompts(other)
    # Only prompts that name what was changed are false: the lists do, as descriptions do.
    text = next((p.text for p in others if p.tag == "color_attr"), None) or listing(rng, other)
    return [*texts, (world.describe(other), False), (text, False)]


def listing(rng: random.Random, scene: Scene) -> str:
    """A prompt that names every object with its colour, in any order."""
    things = rng.sample(scene.objects, len(scene.objects))
    return "a photo of " + world.listed([world.with_article(f"{thing.color} {thing.shape}") for thing in things])


def altered(
    rng: random.Random,
    scene: Scene,
    shapes: Sequence[str] = world.SHAPES,
    colors: Sequence[str] = world.COLORS,
) -> Scene:
    """The scene with another shape or another colour of one object, nothing held out."""
    while True:
        place = rng.randrange(len(scene.objects))
        old = scene.objects[place]
        if rng.random() < 0.5:
            new = old._replace(shape=rng.choice([shape for shape in shapes if shape != old.shape]))
        else:
            new = old._replace(color=rng.choice([color for color in colors if color != old.color]))
        objects = (*scene.objects[:place], new, *scene.objects[place + 1 :])
        if not world.shows_held_out(objects):
            return scene._replace(objects=objects)


def invented_question(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene that holds something invented, and its answer: its description, or whether a prompt describes it,
    namely one of a relation that is there or of that changed, or a list of what is there or of that with one thing changed."""
    if rng.random() < 0.4:
        return world.DESCRIBE, world.describe(scene)
    true = rng.random() < 0.5
    relation = next((prompt for prompt in world.true_prompts(scene) if prompt.tag == "position"), None)
    if relation and rng.random() < 0.6:
        told = (relation if true else world.changed(rng, relation)).text
    else:
        names = SHAPE_NAMES[: invented.forms()], COLOR_NAMES[: invented.hues()]
        told = listing(rng, scene if true else altered(rng, scene, *names))
    return world.ALIGN.format(prompt=told), world.YES if true else world.NO


def _asked_of_spoilt(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a prompt that is true but for the spoilt object describes the picture, and no."""
    told = world.true_prompts(scene)
    text = rng.choice(told).text if told else listing(rng, scene)
    return world.ALIGN.format(prompt=text), world.NO


REQUESTED = 0.15  # how often the prompt of an alignment question is worded as a request, as `t2i` has it


def as_asked_for(rng: random.Random, question: str) -> str:
    """The question; if it is whether a prompt describes the picture, at times with the request for that prompt in its place."""
    before, after = world.ALIGN.split("{prompt}")
    if not question.startswith(before) or rng.random() >= REQUESTED:
        return question
    told = question.removeprefix(before).removesuffix(after)
    return world.ALIGN.format(prompt=world.request(wording_of_request(rng), told))


def wording_of_request(rng: random.Random) -> str:
    return DEFAULT_WORDING if rng.random() < DEFAULT_WORDING_SHARE else rng.choice(world.REQUEST_WORDINGS)


def chats(encoder: WordEncoder) -> Texts:
    """All small talk with its answer."""
    return as_texts([encoder.chat(message, world.CHAT_REPLY) for message in world.CHATS], encoder.pad)


Stream = Literal["encode", "draw", "read", "name", "match"]


@dataclass(frozen=True)
class Chunk:
    """Scenes with their texts; see `make` for which."""

    scenes: SceneBatch
    texts: Texts
    attributes: NDArray[np.int8]
    """[N, 10] of the prompts ("draw", "name"); [N, MATCHES], 1 for true ("match"); else [N, 0]."""
    second: SceneBatch
    """The scenes, some with other colours ("read", "match"): their pictures are of both (`spoilt`), and no text is true of them."""


def make_chunk(
    number: int, count: int, stream: Stream, seed: int, kinds: tuple[str, ...], encoder: WordEncoder
) -> Chunk:
    """Chunk `number` of a stream: `count` scenes with captions, requests or questions."""
    code = ("encode", "draw", "read", "name", "match").index(stream)
    generator = np.random.default_rng([seed, code, number])
    scenes = world.sample(generator, count, kinds, "exclude")
    other = np.zeros(count, dtype=bool)
    if stream in ("draw", "read"):
        scenes, other = invented.put_in(generator, scenes)
    second = spoilt.recolored(generator, scenes, ~other) if stream in ("read", "match") else scenes
    ruined = spoilt.which(scenes, second)
    rng = random.Random(f"{seed}/{stream}/{number}")
    listed = invented.named(scenes)
    if stream == "encode":
        ids = captions(encoder, map(world.describe, listed))
        texts = Texts(ids, np.full(count, CAPTION_TOKENS, np.int16), np.zeros(count, np.int16))
        return Chunk(scenes, texts, np.zeros((count, 0), np.int8), second)
    told = np.zeros((count, 0), np.int8)
    if stream == "match":
        pairs = [matches(rng, scene) for scene in listed]
        ids = captions(encoder, (text for scene in pairs for text, _ in scene)).reshape(count, -1)
        texts = Texts(ids, np.full(count, ids.shape[1], np.int16), np.zeros(count, np.int16))
        truth = np.array([[true for _, true in scene] for scene in pairs], np.int8)
        return Chunk(scenes, texts, truth * ~ruined[:, None], second)
    if stream in ("draw", "name"):
        if stream == "draw":
            prompts = [prompt_of(rng, scene) for scene in listed]
        else:
            prompts = [prompt for _ in range(-(-count // 4)) for prompt in quad(rng)][:count]
        told = np.array([classes for _, classes in prompts], np.int8)
        wordings = [wording_of_request(rng) for _ in prompts]
        if stream == "name":
            wordings = [wordings[i - i % 4] for i in range(count)]  # one for each quad
        sequences = [
            (encoder.request(world.request(wording, text)), 0)
            for wording, (text, _) in zip(wordings, prompts, strict=True)
        ]
    else:
        real = [scene for scene, has in zip(listed, other, strict=True) if not has]
        asked = iter(world.questions(rng, real, "exclude"))
        turns = [
            invented_question(rng, scene) if has else next(asked) for scene, has in zip(listed, other, strict=True)
        ]
        turns = [
            _asked_of_spoilt(rng, scene) if bad else turn
            for scene, bad, turn in zip(listed, ruined, turns, strict=True)
        ]
        sequences = [encoder.question(as_asked_for(rng, question), answer) for question, answer in turns]
    return Chunk(scenes, as_texts(sequences, encoder.pad), told, second)


def make(stream: Stream, count: int, seed: int, encoder: WordEncoder, kinds: Sequence[str], workers: int = 0) -> Chunk:
    """`count` scenes with their texts: "encode" captions, "draw" requests and replies, "read" questions and answers,
    "name" requests in quads (`quad`), which no scene fits, "match" captions true and false, MATCHES in a row.

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


def joined_scenes(parts: Sequence[SceneBatch]) -> SceneBatch:
    """All scenes of the parts."""
    return SceneBatch(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(SceneBatch)))


def _joined(chunks: Sequence[Chunk], pad: int) -> Chunk:
    width = max(chunk.texts.ids.shape[1] for chunk in chunks)
    ids = [np.pad(c.texts.ids, ((0, 0), (0, width - c.texts.ids.shape[1])), constant_values=pad) for c in chunks]

    joined = joined_scenes([chunk.scenes for chunk in chunks])
    return Chunk(
        joined,
        Texts(
            np.concatenate(ids),
            np.concatenate([chunk.texts.length for chunk in chunks]),
            np.concatenate([chunk.texts.answer for chunk in chunks]),
        ),
        np.concatenate([chunk.attributes for chunk in chunks]),
        joined
        if all(chunk.second is chunk.scenes for chunk in chunks)
        else joined_scenes([chunk.second for chunk in chunks]),
    )
