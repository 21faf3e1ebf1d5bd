"""The world of shapes: its scenes, its prompts, questions and answers, and what is held out of training.

A scene is one to four objects on a pale background. Prompts are GenEval's six kinds and are meant strictly: they name everything
in the picture. A fixed tenth of the (colour, shape) pairs, shape pairs and (count, shape) pairs is held out of training.

Arrays are numpy, positions are pixels of a 128 x 128 picture with y downwards. Scenes come from a `numpy.random.Generator`, texts
from a `random.Random`, which is ten times quicker for single choices. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from scale_rae.prompt import DESCRIBE as DESCRIBE
from scale_rae.prompt import QUESTION

SIZE = 128
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
PALETTE: NDArray[np.float32] = np.array(
    [
        [0.88, 0.10, 0.12],
        [1.00, 0.53, 0.04],
        [0.97, 0.87, 0.10],
        [0.12, 0.64, 0.22],
        [0.06, 0.40, 0.92],
        [0.53, 0.14, 0.64],
        [1.00, 0.54, 0.76],
        [0.08, 0.08, 0.09],
    ],
    dtype=np.float32,
)
"""RGB of `COLORS`, 0..1, [8, 3]; every object adds its own jitter of at most `JITTER` a channel."""
JITTER = 0.04

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's kinds of prompt."""
SCENE_KINDS = (*KINDS, "mixed")
"""What `sample` can make: a scene for each kind of prompt, or two to four arbitrary objects."""
RELATIONS = ("left of", "right of", "above", "below")

HeldOut = Literal["only", "exclude", "any"]

HELD_OUT_COLOR_SHAPES = (
    ("red", "star"),
    ("orange", "square"),
    ("yellow", "ring"),
    ("green", "heart"),
    ("blue", "triangle"),
    ("purple", "cross"),
)
HELD_OUT_SHAPE_PAIRS = (("circle", "diamond"), ("triangle", "heart"), ("star", "ring"))
HELD_OUT_COUNTS = ((2, "heart"), (3, "diamond"), (4, "square"))

MARGIN = 2.0  # px between an object's circle and the frame
GAP = 4.0  # px between the circles of two objects
MAX_TILT = math.radians(15)  # beyond this a square could pass for a diamond
MIN_DX = 6.0  # px between any two centres in x: reading order (left to right) is never in doubt
CLEAR = 1.3  # a prompt names a relation only if its axis dominates the other axis by this factor
RADIUS: NDArray[np.float32] = np.array([[0, 0], [18, 36], [17, 27], [15, 22], [14, 19]], dtype=np.float32)
"""Least and greatest radius, px, by number of objects."""

_COLOR_SHAPE_SET = frozenset(HELD_OUT_COLOR_SHAPES)
_SHAPE_PAIR_SET = frozenset(HELD_OUT_SHAPE_PAIRS) | {(b, a) for a, b in HELD_OUT_SHAPE_PAIRS}
_COUNT_SET = frozenset(HELD_OUT_COUNTS)
_PAIR_I, _PAIR_J = np.triu_indices(MAX_OBJECTS, 1)


# Scenes -----------------------------------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """One object: its names, and its centre and radius in px."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """A scene: the kind it was sampled for (one of `SCENE_KINDS`) and its objects, in no spatial order."""

    kind: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class SceneBatch:
    """N scenes as arrays; `batch[i]` is a `Scene`, `batch[slice or index array]` a smaller batch, iteration gives scenes."""

    kind: NDArray[np.int8]
    """[N], index into SCENE_KINDS."""
    shape: NDArray[np.int8]
    """[N, 4], index into SHAPES, -1 for no object; objects fill the first places."""
    color: NDArray[np.int8]
    """[N, 4], index into COLORS, -1 for no object."""
    center: NDArray[np.float32]
    """[N, 4, 2], x and y in px."""
    radius: NDArray[np.float32]
    """[N, 4], px: every shape lies within this circle (the square's corners stand out by 2 %)."""
    tilt: NDArray[np.float32]
    """[N, 4], radians, clockwise on the screen."""
    rgb: NDArray[np.float32]
    """[N, 4, 3], 0..1."""
    back: NDArray[np.float32]
    """[N, 2, 3], the background's two tints, 0..1; equal where it is plain."""
    back_angle: NDArray[np.float32]
    """[N], radians: the direction in which the background runs from the first tint to the second."""

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice | NDArray[Any]) -> SceneBatch: ...
    def __getitem__(self, index: int | slice | NDArray[Any]) -> Scene | SceneBatch:
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"scene {index} of {len(self)}")
            return next(iter(self[np.array([index])]))
        return SceneBatch(*(getattr(self, field.name)[index] for field in fields(self)))

    def __iter__(self) -> Iterator[Scene]:
        return self.named(SHAPES, COLORS)

    def named(self, shapes: Sequence[str], colors: Sequence[str]) -> Iterator[Scene]:
        """The scenes with these names instead of SHAPES and COLORS. Longer lists also name invented shapes and colours."""
        columns = (self.kind, self.shape, self.color, self.center, self.radius)
        for kind, shape, color, center, radius in zip(*(column.tolist() for column in columns), strict=True):
            yield Scene(
                SCENE_KINDS[kind],
                tuple(
                    Object(shapes[s], colors[c], x, y, r)
                    for s, c, (x, y), r in zip(shape, color, center, radius, strict=True)
                    if s >= 0
                ),
            )


