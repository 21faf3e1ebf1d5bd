"""Rows of text that the last stage trains on: conversations as token ids, with the places of picture, answer and queries.

Nothing that training may not see is ever said: a text that names something held out is made again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from recipes.shapes import data, invented, wordings
from recipes.shapes.invented import COLOR_NAMES, SHAPE_NAMES
from recipes.shapes.own import Seen, Wish
from scale_rae.prompt import IMAGE, SYSTEM, ChatTokenizer, Turn
from scale_rae.shapes import asking, world
from scale_rae.shapes.world import Scene

WIDTH = 176
"""Tokens of a row at most, queries included; longer texts are made again."""
NO_PLACE = -1

Ids = NDArray[np.int16]


@dataclass(frozen=True)
class Lesson:
    """One conversation: its ids with padding for the picture, and where things are."""

    ids: list[int]
    answer: int
    """Place of the first token that is learnt; the answer ends with the ids. As long as the ids if nothing is learnt."""
    image: int = NO_PLACE
    """Place of the picture's first token."""
    picture: int = 0
    """Number of the picture among the pictures of its stream."""
    wish: int = 0
    """Number of the prompt whose condition the queries, which follow the ids, should have."""


@dataclass(frozen=True)
class Rows:
    """N lessons as arrays."""

    ids: Ids
    """[N, WIDTH]."""
    length: NDArray[np.int16]
    answer: NDArray[np.int16]
    image: NDArray[np.int16]
    picture: NDArray[np.int32]
    wish: NDArray[np.int32]
    """[N] each."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, lessons: Sequence[Lesson], pad: int) -> Rows:
        """The lessons, padded on the right."""
        ids = np.full((len(lessons), WIDTH), pad, np.int16)
        for row, lesson in zip(ids, lessons, strict=True):
            row[: len(lesson.ids)] = lesson.ids

        def column(values: Sequence[int], kind: type) -> NDArray[np.int32]:
            return np.array(values, dtype=kind)

        return cls(
            ids,
            np.array([len(one.ids) for one in lessons], np.int16),
            np.array([one.answer for one in lessons], np.int16),
            np.array([one.image for one in lessons], np.int16),
            np.array([one.picture for one in lessons], np.int32),
            np.array([one.wish for one in lessons], np.int32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of the parts."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Writer:
    """Makes lessons of texts, in the chat layout."""

    def __init__(self, tokenizer: ChatTokenizer, pad: int, tokens: int) -> None:
        """`tokens` of a picture."""
        self.tokenizer, self.pad, self.tokens = tokenizer, pad, tokens
        self.reply = [*tokenizer.plain(world.REPLY), tokenizer.image_start]

    def said(
        self,
        message: str,
        answer: str,
        picture: int | None = None,
        before: str | None = None,
        system: str = SYSTEM,
    ) -> Lesson | None:
        """A message and its answer; with a `picture`, about it: shown with the message, or drawn for the request `before`.

        None if it is longer than WIDTH.
        """
        learnt = [*self.tokenizer.plain(answer), self.tokenizer.chat_end]
        return self._lesson(self._ids(message, picture, before, system), learnt, picture, 0, room=0)

    def drawn(
        self,
        message: str,
        wish: int,
        learns: bool,
        picture: int | None = None,
        before: str | None = None,
        system: str = SYSTEM,
    ) -> Lesson | None:
        """A request with the reply to it, which is learnt if `learns`; a picture may stand before the request, as in `said`."""
        ids, reply = self._ids(message, picture, before, system), self.reply
        if not learns:
            ids, reply = [*ids, *reply], []
        return self._lesson(ids, reply, picture, wish, room=self.tokens)

    def _ids(self, message: str, picture: int | None, before: str | None, system: str) -> list[int]:
        turns = [Turn("user", message, int(picture is not None))]
        if picture is not None and before is not None:
            turns = [Turn("user", before), Turn("assistant", world.REPLY, 1), Turn("user", message)]
        return self.tokenizer.conversation(turns, system)

    def _lesson(self, ids: list[int], learnt: list[int], picture: int | None, wish: int, room: int) -> Lesson | None:
        place = NO_PLACE
        if picture is not None:
            place = ids.index(IMAGE)
            ids = [*ids[:place], *(self.pad,) * self.tokens, *ids[place + 1 :]]
        if len(ids) + len(learnt) + room > WIDTH:
            return None
        return Lesson([*ids, *learnt], len(ids), place, picture or 0, wish)


def until_it_fits(make: Callable[..., Lesson | None], *arguments: object) -> Lesson:
    """What `make` returns, called again while that is None."""
    while True:
        lesson = make(*arguments)
        if lesson is not None:
            return lesson


QUESTION_KINDS = (
    *asking.KINDS,
    *("describe",) * 4,
    *("there", "any", "match"),
    *("which_shape", "which_color", "it_color", "it_shape") * 3,
    *("which_shapes", "which_colors", "which_colors", "which_colors", "how_many_of", "color_is"),
    *("beside", "where", "is_beside") * 2,
)
"""Kinds of question, weighted: the kinds that few scenes have are tried more often."""


def a_question(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene in varied words and its answer, nothing held out in either."""
    while True:
        asked = asking.question(rng, scene, rng.choice(QUESTION_KINDS))
        if asked is None or asking.names_held_out(asked.answer):
            continue
        text = wordings.in_words(rng, asked)
        if not asking.names_held_out(text):
            return text, asked.answer


