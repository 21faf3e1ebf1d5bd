"""Pictures that answers link to, kept in memory until they expire. No torch."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from scale_rae.serve.settings import PICTURE_FILES


@dataclass(frozen=True)
class LinkedPicture:
    """A picture's file, its media type, and when it expires, on time.monotonic's clock."""

    data: bytes
    media_type: str
    expires: float


class Links:
    """Pictures by names that cannot be guessed.

    A picture is dropped after `seconds`, or earlier if all pictures would take more than `most` bytes; the oldest go first.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self.seconds, self._most = seconds, most
        self._pictures: OrderedDict[str, LinkedPicture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, form: str) -> str:
        """The name of a new picture, with the form as its suffix."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        with self._lock:
            self._pictures[name] = LinkedPicture(data, f"image/{form}", time.monotonic() + self.seconds)
            self._bytes += len(data)
            self._drop()
        return name

    def get(self, name: str) -> LinkedPicture | None:
        """The picture, or None if there is none of that name or it has expired."""
        with self._lock:
            self._drop()
            return self._pictures.get(name)

    def _drop(self) -> None:
        now = time.monotonic()
        while self._pictures:
            oldest = next(iter(self._pictures.values()))
            if oldest.expires > now and self._bytes <= self._most:
                return
            self._bytes -= len(self._pictures.popitem(last=False)[1].data)


def link_to(name: str, base: object) -> str:
    """The address of the picture `name` on the server whose address is `base`."""
    return f"{str(base).rstrip('/')}{PICTURE_FILES}/{name}"