def sample(rng: np.random.Generator, n: int, kinds: Sequence[str] = KINDS, held_out: HeldOut = "exclude") -> SceneBatch:
    """n random scenes, each of a kind chosen evenly from `kinds`; repeat a kind to choose it more often.

    held_out: "exclude" (training) gives no scene that shows a held-out pair. "only" gives scenes with a held-out pair of their
    kind: (colour, shape) for colors and color_attr, a shape pair for two_object and position, (count, shape) for counting, any of
    them for mixed; single_object has none. "any" gives all scenes.
    Raises ValueError for an unknown kind or held_out, or no kinds.
    """
    if not kinds or not set(kinds) <= set(SCENE_KINDS):
        raise ValueError(f"kinds {list(kinds)}: choose from {list(SCENE_KINDS)}")
    _check_held_out(held_out)
    numbers = np.array([SCENE_KINDS.index(kind) for kind in kinds], dtype=np.int8)
    kind = numbers[rng.integers(0, len(numbers), n)]
    shape, color = np.empty((2, n, MAX_OBJECTS), dtype=np.int8)
    todo = np.arange(n)
    while todo.size:
        shape[todo], color[todo], wanted = _contents(rng, kind[todo], held_out)
        todo = todo[~wanted]
    center, radius = _places(rng, (shape >= 0).sum(1), kind == SCENE_KINDS.index("position"))
    rgb = tints(rng, color)
    # Pale and nearly grey, so that no background can be taken for yellow or pink; a third is plain.
    back = rng.uniform(0.87, 1.0, (n, 2, 1)) - rng.uniform(0.0, 0.06, (n, 2, 3))
    back[:, 1] = np.where(rng.random((n, 1)) < 1 / 3, back[:, 0], back[:, 1])
    return SceneBatch(
        kind=kind,
        shape=shape,
        color=color,
        center=center,
        radius=radius,
        tilt=rng.uniform(-MAX_TILT, MAX_TILT, (n, MAX_OBJECTS)).astype(np.float32),
        rgb=rgb,
        back=back.astype(np.float32),
        back_angle=rng.uniform(0, 2 * math.pi, n).astype(np.float32),
    )


def _check_held_out(held_out: str) -> None:
    if held_out not in ("exclude", "only", "any"):
        raise ValueError(f'held_out {held_out!r}: choose "exclude", "only" or "any"')