def a_stray_question(rng: random.Random) -> tuple[str, str]:
    """A question about a picture that asks for what the world does not have, and its answer; nothing held out is named."""
    while True:
        text, answer = _any_stray_question(rng)
        if not asking.names_held_out(text):
            return text, answer


def _any_stray_question(rng: random.Random) -> tuple[str, str]:
    noun = wordings.noun(rng)
    a_noun = world.with_article(noun)
    colored = world.with_article(f"{rng.choice((*world.COLORS, *wordings.OTHER_COLORS))} {noun}")
    color, shape = rng.choice(wordings.OTHER_COLORS), rng.choice(wordings.OTHER_SHAPES)
    kind, parts, answer = rng.choice(
        (
            ("there", {"thing": a_noun}, world.NO),
            ("there", {"thing": rng.choice((colored, a_noun))}, world.NO),
            ("any", {"things": f"{noun}s"}, world.NO),
            ("match", {"prompt": f"a photo of {wordings.outside(rng)}"}, world.NO),
            ("it_color", {"color": color}, world.NO),
            ("it_shape", {"thing": world.with_article(rng.choice((shape, noun)))}, world.NO),
            ("color_of", {"shape": noun}, asking.ABSENT),
            ("how_many_of", {"things": f"{noun}s"}, "None."),
        )
    )
    return wordings.in_words(rng, asking.Question(kind, parts, answer)), answer


def a_request_before(rng: random.Random, prompt: str) -> str:
    """A short request for a picture that an earlier turn drew."""
    return rng.choice(("Can you generate {}", "Show me {}.", "Draw {}.", "{}")).format(prompt)


def _prompt_before(rng: random.Random) -> str:
    while True:
        text = f"a photo of {world.with_article(f'{rng.choice(world.COLORS)} {rng.choice(world.SHAPES)}')}"
        if not asking.names_held_out(text):
            return text


USUAL = 0.35
"""How often a question about a scene is asked as the joint stage does."""
OTHERWISE = 0.7
"""How often a question about something invented is not one of the joint stage's."""
TURNS = 0.15
"""How often the picture was drawn in an earlier turn."""


