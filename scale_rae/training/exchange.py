"""Word exchanges: conditions of prompts that nobody wrote, from those of prompts that differ in one word. Imports no torch."""

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


def exchanges(texts: Sequence[str], seed: int) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Two rectangles of a random new text, again and again; ends where the texts make no new one, or no two rectangles of it.

    Three corners of a rectangle are given. Texts j and k differ in one word, and texts i and k in one other word: "a red cat", "a
    blue dog" and "a blue cat" make "a red dog". So the exchanged word has the same role in all of them. The fourth corner is none of
    the given texts. A second rectangle makes the same text from other texts, so one can see whether conditions add up there. Texts
    may repeat; those that do are exchanged more often.
    """
    words = [tuple(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
    number = {own: n for n, own in enumerate(words)}
    alike: dict[tuple[int, Words], list[int]] = defaultdict(list)  # texts that differ in one place only
    for own, n in number.items():
        for place in range(len(own)):
            alike[place, own[:place] + own[place + 1 :]].append(n)

    def others(own: Words, place: int) -> list[int]:
        """The texts that differ from these words in that place only."""
        return [n for n in alike.get((place, own[:place] + own[place + 1 :]), ()) if words[n] != own]

    def exchanged(own: Words, place: int, other: int) -> Words:
        """These words with the word that another text has in that place."""
        return (*own[:place], words[other][place], *own[place + 1 :])

    def rectangles(new: Words) -> list[Rectangle]:
        """All rectangles whose fourth corner is a text."""
        near = {place: found for place in range(len(new)) if (found := others(new, place))}
        return [
            (i, j, k)
            for one, another in itertools.combinations(near, 2)
            for i in near[one]
            for j in near[another]
            if (k := number.get(exchanged(exchanged(new, one, i), another, j))) is not None
        ]

    draw = random.Random(seed)
    known: dict[Words, list[Rectangle]] = {}
    tries = 0
    while words and tries < _TRIES:
        tries += 1
        own = draw.choice(words)
        places = [place for place in range(len(own)) if others(own, place)]
        if len(places) < 2:
            continue
        new = own
        for place in draw.sample(places, 2):
            new = exchanged(new, place, draw.choice(others(own, place)))
        if new in number:
            continue
        found = known[new] if new in known else known.setdefault(new, rectangles(new))
        if len(found) > 1:
            one, another = draw.sample(found, 2)
            yield one, another
            tries = 0
