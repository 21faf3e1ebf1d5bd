"""Fills the HTML templates in the package's assets."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from scale_rae.errors import counted


def fill_template(name: str, **values: Any) -> str:
    """A page: the template of that name in the package's assets, with values; it also gets the styles that pages share."""
    from jinja2 import Environment, StrictUndefined

    assets = files("scale_rae").joinpath("assets")
    style, tables = (assets.joinpath(f"{css}.css").read_text(encoding="utf-8") for css in ("page", "tables"))
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    env.filters["counted"] = counted
    return env.from_string(assets.joinpath(name).read_text(encoding="utf-8")).render(
        style=style, tables=tables, **values
    )
