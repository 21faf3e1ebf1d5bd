"""The demo's table of ranked images, as HTML."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from scale_rae.demo.results import RankedImage, RankingState
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
    rows = "".join(
        f"<div><dt>{html.escape(SCORE_NAMES.get(name, name))}</dt><dd>{'–' if value is None else number(value)}</dd></div>"
        for name, value in ranked.scores.items()
    )
    state = "kept" if ranked.kept else "dropped"
    why = f'<p class="why">{html.escape(ranked.why)}</p>' if ranked.why else ""
    how = ""
    if command is not None:
        how = f"<details><summary>Command line</summary><code>{html.escape(command)}</code></details>"
    return (
        f'<li class="{state}"><img src="{thumbnail(ranked.image)}" alt="Image in place {ranked.place + 1}, {state}">'
        f'<div><p class="head"><b>{ranked.place + 1}</b> <span class="state">{state}</span> '
        f'<span class="answer {ranked.answer}">model says {ranked.answer if ranked.answer != "uncertain" else "neither"}</span></p>'
        f"{why}<dl>{rows}</dl><p class='seed'>seed {ranked.seed}</p>{how}</div></li>"
    )


def thumbnail(image: Image.Image, side: int = 256) -> str:
    """A small copy of an image, as a data URL."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
