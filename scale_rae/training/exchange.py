"""Conditions of new prompts, from those of prompts that differ in one word. Imports no torch."""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

Words = tuple[str, ...]
Rectangle = tuple[int, int, int]
"""Numbers (i, j, k) of texts. A new text is the fourth corner, and its condition is about y_i + y_j - y_k."""

_TRIES = 1000  # draws without a new text, after which there are none


class _Texts:
    """Texts as words, and those of them that differ in one place only."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.words = [tuple(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
        self._number = {own: n for n, own in enumerate(self.words)}
        self._alike: dict[tuple[int, Words], list[int]] = defaultdict(list)  # by the place, and the words without it
        for own, n in self._number.items():
            for place in range(len(own)):
                self._alike[place, own[:place] + own[place + 1 :]].append(n)

    def __contains__(self, own: Words) -> bool:
        return own in self._number

    def others(self, own: Words, place: int) -> list[int]:
        """The numbers of the texts that differ from these words in that place only."""
        return [n for n in self._alike.get((place, own[:place] + own[place + 1 :]), ()) if self.words[n] != own]

    def exchanged(self, own: Words, place: int, other: int) -> Words:
        """These words with the word that another text has in that place."""
        return (*own[:place], self.words[other][place], *own[place + 1 :])

    def rectangles(self, new: Words) -> list[Rectangle]:
        """All rectangles whose fourth corner is a text of these words."""
        near = {place: found for place in range(len(new)) if (found := self.others(new, place))}
        return [
            (i, j, k)
            for one, another in itertools.combinations(near, 2)
            for i in near[one]
            for j in near[another]
            if (k := self._number.get(self.exchanged(self.exchanged(new, one, i), another, j))) is not None
        ]


def exchanges(texts: Sequence[str], seed: int) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Pairs of rectangles, each pair of one random new text.

    The iterator ends where the texts make no new text, or no second rectangle of one. Three corners of a rectangle are given.
    Texts j and k differ in one word, and texts i and k in one other word: "a red cat", "a blue dog" and "a blue cat" make "a
    red dog". So the exchanged word has the same role in all of them. The fourth corner is none of the given texts. A second
    rectangle makes the same text from other texts, so one can see whether conditions add up there. Texts may repeat; those that
    do are exchanged more often.
    """
    given = _Texts(texts)
    draw = random.Random(seed)
    known: dict[Words, list[Rectangle]] = {}
    tries = 0
    while given.words and tries < _TRIES:
        tries += 1
        own = draw.choice(given.words)
        places = [place for place in range(len(own)) if given.others(own, place)]
        if len(places) < 2:
            continue
        new = own
        for place in draw.sample(places, 2):
            new = given.exchanged(new, place, draw.choice(given.others(own, place)))
        if new in given:
            continue
        found = known[new] if new in known else known.setdefault(new, given.rectangles(new))
        if len(found) > 1:
            one, another = draw.sample(found, 2)
            yield one, another
            tries = 0
