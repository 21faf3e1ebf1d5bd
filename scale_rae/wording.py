"""Whether a message asks for an image, by its words; and notes for users whose model replied with something else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scale_rae.hub import Source

GUIDE = "docs/bundled-model.md"

# Words before the verb of a request, repeated: "Hey, can you please …", "Now …", "I'd like you to …".
_POLITELY = (
    r"(?:(?:hey|hi|hello|so|well|please|now|then|next|ok|okay|and|just|(?:can|could|would|will) you|i(?:['’]d| would) like you to"
    r"|i want you to|let['’]?s)[\s,.!]+)*"
)
# Verbs of making and changing; questions and descriptions do not begin with them.
_VERBS = (
    r"(?:draw|redraw|generate|regenerate|create|make|paint|repaint|produce|render|sketch|illustrate|imagine|design"
    r"|change|turn|transform|convert|edit|modify|alter|replace|swap|remove|erase|delete|add|insert|put|place|move|rotate"
    r"|flip|mirror|crop|zoom|colou?r|recolou?r|brighten|darken|blur|sharpen|restyle|extend|fill)"
)
_WISHES = r"(?:(?:show|give) me|(?:i|we) (?:want|need|would like)|i['’]d like|let (?:me|us) see|(?:can|could|may) i (?:have|see|get))"
_ASKS_TO_DRAW = re.compile(rf"\W*{_POLITELY}(?:{_VERBS}(?! of\b)|(?P<wish>{_WISHES}))\b", re.IGNORECASE)
# What is answered in words although it begins like a request: "Generate a caption", "Turn this into words".
_ASKS_FOR_TEXT = re.compile(
    r"\b(?:generate|create|make|produce|give me|want|need|like|have|get|see)\s+(?:[\w'’-]+\s+){0,3}"
    r"(?:descriptions?|captions?|lists?|summary|titles?|story|poem|sentences?|texts?|number|count|names?|answers?"
    r"|explanations?|labels?|tags|reports?|guess)\b|\bin(?:to)? words\b|\bfill in the blanks?\b",
    re.IGNORECASE,
)
# A wish about the shown picture: "Can I see a star in this picture?", "Show me where it is", "I want to know …".
_ABOUT_THE_SHOWN = re.compile(
    r"\b(?:in|of|about|on) (?:this|that|the) (?:picture|image|photo|drawing)\b"
    r"|\b(?:where|what|which|who|why|how|whether|if)\b|\bto (?:know|hear|understand|ask)\b",
    re.IGNORECASE,
)

# The beginning of a prompt that is a request already. A verb alone is one only before an article or a number: "paint
# brushes" are a thing to draw, "paint a brush" is a request.
_REQUEST = re.compile(
    r"(please|(can|could|would|will) (you|i)|(show|give) me|i (want|need|would like)|i['’]d like|let me see"
    r"|(generate|draw|create|make|paint|produce|render)( me)? (an?|the|one|two|three|four|five|some|this|\d+))\b",
    re.IGNORECASE,
)
# Words between a request's verb and what is to be drawn: "draw me", "I want to see".
_BEFORE_THE_SUBJECT = re.compile(r"(?:me|to (?:see|have|get))\s+", re.IGNORECASE)
_END_MARKS = (".", "?", "!", "…", "。", "？", "！", " ")


def as_request(prompt: str, prefix: str) -> str:
    """The prompt with the prefix before it, unless it is a request already."""
    if not prefix.strip() or _REQUEST.match(prompt) or prompt.lower().startswith(prefix.strip().lower()):
        return prompt
    return f"{prefix}{'' if prefix[-1].isspace() else ' '}{prompt}"


def subject(message: str) -> str:
    """What a message asks to draw: "a cat" of "Can you generate a cat?". A message that is no request is its own subject."""
    request = _ASKS_TO_DRAW.match(message) if _REQUEST.match(message) else None
    if request is None:
        return message
    rest = _BEFORE_THE_SUBJECT.sub("", message[request.end() :].strip()).rstrip("".join(_END_MARKS))
    return rest if rest[:1].isalnum() else message


def asks_to_draw(message: str) -> bool:
    """Whether a message after a picture asks for another picture ("Make it blue"), not about the shown one.

    The first words decide, since the model has not replied yet. In doubt, the message is a question.
    """
    request = _ASKS_TO_DRAW.match(message)
    if request is None or _ASKS_FOR_TEXT.search(message):
        return False
    return request["wish"] is None or not _ABOUT_THE_SHOWN.search(message)


def is_bundled(source: Source) -> bool:
    """Whether the files are those of the bundled model."""
    from scale_rae.hub import BUNDLED

    return any(source.folder.resolve() == folder.resolve() for folder in BUNDLED.values())


def what_it_can(source: Source) -> str | None:
    """A sentence on what the bundled model draws and answers; None for other models, whose abilities are not known."""
    if not is_bundled(source):
        return None
    from scale_rae.shapes.world import COLORS, SHAPES

    return (
        f"the bundled model draws one to four shapes ({_listed(SHAPES)}) in {_listed(COLORS)}, asked for as in "
        '"a photo of a blue cross and a pink square", "Show me three stars." or "a photo of a ring left of a heart" (places only '
        "without colours), and answers questions about such pictures; "
        f"see {GUIDE}"
    )


def is_refusal(source: Source, text: str) -> bool:
    """Whether a text is the bundled model's reply to what it cannot do."""
    if not is_bundled(source):
        return False
    from scale_rae.shapes.world import CHAT_REPLY, NO_PICTURE, OUTSIDE_REPLY

    return text.strip() in (CHAT_REPLY, OUTSIDE_REPLY, NO_PICTURE)


def after_no_drawing(source: Source) -> str:
    """Advice for when a model answered in words where a picture was wanted."""
    return what_it_can(source) or (
        'ask for a picture as in "Can you generate a photo of …?"; if you did, use other words: by them the model decides '
        "whether it draws"
    )


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
