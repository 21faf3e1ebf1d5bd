"""Gives the README of a release links that work on a package index; everything else is in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import setup

try:
    import tomllib
except ModuleNotFoundError:  # pip runs this file before it reads requires-python
    sys.exit(f"error: scale-rae needs Python 3.11 or newer; this is Python {sys.version.split()[0]}")

ROOT = Path(__file__).parent


def readme(version: str, repository: str) -> str:
    """README.md with links to `repository`'s files of release `version`, and its address where one clones it."""

    def absolute(match: re.Match[str]) -> str:
        view = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({repository}/{view}/v{version}/{match['path']})"

    link = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?://|#)[^)]+)\)")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return link.sub(absolute, re.sub("ADDRESS(.*?) *# ADDRESS.*", rf"{repository}\1", text))


project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    long_description=readme(project["version"], project["urls"]["Repository"].removesuffix("/")),
    long_description_content_type="text/markdown",
)