def _contents(
    rng: np.random.Generator, kind: NDArray[np.int8], held_out: HeldOut
) -> tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.bool_]]:
    """One attempt at shapes [N, 4] and colours [N, 4] for scenes of these kinds [N]; and which [N] are usable."""
    n = len(kind)
    of = {name: kind == number for number, name in enumerate(SCENE_KINDS)}
    pair = of["two_object"] | of["position"] | of["color_attr"]
    count = np.where(of["counting"] | of["mixed"], rng.integers(2, MAX_OBJECTS + 1, n), np.where(pair, 2, 1))
    shape = rng.integers(0, len(SHAPES), (n, MAX_OBJECTS), dtype=np.int8)
    color = rng.integers(0, len(COLORS), (n, MAX_OBJECTS), dtype=np.int8)
    shape[:, 1] = np.where(pair, (shape[:, 0] + rng.integers(1, len(SHAPES), n)) % len(SHAPES), shape[:, 1])
    shape = np.where(of["counting"][:, None], shape[:, :1], shape)
    if held_out == "exclude":
        # A shape has one held-out colour at most, so one step away is enough; refusing the scene would make shapes unequally
        # frequent in counting.
        step = rng.integers(1, len(COLORS), (n, MAX_OBJECTS), dtype=np.int8)
        color = np.where(is_color_shape(color, shape), (color + step) % len(COLORS), color)
    absent = np.arange(MAX_OBJECTS) >= count[:, None]
    shape[absent] = -1
    color[absent] = -1

    has_color_shape = is_color_shape(color, shape).any(1)
    number = (shape[:, :, None] == np.arange(len(SHAPES))).sum(1)  # [N, 8]
    index = SHAPES.index
    has_pair = np.any([(number[:, index(a)] > 0) & (number[:, index(b)] > 0) for a, b in HELD_OUT_SHAPE_PAIRS], axis=0)
    has_count = np.any([number[:, index(s)] == c for c, s in HELD_OUT_COUNTS], axis=0)
    held = has_color_shape | has_pair | has_count
    wanted = ~(of["color_attr"] & (color[:, 0] == color[:, 1]))
    if held_out == "exclude":
        wanted &= ~held
    elif held_out == "only":
        wanted &= np.select(
            [of["single_object"], of["counting"], of["colors"] | of["color_attr"], of["mixed"]],
            [np.ones(n, dtype=bool), has_count, has_color_shape, held],
            has_pair,
        )
    return shape, color, wanted


def tints(
    rng: np.random.Generator, color: NDArray[np.integer], palette: NDArray[np.float32] = PALETTE
) -> NDArray[np.float32]:
    """RGB [..., 3] in 0..1 of objects whose colours [...] are rows of `palette`, each with a small random deviation."""
    rgb: NDArray[np.float32] = palette[color] + rng.uniform(-JITTER, JITTER, (*color.shape, 3)).astype(np.float32)
    return rgb.clip(0, 1)


