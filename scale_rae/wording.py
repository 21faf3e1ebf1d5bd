"""What a message asks for, by its words, and what to do when a model's reply is something else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scale_rae.hub import Source

GUIDE = "docs/bundled-model.md"

# What comes before the verb of a request, any number of times: "Can you please …", "Now …", "I'd like you to …".
_POLITELY = (
    r"(?:(?:please|now|then|next|ok|okay|and|just|(?:can|could|would|will) you|i(?:['’]d| would) like you to"
    r"|i want you to|let['’]?s)[\s,]+)*"
)
# Verbs of making and changing; a question or a description has none of them in this place.
_VERBS = (
    r"(?:draw|redraw|generate|regenerate|create|make|paint|repaint|produce|render|sketch|illustrate|imagine|design"
    r"|change|turn|transform|convert|edit|modify|alter|replace|swap|remove|erase|delete|add|insert|put|place|move|rotate"
    r"|flip|mirror|crop|zoom|colou?r|recolou?r|brighten|darken|blur|sharpen|restyle|extend|fill)"
)
_WISHES = (
    r"(?:(?:show|give) me|(?:i|we) (?:want|need|would like)|i['’]d like|let (?:me|us) see|(?:can|could|may) i (?:have|see|get)"
    r"|what if)"
)
_ASKS_TO_DRAW = re.compile(rf"\W*{_POLITELY}(?:{_VERBS}|{_WISHES})\b", re.IGNORECASE)

# A prompt that begins so asks for a picture already. Bare verbs ask only before an article or a number: "paint brushes"
# is a thing to draw, "paint a brush" a request.
_REQUEST = re.compile(
    r"(please|(can|could|would|will) (you|i)|(show|give) me|i (want|need|would like)|i['’]d like|let me see"
    r"|(generate|draw|create|make|paint|produce|render)( me)? (an?|the|one|two|three|four|five|some|this|\d+))\b",
    re.IGNORECASE,
)


def as_request(prompt: str, prefix: str) -> str:
    """The prompt with the prefix before it, unless it is a request already."""
    if not prefix.strip() or _REQUEST.match(prompt) or prompt.lower().startswith(prefix.strip().lower()):
        return prompt
    return f"{prefix}{'' if prefix[-1].isspace() else ' '}{prompt}"


def asks_to_draw(message: str) -> bool:
    """Whether a message after a picture asks for another one ("Make it blue"), and not about the one there is.

    By its first words, which are all that can be known before the model has replied. When in doubt it is a question.
    """
    return _ASKS_TO_DRAW.match(message) is not None


def is_bundled(source: Source) -> bool:
    """Whether these are the files of the model that comes with this package."""
    from scale_rae.hub import BUNDLED

    return any(source.folder.resolve() == folder.resolve() for folder in BUNDLED.values())


def what_it_can(source: Source) -> str | None:
    """In a sentence, what the bundled model draws and answers; None for any other model, of which we do not know."""
    if not is_bundled(source):
        return None
    from scale_rae.shapes.world import COLORS, SHAPES

    return (
        f"the bundled model draws one to four shapes ({_listed(SHAPES)}) in {_listed(COLORS)}, asked for as in "
        '"a photo of a blue cross and a pink square" or "Show me three stars.", and answers questions about such pictures; '
        f"see {GUIDE}"
    )


def is_refusal(source: Source, text: str) -> bool:
    """Whether this is what the bundled model says where it can do nothing."""
    if not is_bundled(source):
        return False
    from scale_rae.shapes.world import CHAT_REPLY

    return text.strip() == CHAT_REPLY


def after_no_drawing(source: Source) -> str:
    """What to do when a model answered in words where a picture was wanted."""
    return what_it_can(source) or (
        'ask for a picture as in "Can you generate a photo of …?"; if you did, use other words: by them the model decides '
        "whether it draws"
    )


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
