"""Pages: what they link to and which modules they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "recipes" / "shapes" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_pages_name_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    files = re.findall(r"\b((?:scale_rae|benchmarks|recipes|tests)/[\w/]+\.py)\b", text)
    files += re.findall(r"python ((?:[\w/]+/)?\w+\.py)", text)
    assert not [file for file in files if not (ROOT / file).exists()]
    modules = re.findall(r"`scale_rae\.([a-z_0-9.]+)", text)
    parts = [module.rstrip(".").split(".") for module in modules]
    package = ROOT / "scale_rae"
    known = {p.stem for p in package.iterdir()} | {"load", "__version__"}
    assert not [part for part in parts if part[0] not in known]
