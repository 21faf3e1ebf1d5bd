"""Nothing on the road imports what comes after it (scale_rae's modules lie along it in this order)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scale_rae"
ENTRIES = {PACKAGE / "__main__.py"}
LIBRARY = sorted(p for p in PACKAGE.rglob("*.py") if PACKAGE / "cli" not in p.parents and p not in ENTRIES)


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_knows_the_command_line(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("scale_rae.cli")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_what_stands_on_scaling_knows_scaling(path: Path) -> None:
    if not {PACKAGE / name for name in ("scaling", "serve", "demo")} & {*path.parents}:
        assert not [name for name in imported(path) if name.startswith("scale_rae.scaling")]
