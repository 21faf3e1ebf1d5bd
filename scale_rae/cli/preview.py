"""Shows a picture in the terminal, with textual-image (extra `preview`): by the graphics of Kitty or Sixel, else coloured cells."""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH = 40  # columns, at most: about 20 lines


def show_picture(path: Path) -> None:
    """Prints the picture on stdout if that is a terminal."""
    if not sys.stdout.isatty():
        return
    from rich.console import Console
    from textual_image.renderable import Image  # asks the terminal what it can

    console = Console()
    console.print(Image(path, width=min(WIDTH, console.width)))
