"""The notebook of notebooks/ runs with the bundled model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "scale_rae.ipynb"


def run(code: str, names: dict[str, Any]) -> Any:
    """The value of the last expression of a cell, as a notebook shows it; None if the cell ends otherwise."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return (
        eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if isinstance(last, ast.Expr) else None
    )


def test_every_cell_runs_and_two_show_pictures() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells[:2]] == [["install"], None]
    names: dict[str, Any] = {}
    sources = ["".join(cell["source"]) for cell in cells[1:]]
    assert sum("steps=20" in source for source in sources) == 1
    shown = [run(source.replace("steps=20", "steps=8"), names) for source in sources]
    assert [value.size for value in shown if isinstance(value, Image.Image)] == [(3 * 128, 128), (2 * 128, 128)]
    assert (
        "pink square" in names["model"].answer("Describe this image.", latents=names["drawn"].images[0].latent)[0].text
    )


def test_the_notebook_keeps_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")]
