"""Writes the pages of the documentation site to build/pages, and its settings; `zensical build` makes the site of them.

In the repository, every page is readable where it lies, and its links are relative to its own folder. On the site, README.md is
the first page, and OTHER_PAGES keep their paths. A link to a file that is no page becomes a link to the repository's web page.

    python scripts/site.py && zensical build --strict --config-file build/zensical.toml
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "pages"
OTHER_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "recipes/shapes/README.md": "recipes/shapes/README.md",
}
PICTURES = ("recipes/shapes/curves.png",)
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def places() -> dict[str, str]:
    """The site's path of every page and picture, by its path in the repository."""
    inside = {
        f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in (ROOT / "docs").rglob("*") if path.is_file()
    }
    inside = {name for name in inside if name.endswith((".md", ".png"))}
    return {name: name.removeprefix("docs/") for name in inside} | OTHER_PAGES | {name: name for name in PICTURES}


def page(source: str, place: dict[str, str], repository: str) -> str:
    """The text of the page `source`, with links as the site needs them.

    Raises FileNotFoundError if a link leads to no file of the repository.
    """

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        anchor = match[2] or ""
        if target in place:
            return f"]({posixpath.relpath(place[target], posixpath.dirname(place[source]) or '.')}{anchor})"
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {match[1]}, which does not exist")
        return f"]({repository}/blob/main/{target}{anchor})"

    # The text of a link may contain code, but code contains no links.
    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub("ADDRESS(.*?) *# ADDRESS.*", rf"{repository}\1", text)  # as in setup.py
    code = CODE.findall(text)
    return CODE.sub(lambda _: code.pop(0), LINK.sub(moved, CODE.sub("`code`", text)))


def main() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    shutil.rmtree(OUT, ignore_errors=True)
    place = places()
    for source, name in place.items():
        (OUT / name).parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            (OUT / name).write_text(page(source, place, urls["Repository"]), encoding="utf-8")
        else:
            shutil.copy(ROOT / source, OUT / name)
    # Without the site's address, its sitemap is empty, and its page for addresses that do not exist finds no style sheets.
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    settings = settings.replace("[project]\n", f'[project]\nsite_url = "{urls["Documentation"].rstrip("/")}/"\n', 1)
    (OUT.parent / "zensical.toml").write_text(settings, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(str(error))