def is_color_shape(color: NDArray[np.int8], shape: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which objects are held-out (colour, shape) pairs; same shape as the arguments."""
    held = [(color == COLORS.index(c)) & (shape == SHAPES.index(s)) for c, s in HELD_OUT_COLOR_SHAPES]
    return np.any(held, axis=0)


def _places(
    rng: np.random.Generator, count: NDArray[np.int_], clear: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Centres [N, 4, 2] and radii [N, 4] of `count` [N] objects that keep their distance.

    In scenes with `clear` [N], the two objects stand clearly beside or above one another.
    """
    n = len(count)
    low, high = RADIUS[count].T[:, :, None]
    radius = (low + (high - low) * rng.random((n, MAX_OBJECTS), dtype=np.float32)).astype(np.float32)
    center = np.empty((n, MAX_OBJECTS, 2), dtype=np.float32)
    todo = np.arange(n)
    while todo.size:  # radii stay, so that large objects do not become rare because they are harder to place
        edge = (radius[todo] + MARGIN)[:, :, None]
        tried = edge + (SIZE - 2 * edge) * rng.random((todo.size, MAX_OBJECTS, 2), dtype=np.float32)
        center[todo] = tried
        dx, dy = np.moveaxis(np.abs(tried[:, _PAIR_I] - tried[:, _PAIR_J]), 2, 0)  # [n, 6] each
        least = radius[todo][:, _PAIR_I] + radius[todo][:, _PAIR_J] + GAP
        absent = count[todo, None] <= _PAIR_J
        fits = (((dx**2 + dy**2 >= least**2) & (dx >= MIN_DX)) | absent).all(1)
        fits &= ~clear[todo] | (np.maximum(dx, dy)[:, 0] >= CLEAR * np.minimum(dx, dy)[:, 0])
        todo = todo[~fits]
    return center, radius


def shows_held_out(objects: Sequence[Object]) -> bool:
    """Whether training may not show these objects together: a held-out (colour, shape), shape pair or (count, shape)."""
    number = Counter(thing.shape for thing in objects)
    return (
        not _COLOR_SHAPE_SET.isdisjoint((thing.color, thing.shape) for thing in objects)
        or any(number[a] and number[b] for a, b in HELD_OUT_SHAPE_PAIRS)
        or not _COUNT_SET.isdisjoint((count, shape) for shape, count in number.items())
    )


# Prompts ----------------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A prompt of one of the six kinds, as its parts."""

    tag: str
    shapes: tuple[str, ...]
    """One shape, or two different ones. A position is relative to the first."""
    colors: tuple[str, ...] = ()
    """One per shape, if the kind names colours."""
    relation: str = ""
    """Where the second shape is, seen from the first (position only)."""
    number: int = 1
    """How many objects per shape; more than one only for counting."""

    @property
    def text(self) -> str:
        """ "a photo of …", without a full stop."""
        if self.tag == "counting":
            return f"a photo of {NUMBERS[self.number]} {plural(self.shapes[0])}"
        if self.tag == "position":
            return f"a photo of a {self.shapes[1]} {self.relation} a {self.shapes[0]}"
        names = [f"{c} {s}" for c, s in zip(self.colors, self.shapes, strict=True)] if self.colors else self.shapes
        return "a photo of " + " and ".join(map(with_article, names))

    @property
    def is_held_out(self) -> bool:
        """Whether the prompt names a held-out (colour, shape), shape pair or (count, shape), so training may not use it."""
        return (
            self.shapes in _SHAPE_PAIR_SET
            or (self.number, self.shapes[0]) in _COUNT_SET
            or self.names_held_out_color_shape
        )

    @property
    def names_held_out_color_shape(self) -> bool:
        """Whether the prompt names a held-out (colour, shape) pair."""
        return not _COLOR_SHAPE_SET.isdisjoint(zip(self.colors, self.shapes, strict=False))

    def metadata(self) -> dict[str, Any]:
        """The line of GenEval's evaluation_metadata.jsonl: tag, include (and exclude for counting), prompt."""
        include: list[dict[str, Any]] = [{"class": shape, "count": self.number} for shape in self.shapes]
        for entry, color in zip(include, self.colors, strict=False):
            entry["color"] = color
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        line: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            line["exclude"] = [{"class": self.shapes[0], "count": self.number + 1}]
        return line | {"prompt": self.text}


NUMBERS = ("none", "one", "two", "three", "four")


def with_article(words: str) -> str:
    """ "red circle" -> "a red circle", "orange ring" -> "an orange ring"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(shape: str) -> str:
    """ "star" -> "stars", "cross" -> "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


class Seen(Protocol):
    """Anything with a shape, a colour and a place (px, y downwards): an `Object`, or what the judge found."""

    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


def relation(second: Seen, first: Seen) -> str:
    """Where `second` is, seen from `first`: one of `RELATIONS`, by the axis along which they are farther apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _is_clear(a: Seen, b: Seen) -> bool:
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return max(dx, dy) >= CLEAR * min(dx, dy)


def mismatches(metadata: dict[str, Any], objects: Sequence[Seen]) -> list[str]:
    """Why `metadata` (GenEval's form) is not the whole truth about `objects`; empty when it is.

    This is strict: each included class must have its exact number, colours and (if given) position, and nothing else may be there.
    """
    include = metadata["include"]
    expected: Counter[str] = Counter()
    for entry in include:
        expected[entry["class"]] += entry["count"]
    found = Counter(thing.shape for thing in objects)
    reasons = []
    for shape, count in expected.items():
        if found[shape] < count:
            reasons.append(f"expected {shape}>={count}, found {found[shape]}")
        elif found[shape] > count:
            reasons.append(f"expected {shape}<{count + 1}, found {found[shape]}")
    reasons += [f"expected no {shape}, found {count}" for shape, count in found.items() if shape not in expected]
    for entry in include:
        things = [thing for thing in objects if thing.shape == entry["class"]]
        if "color" in entry and things:
            colors = Counter(thing.color for thing in things)
            if colors[entry["color"]] < entry["count"]:
                seen = ", ".join(f"{count} {color}" for color, count in colors.items())
                reasons.append(f"expected {entry['color']} {entry['class']}>={entry['count']}, found {seen}")
        if "position" in entry:
            wanted, target = entry["position"][0], include[entry["position"][1]]["class"]
            for second, first in itertools.product(things, (thing for thing in objects if thing.shape == target)):
                if relation(second, first) != wanted:
                    place = relation(second, first)
                    reasons.append(f"expected {entry['class']} {wanted} {target}, found {place}")
    return reasons


def true_prompts(scene: Scene) -> list[Prompt]:
    """Every prompt that describes the scene, one per kind; things are named in the order of `scene.objects`.

    Empty for three or more objects of different shapes. Relations are only named if they are clear (`CLEAR`).
    """
    objects = scene.objects
    shapes = tuple(thing.shape for thing in objects)
    if len(objects) == 1:
        return [Prompt("single_object", shapes), Prompt("colors", shapes, (objects[0].color,))]
    if len(set(shapes)) == 1:
        return [Prompt("counting", shapes[:1], number=len(shapes))]
    if len(objects) > 2:
        return []
    first, second = objects
    found = [Prompt("two_object", shapes)]
    if first.color != second.color:
        found.append(Prompt("color_attr", shapes, (first.color, second.color)))
    if _is_clear(first, second):
        found.append(Prompt("position", shapes, relation=relation(second, first)))
    return found


def metadata(scene: Scene) -> dict[str, Any]:
    """GenEval's metadata for the prompt the scene was sampled for. Raises ValueError for a mixed scene, which has none."""
    for prompt in true_prompts(scene):
        if prompt.tag == scene.kind:
            return prompt.metadata()
    raise ValueError(f"no prompt of kind {scene.kind} describes this scene")


def changed(rng: random.Random, prompt: Prompt, held_out: Literal["exclude", "any"] = "exclude") -> Prompt:
    """The prompt with one attribute changed, so that it is false of every scene of which the prompt is true.

    The change is a shape, a colour, the count or the relation, or swaps two objects' colours or places. With "exclude", the
    result names nothing held out. Raises ValueError if the prompt itself does, since one change may not suffice.
    """
    if held_out == "exclude" and prompt.is_held_out:
        raise ValueError(f'"{prompt.text}" is held out of training: pass held_out="any"')
    while True:
        other = _change(rng, prompt)
        if held_out == "any" or not other.is_held_out:
            return other


def _change(rng: random.Random, prompt: Prompt) -> Prompt:
    tag, shapes, colors = prompt.tag, prompt.shapes, prompt.colors
    what = rng.choice(_CHANGES[tag])
    place = rng.randrange(len(shapes))
    if what == "shape":
        new = rng.choice([shape for shape in SHAPES if shape not in shapes])
        return prompt._replace(shapes=(*shapes[:place], new, *shapes[place + 1 :]))
    if what == "color":
        new = rng.choice([color for color in COLORS if color not in colors])
        return prompt._replace(colors=(*colors[:place], new, *colors[place + 1 :]))
    if what == "count":
        return prompt._replace(number=rng.choice([n for n in range(2, MAX_OBJECTS + 1) if n != prompt.number]))
    if what == "relation":
        return prompt._replace(relation=rng.choice([name for name in RELATIONS if name != prompt.relation]))
    return prompt._replace(colors=colors[::-1]) if tag == "color_attr" else prompt._replace(shapes=shapes[::-1])


_CHANGES = {
    "single_object": ("shape",),
    "two_object": ("shape",),
    "counting": ("count", "shape"),
    "colors": ("color", "shape"),
    "position": ("relation", "swap", "shape"),
    "color_attr": ("color", "swap", "shape"),
}


def prompts(n_per_kind: int, held_out: HeldOut = "only", seed: int = 0) -> list[dict[str, Any]]:
    """Metadata of n_per_kind prompts of each kind for evaluation, with "index" 0, 1, …, the same for the same arguments.

    A kind's distinct prompts come in random order, and repeat only when all were used (there are only 8 single_object prompts), so
    give every index its own seed. held_out is as in `sample`. Raises ValueError for an unknown held_out.
    """
    _check_held_out(held_out)
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for kind in KINDS:
        choices = _all_prompts(kind)
        if held_out == "exclude":
            choices = [prompt for prompt in choices if not prompt.is_held_out]
        elif held_out == "only" and kind == "color_attr":  # the (colour, shape) pair is what its kind is about
            choices = [prompt for prompt in choices if prompt.names_held_out_color_shape]
        elif held_out == "only" and kind != "single_object":
            choices = [prompt for prompt in choices if prompt.is_held_out]
        rng.shuffle(choices)
        for prompt in itertools.islice(itertools.cycle(choices), n_per_kind):
            lines.append(prompt.metadata() | {"index": len(lines)})
    return lines


def _all_prompts(kind: str) -> list[Prompt]:
    pairs = list(itertools.permutations(SHAPES, 2))
    match kind:
        case "single_object":
            return [Prompt(kind, (shape,)) for shape in SHAPES]
        case "two_object":
            return [Prompt(kind, pair) for pair in pairs]
        case "counting":
            return [Prompt(kind, (shape,), number=n) for shape in SHAPES for n in range(2, MAX_OBJECTS + 1)]
        case "colors":
            return [Prompt(kind, (shape,), (color,)) for shape in SHAPES for color in COLORS]
        case "position":
            return [Prompt(kind, pair, relation=name) for pair in pairs for name in RELATIONS]
        case _:
            return [Prompt(kind, pair, colors) for pair in pairs for colors in itertools.permutations(COLORS, 2)]


# Requests and chat ------------------------------------------------------------------------------------------------------------

REQUEST_WORDINGS = (
    "{prompt}",
    "Can you generate {prompt}",
    "Can you generate {prompt}?",
    "Can you create {prompt}?",
    "Can you give me {prompt}?",
    "Can you show me {prompt}?",
    "Can you draw {things}?",
    "Can you create an image of {things}?",
    "Can you generate an image of {things}?",
    "I want {prompt}",
    "I want {prompt}.",
    "I want a picture of {things}.",
    "Show me {prompt}",
    "Show me {prompt}.",
    "Show me {things}.",
    "Give me an image of {things}.",
    "Generate {prompt}.",
    "Please draw {things}.",
)
"""Requests for a picture: {prompt} is "a photo of …", {things} what follows "a photo of"."""
HELD_OUT_WORDINGS = ("Could you make {prompt}?", "I would like {prompt}.", "Please create a picture of {things}.")
"""Never used in training."""
REPLY = "Sure, here it is:"
"""The reply before a picture."""

CHATS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi there",
    "Hey!",
    "Good morning",
    "How are you?",
    "Thank you",
    "Thanks!",
    "Goodbye",
    "Who are you?",
    "What are you?",
    "What is your name?",
    "What can you do?",
    "Who made you?",
    "Can you help me?",
    "Tell me a joke.",
    "Tell me a story.",
    "Write a poem.",
    "What time is it?",
    "What day is it today?",
    "What is the weather like?",
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What is two and two?",
    "How old are you?",
    "Why is the sky blue?",
    "Do you like music?",
)
CHAT_REPLY = "I only draw and read pictures of shapes."
"""The answer to everything in `CHATS`."""
OUTSIDE_REPLY = "I only draw up to four simple shapes, for example a photo of a red circle."
"""The answer to a request for what the world does not have. Its words are not in `vocabulary`: the tokenizer spells them."""
NO_PICTURE = "There is no picture to look at."
"""The answer to a question about a picture where none is shown."""


def request(wording: str, prompt: str) -> str:
    """Put a prompt ("a photo of …") into one of the wordings."""
    return wording.format(prompt=prompt, things=prompt.removeprefix("a photo of "))


# Reading ----------------------------------------------------------------------------------------------------------------------

ALIGN = QUESTION
YES, NO = "Yes.", "No."
OTHER_NUMBER = 0.15
"""Share of alignment questions, on scenes that some prompt describes, whose prompt names more or fewer objects than there are."""

_DESCRIBED = re.compile(rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def describe(scene: Scene) -> str:
    """Everything in the picture, left to right by x centre: "a photo of a red circle, a blue star and a black ring."

    It begins like a prompt, so that a prompt's likelihood as an answer (`prompt_loss`) is meaningful.
    """
    names = [with_article(f"{t.color} {t.shape}") for t in sorted(scene.objects, key=lambda thing: thing.x)]
    return "a photo of " + listed(names) + "."


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them: "a, b and c"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def parse_description(text: str) -> list[tuple[str, str]] | None:
    """The (colour, shape) pairs of a description in order, or None. "a photo of" and the full stop may be missing."""
    body = text.strip().removesuffix(".").removeprefix("a photo of ")
    matches = [_DESCRIBED.fullmatch(part) for part in re.split(r", | and ", body)]
    pairs = [(match[1], match[2]) for match in matches if match]
    whole = listed([with_article(f"{color} {shape}") for color, shape in pairs]) if pairs else None
    return pairs if whole == body else None


def alignments(
    rng: random.Random, scenes: Sequence[Scene], held_out: Literal["exclude", "any"] = "exclude"
) -> list[tuple[Prompt, bool]]:
    """A prompt for each scene, and whether it describes the scene.

    For each kind of prompt, half of the prompts are true, as nearly as the scenes allow; pass several hundred scenes at once. A
    false prompt is a true one with one attribute changed, or names fewer or more objects than there are. With "exclude", no prompt
    names anything held out; raises ValueError if the scenes were not sampled that way.
    """
    chosen: list[tuple[Prompt, bool]] = []
    other_number: Counter[str] = Counter()
    free: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for place, scene in enumerate(scenes):
        true = true_prompts(scene)
        if not true or rng.random() < OTHER_NUMBER:
            chosen.append((_other_number(rng, scene, held_out), False))
            other_number[chosen[-1][0].tag] += 1
        else:
            chosen.append((rng.choice(true), True))
            free[chosen[-1][0].tag].append(place)
    for kind, places in free.items():
        total = len(places) + other_number[kind]
        false = max(0, math.floor(total / 2 + rng.random()) - other_number[kind])
        for place in rng.sample(places, min(false, len(places))):
            chosen[place] = (changed(rng, chosen[place][0], held_out), False)
    return chosen


def _other_number(rng: random.Random, scene: Scene, held_out: Literal["exclude", "any"]) -> Prompt:
    """A prompt that names only some of the scene's objects, or a single object and objects that are not there."""
    objects = scene.objects
    while True:
        if len(objects) > 1:
            imagined = tuple(rng.sample(objects, rng.randrange(1, len(objects))))
        else:
            extra = Object(rng.choice(SHAPES), rng.choice(COLORS), rng.uniform(0, SIZE), rng.uniform(0, SIZE), 0.0)
            same = extra.shape == objects[0].shape
            imagined = (*rng.sample((objects[0], extra), 2), *(extra,) * (rng.randrange(3) if same else 0))
        true = [p for p in true_prompts(Scene("mixed", imagined)) if held_out == "any" or not p.is_held_out]
        if true:
            return rng.choice(true)


def questions(
    rng: random.Random, scenes: Sequence[Scene], held_out: Literal["exclude", "any"] = "exclude"
) -> list[tuple[str, str]]:
    """One (question, answer) per scene.

    45 % are about alignment (see `alignments`), 25 % ask for a description, 30 % are about colours, numbers and relations."""
    asked: list[tuple[str, str] | None] = [None] * len(scenes)
    aligning = []
    for place, scene in enumerate(scenes):
        which = rng.random()
        if which < 0.45:
            aligning.append(place)
        elif which < 0.70:
            asked[place] = (DESCRIBE, describe(scene))
        else:
            asked[place] = _detail(rng, scene)
    pairs = alignments(rng, [scenes[place] for place in aligning], held_out)
    for place, (prompt, true) in zip(aligning, pairs, strict=True):
        asked[place] = (ALIGN.format(prompt=prompt.text), YES if true else NO)
    return [pair for pair in asked if pair is not None]


def _detail(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about one colour, number or relation to which the scene has an answer."""
    objects = scene.objects
    shapes = [thing.shape for thing in objects]
    which = rng.randrange(4)
    if which == 0:
        alone = [thing for thing in objects if shapes.count(thing.shape) == 1]
        if alone:
            thing = rng.choice(alone)
            return f"What color is the {thing.shape}?", f"{thing.color.capitalize()}."
    elif which == 1 and len(objects) == 2 and shapes[0] != shapes[1] and _is_clear(*objects):
        second, first = rng.sample(objects, 2)
        name = with_article(f"{second.color} {second.shape}")
        return f"What is {relation(second, first)} the {first.shape}?", f"{name.capitalize()}."
    elif which == 2:
        return "How many objects are there?", f"{NUMBERS[len(objects)].capitalize()}."
    shape = rng.choice(shapes if rng.random() < 0.6 else SHAPES)
    return f"How many {plural(shape)} are there?", f"{NUMBERS[shapes.count(shape)].capitalize()}."


def vocabulary() -> list[str]:
    """Every word of the world's texts, sorted, case kept, without spaces or punctuation."""
    names = (*SHAPES, *map(plural, SHAPES), *COLORS, *NUMBERS, *RELATIONS, "a photo of an object", "and")
    answers = (*map(str.capitalize, COLORS + NUMBERS), "A", "An", YES, NO, REPLY, CHAT_REPLY)
    asked = (DESCRIBE, ALIGN, "What color is the", "What is left of", "How many objects are there")
    texts = (*names, *answers, *asked, *REQUEST_WORDINGS, *HELD_OUT_WORDINGS, *CHATS)
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", text))})