def read_lessons(
    rng: random.Random,
    write: Writer,
    scenes: Sequence[Scene],
    other: NDArray[np.bool_],
    ruined: NDArray[np.bool_],
    first: int,
) -> list[Lesson]:
    """A lesson about each scene, in the words of the joint stage or in others. `other` [N] hold something invented, of `ruined` ones no text
    is true. The pictures count from `first`."""
    real = [scene for scene, has in zip(scenes, other, strict=True) if not has]
    asked = iter(world.questions(rng, real, "exclude"))

    def make(number: int, scene: Scene, has: bool, bad: bool, usual: tuple[str, str], stays: bool) -> Lesson | None:
        if bad:
            text, answer = _of_unclear(rng, scene)
        elif stays and rng.random() < 0.9:
            text, answer = data.as_asked_for(rng, usual[0]), usual[1]
            if has and rng.random() < OTHERWISE:
                text, answer = _of_invented(rng, scene, usual)
        elif has or rng.random() < 0.12:
            text, answer = a_stray_question(rng)
        else:
            text, answer = a_question(rng, scene)
        return write.said(text, answer, number, _before(rng), wordings.system(rng))

    lessons = []
    for number, (scene, has, bad) in enumerate(zip(scenes, other, ruined, strict=True), first):
        usual = data.invented_question(rng, scene) if has else next(asked)
        lessons.append(until_it_fits(make, number, scene, has, bad, usual, has or rng.random() < USUAL))
    return lessons


def _before(rng: random.Random) -> str | None:
    """At times, the request of an earlier turn, in which the picture was drawn."""
    return a_request_before(rng, _prompt_before(rng)) if rng.random() < TURNS else None


