"""Shows a picture in the terminal, with textual-image (extra `preview`): by Sixel's or Kitty's graphics, else coloured cells."""

from __future__ import annotations

import sys
from pathlib import Path

from scale_rae.errors import first_line

WIDTH = 40  # columns, at most: about 20 lines


def show_picture(path: Path) -> str | None:
    """Prints the picture on stdout; the reason why not, where that is no terminal or cannot show it."""
    if not sys.stdout.isatty():
        return "stdout is no terminal"
    from rich.console import Console

    try:
        from textual_image.renderable import Image  # asks the terminal what it can

        console = Console()
        console.print(Image(path, width=min(WIDTH, console.width), height="auto"))
    except Exception as e:  # the picture is saved; what a terminal answers must not fail the command
        return f"the terminal cannot show it ({first_line(e)})"
    return None
