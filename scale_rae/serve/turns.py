"""The order of clients: they take turns, so that none waits for all requests of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """The order in which clients are served: the one served the longest ago comes first."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._count = 0

    def order(self, items: Iterable[T], client_of: Callable[[T], str]) -> list[T]:
        """The items in rounds: the first item of each client, then the second of each, and so on.

        Items of one client keep their order. Clients that have not been served come first, as they arrived.
        """
        rounds: Counter[str] = Counter()
        keyed: list[tuple[int, int, int, T]] = []
        for i, item in enumerate(items):
            client = client_of(item)
            keyed.append((rounds[client], self.last(client), i, item))
            rounds[client] += 1
        return [item for *_, item in sorted(keyed, key=lambda entry: entry[:3])]

    def last(self, client: str) -> int:
        """The number of the turn in which the client was last served; 0 if it was not."""
        return self._served.get(client, 0)

    def serve(self, clients: Iterable[str]) -> None:
        """Notes that these clients have had their turn."""
        for client in clients:
            self._count += 1
            self._served[client] = self._count

    def keep(self, clients: Collection[str]) -> None:
        """Forgets all clients but these."""
        for client in self._served.keys() - clients:
            del self._served[client]
