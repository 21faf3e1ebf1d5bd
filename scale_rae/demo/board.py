"""The demo's tables of ranked images and of candidates, as HTML."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from scale_rae.acceptance import ACCEPTED
from scale_rae.demo.results import CandidateCard, RankedImage, RankingState, SearchState
from scale_rae.demo.words import sentence
from scale_rae.errors import counted
from scale_rae.ranking import METRICS, number

SCORE_NAMES = {
    **dict.fromkeys(METRICS, "score"),
    "prompt_loss": "prompt loss",
    "prompt_conf_score": "prompt confidence",
    "image_conf_score": "image confidence",
}


def leaderboard(state: RankingState) -> str:
    """Cards in HTML of all images, best first."""
    commands: list[str | None] = [saved.command for saved in state.saved] or [None] * len(state.images)
    cards = "".join(_card(ranked, command) for ranked, command in zip(state.images, commands, strict=True))
    return f'<ol class="board">{cards}</ol>' if cards else ""


def _card(ranked: RankedImage, command: str | None) -> str:
    rows, why, how = _rows(ranked.scores), _why(ranked.why), _how(command)
    state = "kept" if ranked.kept else "dropped"
    return (
        f'<li class="{state}"><img tabindex="0" src="{thumbnail(ranked.image)}" alt="Image in place {ranked.place + 1}, {state}">'
        f'<div><p class="head"><b>{ranked.place + 1}</b> <span class="state">{state}</span> '
        f"{_answer(ranked.answer)}</p>"
        f"{why}<dl>{rows}</dl><p class='seed'>seed {ranked.seed}</p>{how}</div></li>"
    )


def candidate_board(state: SearchState) -> str:
    """Cards in HTML of a search's candidates, in the order of the state; `saved` are those with a place."""
    commands = [saved.command for saved in state.saved]
    cards = "".join(
        _candidate(card, None if card.place is None or not commands else commands[card.place]) for card in state.cards
    )
    return f'<ol class="board search">{cards}</ol>' if cards else ""


def _candidate(card: CandidateCard, command: str | None) -> str:
    kept, shown = card.place is not None, card.fate or "forming"
    state = "kept" if kept else shown
    name = f"Candidate {card.number + 1}"
    picture = f'<div class="blank" role="img" aria-label="{name}, not drawn yet"></div>'
    if card.picture is not None:
        side = 256 if kept else 128
        picture = f'<img tabindex="0" src="{thumbnail(card.picture, side)}" alt="{name}, {shown}">'
    place = f"<b>{card.place + 1}</b> " if card.place is not None else ""
    filled_up = kept and card.fate != ACCEPTED  # too few were accepted
    label = f"kept, though {shown}" if filled_up else shown
    answer = "" if card.answer is None else _answer(card.answer, card.t)
    evaluations = f", {counted(card.evaluations, 'evaluation', '.4g')}" if card.evaluations else ""
    return (
        f'<li class="{state}">{picture}<div><p class="head">{place}<span class="state">{label}</span> {answer}</p>'
        f"{_why(card.why)}<dl>{_rows(card.scores)}</dl>"
        f"<p class='seed'>{name.lower()}, seed {card.seed}{evaluations}</p>{_how(command)}</div></li>"
    )


def _rows(scores: dict[str, float | None]) -> str:
    return "".join(
        f"<div><dt>{html.escape(SCORE_NAMES.get(name, name))}</dt><dd>{'–' if value is None else number(value)}</dd></div>"
        for name, value in scores.items()
    )


def _why(reason: str | None) -> str:
    return f'<p class="why">{sentence(reason)}</p>' if reason else ""


def _how(command: str | None) -> str:
    if command is None:
        return ""
    return f"<details><summary>Command line</summary><code>{html.escape(command)}</code></details>"


def _answer(answer: str, t: float | None = None) -> str:
    at = "" if t is None else f" at t = {t:.2f}"
    return f'<span class="answer {answer}">model says {answer if answer != "uncertain" else "neither"}{at}</span>'


def thumbnail(image: Image.Image, side: int = 256) -> str:
    """A small copy of an image, as a data URL."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