def _of_unclear(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a prompt that is true but for a spoilt object describes the picture, and no."""
    while True:
        told = world.true_prompts(scene)
        text = rng.choice(told).text if told else data.listing(rng, scene)
        if not asking.names_held_out(text):
            return _matches(rng, text), world.NO


def _of_invented(rng: random.Random, scene: Scene, usual: tuple[str, str]) -> tuple[str, str]:
    """A question about a scene that holds something invented, and its answer: one of any kind, a prompt of any kind that is true or
    nearly so, or the joint stage's in other words."""
    which = rng.random()
    if which < 0.2:
        return a_question(rng, scene)
    told = world.true_prompts(scene)
    if which < 0.4 or not told:
        return _in_other_words(rng, usual[0]), usual[1]
    prompt, true = rng.choice(told), rng.random() < 0.5
    if not true:
        names = invented.SHAPE_NAMES[: invented.forms()], invented.COLOR_NAMES[: invented.hues()]
        others = [
            p
            for p in world.true_prompts(data.altered(rng, scene, *names))
            if p.tag == prompt.tag and _differ(p, prompt)
        ]
        prompt = others[0] if others and rng.random() < 0.6 else world.changed(rng, prompt)
    return _matches(rng, prompt.text), world.YES if true else world.NO


def _differ(one: world.Prompt, other: world.Prompt) -> bool:
    """Whether prompts of one tag name other shapes or colours."""
    return (sorted(one.shapes), sorted(one.colors)) != (sorted(other.shapes), sorted(other.colors))


def _in_other_words(rng: random.Random, question: str) -> str:
    """One of the joint stage's questions that may be about something invented, in varied words."""
    before, after = world.ALIGN.split("{prompt}")
    if question.startswith(before):
        prompt = question.removeprefix(before).removesuffix(after)
        return wordings.in_words(rng, asking.Question("match", {"prompt": prompt}, ""))
    assert question == world.DESCRIBE
    return wordings.in_words(rng, asking.Question("describe", {}, ""))


def _matches(rng: random.Random, prompt: str) -> str:
    """Whether a prompt describes the picture, mostly in the default words."""
    if rng.random() < 0.65:
        return data.as_asked_for(rng, world.ALIGN.format(prompt=prompt))
    return wordings.in_words(rng, asking.Question("match", {"prompt": prompt}, ""))


OF_RIGHT, OF_WRONG = 4, 6
"""Lessons about each of the model's own drawings."""


def own_lessons(
    rng: random.Random, write: Writer, wished: Sequence[Wish], seen: Sequence[Seen], first: int
) -> list[Lesson]:
    """Lessons about the model's own drawings, `OF_RIGHT` about a right one and `OF_WRONG` about a wrong one; those that show something
    held out are left out."""

    def make(number: int, wish: Wish, found: Seen, right: bool) -> Lesson | None:
        text, answer = (_of_right if right else _of_wrong)(rng, wish, found)
        before = a_request_before(rng, wish.text) if rng.random() < TURNS else None
        return write.said(text, answer, number, before, wordings.system(rng))

    lessons = []
    for number, (wish, found) in enumerate(zip(wished, seen, strict=True), first):
        if found.objects and not world.shows_held_out(found.objects):
            right = found.clear and wish.is_granted(found.objects)
            lessons += [until_it_fits(make, number, wish, found, right) for _ in range(OF_RIGHT if right else OF_WRONG)]
    return lessons


def _of_right(rng: random.Random, wish: Wish, found: Seen) -> tuple[str, str]:
    """A question about a drawing that is as wished, and its answer."""
    which, scene = rng.random(), Scene("mixed", found.objects)
    if which < 0.5:
        return _matches(rng, wish.text), world.YES
    return _changed(rng, scene) if which < 0.68 else a_question(rng, scene)


def _of_wrong(rng: random.Random, wish: Wish, found: Seen) -> tuple[str, str]:
    """A question about a drawing that is not as wished, and its answer; only of clear objects is anything else asked."""
    which, scene = rng.random(), Scene("mixed", found.objects)
    if len(found.objects) <= world.MAX_OBJECTS:
        if found.clear and which < 0.5:
            return a_question(rng, scene) if which < 0.35 else _true(rng, scene)
        if not found.clear and which < 0.15:
            return _of_unclear(rng, scene)
    return _matches(rng, wish.text), world.NO


def _changed(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a false prompt describes the scene, and no."""
    while True:
        told = [prompt for prompt in world.true_prompts(scene) if not prompt.is_held_out]
        other = data.altered(rng, scene)
        text = world.changed(rng, rng.choice(told)).text if told else data.listing(rng, other)
        if not asking.names_held_out(text):
            return _matches(rng, text), world.NO


def _true(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a true prompt describes the scene, and yes."""
    while True:
        told = [prompt.text for prompt in world.true_prompts(scene) if not prompt.is_held_out]
        text = rng.choice(told) if told else data.listing(rng, scene)
        if not asking.names_held_out(text):
            return _matches(rng, text), world.YES


# Requests ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A prompt whose condition is known, and what may be said instead of it in a request."""

    text: str
    """ "a photo of …", as the joint stage says it."""
    said: str
    """The same in other words, or in the same."""
    is_real: bool
    """Whether it names nothing invented: only then is the reply learnt."""


def asks(rng: random.Random, scenes: Sequence[Scene]) -> list[Ask]:
    """Prompts for scenes, some with invented names; a quarter of the prompts exchange names as `data.quad` does."""
    made: list[Ask] = []
    for scene in scenes:
        which = rng.random()
        if which < 0.25:
            made += [_ask(text) for text, _ in data.quad(rng)]
        elif which < 0.35:
            made.append(_counted(rng))
        elif which < 0.5:
            made.append(_simple(rng))
        else:
            made.append(_ask(data.prompt_of(rng, scene)[0]))
    return made


def _ask(text: str) -> Ask:
    said = set(text.split())
    invented = {*SHAPE_NAMES[len(world.SHAPES) :], *COLOR_NAMES[len(world.COLORS) :]}
    return Ask(text, text, said.isdisjoint(invented | {f"{name}," for name in invented}))


def _simple(rng: random.Random) -> Ask:
    """A single object: outside requests are mostly as short, and must not be all that is short."""
    while True:
        shape, color = rng.choice(world.SHAPES), rng.choice(world.COLORS)
        prompt = (
            world.Prompt("colors", (shape,), (color,))
            if rng.random() < 0.5
            else world.Prompt("single_object", (shape,))
        )
        if not prompt.is_held_out:
            return Ask(prompt.text, prompt.text, True)


def _counted(rng: random.Random) -> Ask:
    """Several like objects, perhaps with another: "two red circles and a star", listed one by one for the condition."""
    while True:
        number = rng.randrange(2, world.MAX_OBJECTS + 1)
        shape, color = rng.choice(world.SHAPES), rng.choice(("", *world.COLORS, *world.COLORS))
        things = [f"{color} {shape}".strip()] * number
        said = [f"{world.NUMBERS[number]} {f'{color} {world.plural(shape)}'.strip()}"]
        if number < world.MAX_OBJECTS and (not color or rng.random() < 0.4):
            other = rng.choice([name for name in world.SHAPES if name != shape])
            things.append(f"{rng.choice(world.COLORS)} {other}" if rng.random() < 0.6 else other)
            said.append(world.with_article(things[-1]))
        elif not color:
            continue
        order = rng.randrange(2)
        listed = [world.with_article(name) for name in things]
        text = f"a photo of {world.listed(listed if order else listed[::-1])}"
        spoken = f"a photo of {world.listed(said if order else said[::-1])}"
        numbers = [(number, shape)]
        if numbers[0] not in world.HELD_OUT_COUNTS and not asking.names_held_out(f"{text} {spoken}"):
            return Ask(text, spoken, True)


def draw_lessons(
    rng: random.Random, write: Writer, prompts: Sequence[Ask], first: int, each: int, pictures: int = 0
) -> list[Lesson]:
    """`each` requests for each of the prompts, which count from `first`; with `pictures`, after one of that many pictures."""

    def make(number: int, ask: Ask) -> Lesson | None:
        if rng.random() < (0.25 if ask.is_real else 0.75):
            message = world.request(data.wording_of_request(rng), ask.said)
        else:
            message = wordings.inside_request(rng, ask.said, bare=not pictures)
        return write.drawn(message, number, ask.is_real, *_shown(rng, pictures), wordings.system(rng))

    return [until_it_fits(make, number, ask) for number, ask in enumerate(prompts, first) for _ in range(each)]


def _shown(rng: random.Random, pictures: int) -> tuple[int | None, str | None]:
    """One of that many pictures, if any, and half of the time the request that drew it."""
    if not pictures:
        return None, None
    return rng.randrange(pictures), a_request_before(rng, _prompt_before(rng)) if rng.random() < 0.5 else None


def outside_lessons(rng: random.Random, write: Writer, count: int, pictures: int = 0) -> list[Lesson]:
    """`count` requests for what the world does not have, declined; with `pictures`, after one of that many pictures."""

    def make() -> Lesson | None:
        message = wordings.outside_request(rng, bare=not pictures)
        return write.said(message, world.OUTSIDE_REPLY, *_shown(rng, pictures), wordings.system(rng))

    return [until_it_fits(make) for _ in range(count)]


def talk_lessons(rng: random.Random, write: Writer, count: int, pictures: int = 0) -> list[Lesson]:
    """`count` pieces of small talk; with `pictures`, after one of that many pictures."""

    def make() -> Lesson | None:
        return write.said(wordings.talk(rng), world.CHAT_REPLY, *_shown(rng, pictures), wordings.system(rng))

    return [until_it_fits(make) for _ in range(count)]


def blind_lessons(rng: random.Random, write: Writer, scenes: Sequence[Scene]) -> list[Lesson]:
    """A question about a picture for each scene, but nothing is shown."""

    def make(scene: Scene) -> Lesson | None:
        text, _ = a_question(rng, scene) if rng.random() < 0.8 else a_stray_question(rng)
        return write.said(text, world.NO_PICTURE, system=wordings.system(rng))

    return [until_it_fits(make, scene) for scene in scenes]
