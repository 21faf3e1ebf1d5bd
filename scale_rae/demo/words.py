"""Text on the demo page: errors as sentences, numbers that visitors type, status lines. Independent of gradio."""

from __future__ import annotations

import base64
import html
import re
from importlib.resources import files

from scale_rae.errors import InputError


def without_paths(text: str) -> str:
    """A text with file names in place of whole paths, which visitors need not know."""
    return re.sub(r"(?<![\w/\\:.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":,;]+[/\\])+([^\s/\\'\":,;]*)", r"\1", text)


def sentence(text: str, escape: bool = True) -> str:
    """An error's text as a sentence; escaped for HTML unless the component that shows it escapes by itself."""
    text = " ".join(text.split())
    if re.match(r"[a-z]+\b[^./\\]", text):  # a word, not a file's name
        text = text[:1].upper() + text[1:]
    text = text if text.endswith((".", "?", "!", "…")) else text + "."
    return html.escape(text) if escape else text


def whole_number(text: str | int | float | None, name: str) -> int:
    """The whole number in a field, of any size.

    Raises:
        InputError: naming the field.
    """
    plain = str("" if text is None else text).strip()
    if not re.fullmatch(r"-?[0-9]{1,20}", plain):
        raise InputError(f"{name} is {repr(plain) if plain else 'empty'}: it must be a whole number.")
    return int(plain)


def bar(share: float, text: str) -> str:
    """A progress bar in HTML, also for screen readers."""
    percent = round(100 * share)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="{html.escape(text, quote=True)}"><div style="width: {percent}%"></div></div>'
        f'<p class="said">{html.escape(text)}</p>'
    )


def header(model: str, device: str) -> str:
    """The page's head in HTML: what Scale-RAE is, which model runs where, and pictures that the bundled model drew."""
    strip = base64.b64encode(files("scale_rae").joinpath("assets", "drawings.webp").read_bytes()).decode("ascii")
    return (
        '<div class="hero"><div><h1>Scale-RAE</h1>'
        "<p>One model that draws pictures and reads them. "
        '<span class="more">What it draws it can judge, so it can draw many and keep the best.</span></p>'
        f'<p class="chips"><span>{html.escape(model)}</span> <span>{html.escape(device)}</span> '
        '<span class="more">One visitor at a time draws; others wait in line.</span></p></div>'
        f'<img src="data:image/webp;base64,{strip}" width="768" height="128" alt="Six pictures of coloured shapes, drawn by the '
        'model that comes with the package"></div>'
    )


def folded(title: str, text: str) -> str:
    """A text in HTML that a click on its title shows."""
    return f'<details class="said"><summary>{html.escape(title)}</summary>{html.escape(text)}</details>'


def note(text: str) -> str:
    """A line of status in HTML."""
    return f'<p class="said" role="status">{html.escape(text)}</p>'


def error_note(sentence: str) -> str:
    """A sentence of `sentence`, which is HTML already, as a status that looks like an error."""
    return f'<p class="said wrong" role="alert">{sentence}</p>'
