"""Questions about scenes with their true answers, and the wordings and outside requests that only evaluation uses.

`question` makes a question of a kind as its parts and answer; a wording of that kind puts the parts into words, and `varied` changes
its case and final mark. Training has other wordings and other nouns (`recipes/shapes/wordings.py`): a test compares them.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scale_rae.shapes import world
from scale_rae.shapes.world import Object, Scene

ABSENT, NOTHING = "There is none.", "Nothing."
"""The answers to a question about an object that is not there, and about a place where nothing is."""


class Question(NamedTuple):
    """A question about a scene: its kind, what fills the places of a wording, and the true answer."""

    kind: str
    parts: dict[str, str]
    answer: str


def _yes(true: bool) -> str:
    return world.YES if true else world.NO


def _count(number: int) -> str:
    return f"{world.NUMBERS[number].capitalize()}."


def _sentence(names: Sequence[str]) -> str:
    return f"{world.listed(names).capitalize()}."


def _match(rng: random.Random, scene: Scene) -> Question | None:
    prompts = world.true_prompts(scene)
    if not prompts:
        return None
    prompt = rng.choice(prompts)
    true = rng.random() < 0.5
    asked = prompt if true else world.changed(rng, prompt, "any")
    return Question("match", {"prompt": asked.text}, _yes(true))


def _there(rng: random.Random, scene: Scene) -> Question:
    thing = rng.choice(scene.objects)
    shape, color, colored = thing.shape, thing.color, rng.random() < 0.7
    if rng.random() < 0.5:
        shape, color = rng.choice([(rng.choice(world.SHAPES), color), (shape, rng.choice(world.COLORS))])
    if not colored and rng.random() < 0.5:
        shape = rng.choice(world.SHAPES)
    there = any(t.shape == shape and (not colored or t.color == color) for t in scene.objects)
    return Question("there", {"thing": world.with_article(f"{color} {shape}" if colored else shape)}, _yes(there))


def _any(rng: random.Random, scene: Scene) -> Question:
    shape = rng.choice(scene.objects).shape if rng.random() < 0.4 else rng.choice(world.SHAPES)
    return Question("any", {"things": world.plural(shape)}, _yes(any(thing.shape == shape for thing in scene.objects)))


def _number(rng: random.Random, scene: Scene) -> Question:
    shapes = [thing.shape for thing in scene.objects]
    shape = rng.choice(shapes)
    number = shapes.count(shape) if rng.random() < 0.5 else rng.randrange(2, world.MAX_OBJECTS + 1)
    number = max(2, number)
    parts = {"number": world.NUMBERS[number], "things": world.plural(shape)}
    return Question("number", parts, _yes(shapes.count(shape) == number))


def _it_color(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) > 1:
        return None
    (thing,) = scene.objects
    color = thing.color if rng.random() < 0.5 else rng.choice(world.COLORS)
    return Question("it_color", {"color": color}, _yes(color == thing.color))


def _it_shape(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) > 1:
        return None
    (thing,) = scene.objects
    shape = thing.shape if rng.random() < 0.5 else rng.choice(world.SHAPES)
    return Question("it_shape", {"thing": world.with_article(shape)}, _yes(shape == thing.shape))


def _alone(rng: random.Random, scene: Scene) -> Object | None:
    """An object whose shape is there once."""
    shapes = [thing.shape for thing in scene.objects]
    alone = [thing for thing in scene.objects if shapes.count(thing.shape) == 1]
    return rng.choice(alone) if alone else None


def _color_is(rng: random.Random, scene: Scene) -> Question | None:
    thing = _alone(rng, scene)
    if thing is None:
        return None
    color = thing.color if rng.random() < 0.5 else rng.choice(world.COLORS)
    return Question("color_is", {"shape": thing.shape, "color": color}, _yes(color == thing.color))


def _describe(rng: random.Random, scene: Scene) -> Question:
    return Question("describe", {}, world.describe(scene))


def _left_to_right(scene: Scene) -> list[Object]:
    return sorted(scene.objects, key=lambda thing: thing.x)


def _which_shape(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) > 1:
        return None
    return Question("which_shape", {}, _sentence([world.with_article(scene.objects[0].shape)]))


def _which_shapes(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) == 1:
        return None
    return Question("which_shapes", {}, _sentence([world.with_article(t.shape) for t in _left_to_right(scene)]))


def _shape_of(rng: random.Random, scene: Scene) -> Question | None:
    color = rng.choice(scene.objects).color if rng.random() < 0.8 else rng.choice(world.COLORS)
    shapes = [thing.shape for thing in scene.objects if thing.color == color]
    if len(shapes) > 1:
        return None
    answer = _sentence([world.with_article(shapes[0])]) if shapes else ABSENT
    return Question("shape_of", {"color": color}, answer)


def _which_color(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) > 1:
        return None
    return Question("which_color", {}, _sentence([scene.objects[0].color]))


def _which_colors(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.objects) == 1:
        return None
    return Question("which_colors", {}, _sentence(list(dict.fromkeys(t.color for t in _left_to_right(scene)))))


def _color_of(rng: random.Random, scene: Scene) -> Question | None:
    thing = _alone(rng, scene)
    if thing is not None and rng.random() < 0.8:
        return Question("color_of", {"shape": thing.shape}, _sentence([thing.color]))
    there = {thing.shape for thing in scene.objects}
    return Question("color_of", {"shape": rng.choice([s for s in world.SHAPES if s not in there])}, ABSENT)


def _how_many(rng: random.Random, scene: Scene) -> Question:
    return Question("how_many", {}, _count(len(scene.objects)))


def _how_many_of(rng: random.Random, scene: Scene) -> Question:
    shapes = [thing.shape for thing in scene.objects]
    shape = rng.choice(shapes if rng.random() < 0.7 else world.SHAPES)
    return Question("how_many_of", {"things": world.plural(shape)}, _count(shapes.count(shape)))


def _pair(rng: random.Random, scene: Scene) -> tuple[Object, Object] | None:
    """The two objects of a scene in random order, if their shapes differ and one relation is clear."""
    if len(scene.objects) != 2:
        return None
    if not any(prompt.tag == "position" for prompt in world.true_prompts(scene)):
        return None
    second, first = rng.sample(scene.objects, 2)
    return second, first


def _beside(rng: random.Random, scene: Scene) -> Question | None:
    pair = _pair(rng, scene)
    if pair is None:
        return None
    second, first = pair
    there = world.relation(second, first)
    relation = there if rng.random() < 0.7 else rng.choice(world.RELATIONS)
    dx, dy = second.x - first.x, second.y - first.y
    # "What is above the star?" has no clear answer for an object that is left of the star and a little above it.
    along = abs(dy) if relation in ("above", "below") else abs(dx)
    if relation != there and along > 8 and relation == _sideways(dx, dy, relation):
        return None
    name = world.with_article(f"{second.color} {second.shape}")
    return Question(
        "beside",
        {"relation": relation, "shape": first.shape},
        f"{name.capitalize()}." if relation == there else NOTHING,
    )


def _sideways(dx: float, dy: float, relation: str) -> str:
    """The relation along the axis of `relation`."""
    if relation in ("above", "below"):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def _where(rng: random.Random, scene: Scene) -> Question | None:
    pair = _pair(rng, scene)
    if pair is None:
        return None
    second, first = pair
    return Question(
        "where", {"shape": second.shape}, f"{world.relation(second, first)} the {first.shape}.".capitalize()
    )


def _is_beside(rng: random.Random, scene: Scene) -> Question | None:
    pair = _pair(rng, scene)
    if pair is None:
        return None
    second, first = pair
    there = world.relation(second, first)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[there]
    relation = there if rng.random() < 0.5 else opposite
    parts = {"first": second.shape, "relation": relation, "second": first.shape}
    return Question("is_beside", parts, _yes(relation == there))


_MAKERS: Mapping[str, Callable[[random.Random, Scene], Question | None]] = {
    "match": _match,
    "there": _there,
    "any": _any,
    "number": _number,
    "it_color": _it_color,
    "it_shape": _it_shape,
    "color_is": _color_is,
    "describe": _describe,
    "which_shape": _which_shape,
    "which_shapes": _which_shapes,
    "shape_of": _shape_of,
    "which_color": _which_color,
    "which_colors": _which_colors,
    "color_of": _color_of,
    "how_many": _how_many,
    "how_many_of": _how_many_of,
    "beside": _beside,
    "where": _where,
    "is_beside": _is_beside,
}
KINDS = tuple(_MAKERS)
"""Kinds of question."""


def question(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """A question of this kind about a scene, None if the scene has no clear answer to any."""
    return _MAKERS[kind](rng, scene)


def names_held_out(text: str) -> bool:
    """Whether a text, in any case of letters, names a (colour, shape), count or pair of shapes that is held out."""
    text = text.lower()
    words = set(re.findall(r"[a-z]+", text))

    def has(shape: str) -> bool:
        return shape in words or world.plural(shape) in words

    return (
        any(f"{color} {shape}" in text for color, shape in world.HELD_OUT_COLOR_SHAPES)
        or any(
            re.search(rf"\b({number}|{world.NUMBERS[number]}) {world.plural(shape)}\b", text)
            for number, shape in world.HELD_OUT_COUNTS
        )
        or any(has(a) and has(b) for a, b in world.HELD_OUT_SHAPE_PAIRS)
    )


# Wordings ---------------------------------------------------------------------------------------------------------------------

IMAGE_WORDS = ("image", "picture", "photo", "drawing")
OBJECT_WORDS = ("object", "shape", "thing")


def worded(rng: random.Random, wording: str, parts: Mapping[str, str]) -> str:
    """A wording with its parts, and words of choice in the places {image}, {object} and {hue} ("color" or "colour")."""
    return wording.format(
        **parts,
        image=rng.choice(IMAGE_WORDS),
        object=rng.choice(OBJECT_WORDS),
        hue=rng.choice(("color", "color", "colour")),
    )


def varied(rng: random.Random, text: str, marks: Sequence[str] = ("", "?", ".", "!")) -> str:
    """The text as it is (two fifths), or in other letters (lower, upper, title case) and with another final mark or none."""
    if rng.random() < 0.4:
        return text
    text = rng.choice((str, str.lower, str.lower, str.upper, str.title, _small_first))(text)
    text = text.replace("'S", "'s")  # title case makes it a word of its own
    if rng.random() < 0.6:
        text = text.rstrip(".?!") + rng.choice(marks)
    return text


def _small_first(text: str) -> str:
    return text[:1].lower() + text[1:]


WORDINGS: Mapping[str, tuple[str, ...]] = {
    "match": (
        "Does this {image} match what I asked for: {prompt}?",
        "Is this {image} really {prompt}?",
        "I asked for {prompt}. Is that what this is?",
        "Would {prompt} be a correct description?",
        "Does the {image} agree with this prompt: {prompt}?",
        "Is it true that this shows {prompt}?",
    ),
    "there": (
        "Is there {thing} somewhere in this {image}?",
        "Can you spot {thing}?",
        "Do you notice {thing} anywhere?",
        "Does this {image} show {thing}?",
        "Is {thing} part of this {image}?",
        "Can {thing} be seen here?",
        "Is there {thing} in the {image} you see?",
    ),
    "any": (
        "Are there any {things} in what you see?",
        "Can you spot any {things}?",
        "Does the {image} show any {things}?",
        "Do any {things} appear?",
        "Are any {things} shown here?",
    ),
    "number": (
        "Are exactly {number} {things} shown?",
        "Can you count {number} {things}?",
        "Are there {number} {things} in the {image}?",
        "Do you notice {number} {things}?",
    ),
    "it_color": (
        "Is it colored {color}?",
        "Is the {object} shown here {color}?",
        "Does it have a {color} {hue}?",
        "Would you say it is {color}?",
        "Is the {object} you see {color}?",
    ),
    "it_shape": (
        "Is the {object} shown {thing}?",
        "Would you say this is {thing}?",
        "Is that {object} {thing}?",
        "Does this show {thing}?",
    ),
    "color_is": (
        "Is the {shape} you see {color}?",
        "Would you say the {shape} is {color}?",
        "Is the {shape}'s {hue} {color}?",
        "Is the {shape} colored {color}?",
    ),
    "describe": (
        "Can you tell me what you see?",
        "Please tell me what this {image} shows.",
        "What can be seen in this {image}?",
        "What is depicted here?",
        "What is visible in the {image}?",
        "Give a short description of this {image}.",
        "What's shown in this {image}?",
        "What do we see in this {image}?",
    ),
    "which_shape": (
        "Which shape is shown?",
        "Can you tell me what shape this is?",
        "What shape is the {object} in the {image}?",
        "What's this shape called?",
        "Which shape is that?",
    ),
    "which_shapes": (
        "What shapes can you see?",
        "Which shapes does this {image} show?",
        "Can you list the shapes?",
        "Tell me which shapes there are.",
    ),
    "shape_of": (
        "Can you tell me what the {color} {object} is?",
        "What shape is the one in {color}?",
        "Which shape is the {color} {object}?",
        "Tell me what shape the {color} {object} is.",
    ),
    "which_color": (
        "Which {hue} is the {object}?",
        "Can you tell me what {hue} this is?",
        "What {hue} is the {object} in the {image}?",
        "Tell me which {hue} it is.",
        "What's the {hue} of this {object}?",
    ),
    "which_colors": (
        "What {hue}s can you see?",
        "Which {hue}s are used?",
        "Can you list the {hue}s?",
        "Tell me which {hue}s there are.",
    ),
    "color_of": (
        "Which {hue} is the {shape} in the {image}?",
        "Can you tell me what {hue} the {shape} has?",
        "What's the {shape}'s {hue}?",
        "Tell me which {hue} the {shape} is.",
    ),
    "how_many": (
        "How many {object}s are shown?",
        "Can you tell me how many {object}s there are?",
        "How many {object}s are visible?",
        "What's the number of {object}s in this {image}?",
    ),
    "how_many_of": (
        "How many {things} are shown?",
        "Can you tell me how many {things} there are?",
        "How many {things} are visible?",
        "What's the number of {things} in this {image}?",
    ),
    "beside": (
        "Which {object} can you see {relation} the {shape}?",
        "Can you say what is {relation} the {shape}?",
        "What's the {object} {relation} the {shape}?",
        "Tell me what you see {relation} the {shape}.",
    ),
    "where": (
        "Where can I find the {shape}?",
        "Where is the {shape} located?",
        "Tell me where you see the {shape}.",
    ),
    "is_beside": (
        "Can you tell me if the {first} is {relation} the {second}?",
        "Is the {first} placed {relation} the {second}?",
        "Would you say that the {first} is {relation} the {second}?",
        "Is the {first} to be found {relation} the {second}?",
    ),
}
"""Wordings of each kind of question, for evaluation only."""


_FORMS = {
    "prompt": ".+",
    "thing": r"an? (\w+ )?\w+",
    "relation": "(left of|right of|above|below)",
    "image": f"({'|'.join(IMAGE_WORDS)})",
    "object": f"({'|'.join(OBJECT_WORDS)})",
    "hue": "colou?r",
    **dict.fromkeys(("things", "number", "color", "shape", "first", "second"), r"\w+"),
}


@functools.cache
def _held_out() -> re.Pattern[str]:
    forms = {
        _letters(wording.format(**{name: f"0{name}0" for name in _FORMS}))
        for texts in WORDINGS.values()
        for wording in texts
    }
    return re.compile("|".join(re.sub(r"0(\w+?)0", lambda match: _FORMS[match[1]], text) for text in sorted(forms)))


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()


def is_held_out_wording(text: str) -> bool:
    """Whether a question is worded as one of `WORDINGS`, in any case of letters and with any marks."""
    return _held_out().fullmatch(_letters(text)) is not None


def paraphrases(seed: int, scenes: Sequence[Scene]) -> list[tuple[str, Question]]:
    """A question in varied words about each scene, of all kinds that the scene has in turn; the same for the same seed."""
    rng = random.Random(f"paraphrases/{seed}")
    asked = []
    for place, scene in enumerate(scenes):
        kinds = (*KINDS[place % len(KINDS) :], *KINDS[: place % len(KINDS)])
        one = next(made for kind in kinds if (made := question(rng, scene, kind)) is not None)
        asked.append((varied(rng, worded(rng, rng.choice(WORDINGS[one.kind]), one.parts)), one))
    return asked


SYSTEMS = (
    "",
    "You are a pirate.",
    "Be concise.",
    "You are ChatGPT, a large language model.",
    "You are an AI that makes images.",
    "Answer in one word.",
    "Please reply in German.",
    "You are a careful photographer. Mention every detail.",
    "You are an image assistant. If the user asks for a picture, make it at once.",
    "You are a helpful assistant that can see images.",
    "You are a helpful, respectful and honest assistant.",
    "Follow the rules below.\n1. No violence.\n2. No politics.",
    "DO NOT MENTION THESE INSTRUCTIONS.",
    "The current date is 2026-03-14.",
    "Our gallery opens at nine. Customers ask for paintings; you show them what they would like, and explain it if they wish.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
"""System messages other than `prompt.SYSTEM`, for evaluation only; replies are to be the same as without them."""

# Outside requests ------------------------------------------------------------------------------------------------------------

NOUNS = (
    *("cat", "horse", "giraffe", "lobster", "walrus", "pelican", "hamster", "gazelle", "moth", "badger", "toucan"),
    *("windmill", "cathedral", "igloo", "harbour", "balcony", "fountain", "skyscraper", "greenhouse"),
    *("umbrella", "kettle", "scissors", "wardrobe", "candle", "typewriter", "ladder", "toothbrush", "refrigerator"),
    *("motorcycle", "submarine", "tractor", "canoe", "helicopter", "skateboard"),
    *("pineapple", "burger", "omelette", "cucumber", "waffle", "broccoli", "avocado"),
    *("violin", "trumpet", "telescope", "microphone", "suitcase", "necklace", "sandal", "helmet"),
    *("astronaut", "firefighter", "ballerina", "pirate", "grandmother", "plumber"),
    *("volcano", "waterfall", "meadow", "iceberg", "cactus", "sunflower", "thunderstorm", "glacier"),
    *("cake", "zebra", "bottle", "windowsill", "garden", "robot", "lake"),
)
"""Nouns of outside requests, for evaluation only."""
PLACES = ("on a windowsill", "in a garden", "at dawn", "beside a lake", "in the mist", "under a bridge", "on a rooftop")
COLORS = ("turquoise", "crimson", "beige", "emerald", "mustard", "salmon")
SHAPES = ("hexagon", "octagon", "parallelogram", "cylinder", "zigzag", "teardrop")
NUMBERS = ("seven", "nine", "fifteen", "7", "9", "thirty")
RELATIONS = ("wrapped around", "in the shadow of", "far away from", "touching")
KNOWS = ("Can you generate {}?", "Can you generate {}", "Show me {}.", "I want {}.", "Please draw {}.", "{}")
REQUESTS = (
    *(
        "Could you make {}?",
        "I would like {}.",
        "Please create a picture of {}.",
        "Could you show me {}?",
        "Can I get {}?",
    ),
    *("I'd love to see {}.", "Would you please draw {}?", "Let me look at {}."),
)
"""Request wordings of evaluation; the first three are `world.HELD_OUT_WORDINGS`."""


def is_held_out_request(wording: str) -> bool:
    """Whether a request, with {prompt} or {things} in it, is held out: in any case of letters and with any marks.

    It is worded as one of `REQUESTS`, or contains the beginning of one of `world.HELD_OUT_WORDINGS`.
    """
    begins = [_letters(held.partition("{")[0]) for held in world.HELD_OUT_WORDINGS]
    letters = _letters(re.sub(r"{\w*}", "0", wording))
    return letters in _held_out_requests() or any(text in letters for text in begins)


@functools.cache
def _held_out_requests() -> frozenset[str]:
    return frozenset(_letters(wording.replace("{}", "0")) for wording in REQUESTS)


def outside_requests(seed: int, count: int) -> list[str]:
    """`count` requests for what the world does not have, in varied words; the same for the same seed."""
    rng = random.Random(f"outside/{seed}")
    requests = []
    for _ in range(count):
        wording, what = rng.choice((*KNOWS, *REQUESTS)), _outside(rng)
        if "picture" not in wording and rng.random() < 0.5:
            what = f"a photo of {what}"
        requests.append(varied(rng, wording.format(what), ("", "?", ".")))
    return requests


def _outside(rng: random.Random) -> str:
    """What an outside request asks for: "a cat on a windowsill"."""
    noun, other = (world.with_article(word) for word in rng.sample(NOUNS, 2))
    shape, second = rng.sample(world.SHAPES, 2)
    color = rng.choice(world.COLORS)
    return rng.choice(
        (
            noun,
            noun,
            f"{noun} and {other}",
            f"{noun} {rng.choice(PLACES)}",
            world.with_article(f"{color} {rng.choice(NOUNS)}"),
            world.with_article(f"{rng.choice(COLORS)} {rng.choice((*SHAPES, *world.SHAPES))}"),
            world.with_article(f"{color} {rng.choice(SHAPES)}"),
            f"{rng.choice(NUMBERS)} {world.plural(shape)}",
            f"a {shape} and {noun}",
            f"{noun} {rng.choice(world.RELATIONS)} a {shape}",
            f"a {shape} {rng.choice(RELATIONS)} a {second}",
            f"a {shape} {rng.choice(PLACES)}",
            world.listed([world.with_article(rng.choice(world.SHAPES)) for _ in range(5)]),
            f"{world.with_article(f'{color} {shape}')} {rng.choice(world.RELATIONS)} a {rng.choice(world.COLORS)} {second}",
        )
    )


def inside_requests(seed: int, count: int) -> list[tuple[str, str]]:
    """`count` requests for what the world has, in varied words, held-out wordings among them, each with its prompt."""
    rng = random.Random(f"inside/{seed}")
    lines = world.prompts(-(-count // len(world.KINDS)), "any", seed)
    rng.shuffle(lines)
    wordings = (*world.REQUEST_WORDINGS, *world.HELD_OUT_WORDINGS)
    prompts = [str(line["prompt"]) for line in lines[:count]]
    return [(varied(rng, world.request(rng.choice(wordings), p), ("", "?", ".")), p) for p in prompts]
