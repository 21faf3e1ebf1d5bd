"""Restricts gradio: imported without its environment variables; its components read only files in the page's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scale_rae.demo.surroundings import settle, without_clients

settle()
with without_clients():
    import gradio as gr

__all__ = ["fence", "gr", "texts"]


def fence(block: Any, folder: Path) -> None:
    """Limits a component's files to those in `folder`: uploads, and the page's copies of drawn images.

    By itself gradio also fetches addresses, and serves files of the working folder and the temporary folder.
    """

    async def inside(file: str | Path | None) -> str | None:
        path = _inside(file, folder)
        if path is not None:
            block.temp_files.add(path)  # removed when it is a day old
        return path

    block.async_move_resource_to_block_cache = inside
    if isinstance(block, gr.Image | gr.File):
        # The uploaded file as it is: gradio would open images before the handlers, with every decoder that Pillow has.
        block.preprocess = lambda payload: _inside(payload.path, folder) if payload else None
    elif isinstance(block, gr.Chatbot):
        block.preprocess = texts  # gradio would turn parts of a message into components and files


def _inside(file: str | Path | None, folder: Path) -> str | None:
    """The path of a file, unchanged.

    Raises:
        gr.Error: when it is not in `folder`.
    """
    if file is None:
        return None
    if "\0" in str(file) or not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise gr.Error("Only a file that was uploaded to this page can be read.", print_exception=False)
    return str(file)


def texts(payload: Any) -> list[dict[str, Any]]:
    """The messages of a conversation that have text: role and text of each."""
    found = []
    for message in payload.root if payload else []:
        text = "".join(part.text for part in message.content if part.type == "text")
        if message.role in ("user", "assistant") and text:
            found.append({"role": message.role, "content": text})
    return found
