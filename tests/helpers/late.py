"""Modules that are imported once a test uses them.

Each process of a parallel run collects all tests and runs some of them; gradio, diffusers and openai take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """The module of that name, which is imported when one of its public names is first asked for."""

    __slots__ = ("_name",)  # so that replacing something here, which the module would not see, fails

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by pytest, which looks for tests
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
