"""Word exchanges: conditions of prompts that nobody wrote, from those of prompts that differ in one word. Imports no torch."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence

Exchange = tuple[int, int, int]
"""Numbers (i, j, k) of texts: what i becomes when its word is exchanged that differs between k and j."""


def exchanges(texts: Sequence[str], count: int, seed: int) -> list[Exchange]:
    """`count` random exchanges, or none if no texts allow one; the new text's condition is about y_i + y_j - y_k.

    The four texts are corners of a rectangle. Texts j and k differ in one word, and texts i and k in one other word:
    "a red cat", "a blue dog" and "a blue cat" make "a red dog". So the exchanged word has the same role in all of them.
    """
    words = [tuple(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)  # texts that differ in one place only
    for number, own in enumerate(words):
        for place in range(len(own)):
            alike[place, own[:place] + own[place + 1 :]].append(number)

    def others(k: int, place: int) -> list[int]:
        """The texts that differ from text k in that place only."""
        own = words[k]
        return [j for j in alike[place, own[:place] + own[place + 1 :]] if words[j] != own]

    # For each text, its places where another text has another word.
    free = {k: [place for place in range(len(own)) if others(k, place)] for k, own in enumerate(words)}
    able = [k for k, places in free.items() if len(places) > 1]
    draw = random.Random(seed)
    found: list[Exchange] = []
    while able and len(found) < count:
        k = draw.choice(able)
        one, another = draw.sample(free[k], 2)
        found.append((draw.choice(others(k, one)), draw.choice(others(k, another)), k))
    return found
