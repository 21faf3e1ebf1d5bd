"""Batches as tensors: latents, conditions and sequences, read while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_rae.language import LanguageModel
from scale_rae.noise import image_seed
from scale_rae.prompt import IMAGE
from scale_rae.training.sequences import QUERIES, TokenSequence

_WIDTH = 8  # sequences are padded to a multiple of this, for aligned products


class Counts(NamedTuple):
    """What one record adds to the totals of a step."""

    pictures: int  # that it draws
    tokens: int = 0  # that the text loss learns
    kept: bool = False  # as in `Sample`


@dataclass(frozen=True)
class Sample:
    """One record in memory.

    `drawn` and `shown` are latents [L, C] of its pictures, not normalised, in order. `condition` [pictures, L, Z] is given if
    the language model is frozen, or if the record is `kept`. A kept record has a picture that the model drew before training,
    and its target is the velocity before training. `seed` seeds all random numbers of the sample in this step.
    """

    where: str
    sequence: TokenSequence
    drawn: tuple[Tensor, ...]
    shown: tuple[Tensor, ...]
    condition: Tensor | None
    seed: int
    kept: bool = False


@dataclass(frozen=True)
class Scored:
    """A batch of the model's own drawings, with what is random about them in a step.

    `where` are the places of their prompts. `optimality` [B] in 0..1 is how good each is among the drawings of its prompt. With
    `folds`, guidance's velocity is learnt from them, whatever their optimality. Those that are `dropped` [B] keep the velocity
    of the null embedding as it is.
    """

    where: Sequence[str]
    x: Tensor  # [B, C, S, S], normalised
    conditions: Tensor  # [B, L, Z]
    optimality: Tensor
    t: Tensor  # [B]
    noise: Tensor  # [B, C, S, S]
    dropped: Tensor
    folds: bool


class Order:
    """The record at each place of each step: epochs over all records, each in a new random order.

    Kept records are numbered after the others. If there are any, they take every other place, in epochs of their own.
    """

    def __init__(self, records: int, batch: int, seed: int, kept: int = 0) -> None:
        """`batch` records a step, over all devices; `records` and `kept` are how many there are of each."""
        self.records, self.batch, self.seed, self.kept = records, batch, seed, kept
        self._epochs: dict[tuple[int, int], list[int]] = {}

    def record(self, step: int, place: int) -> int:
        """The number of the record at `place` of a step; the first step is 1."""
        at = (step - 1) * self.batch + place
        if not self.kept:
            return self._of_epochs(at, 0, self.records)
        if at % 2:
            return self.records + self._of_epochs(at // 2, 1, self.kept)
        return self._of_epochs(at // 2, 0, self.records)

    def _of_epochs(self, at: int, stream: int, count: int) -> int:
        """The number at place `at` of a stream of epochs, each a random order of 0 … count - 1."""
        number, within = divmod(at, count)
        if (number, stream) not in self._epochs:
            if len(self._epochs) > 8:
                self._epochs.clear()
            generator = torch.Generator().manual_seed(image_seed(self.seed, 2 * number + stream, 1))
            self._epochs[number, stream] = torch.randperm(count, generator=generator).tolist()
        return self._epochs[number, stream][within]

    def sample_seed(self, step: int, place: int) -> int:
        """The seed of what is random about a place of a step, the same for any number of devices."""
        return image_seed(self.seed, step, place + 2)


def ahead(
    load: Callable[[int], list[Sample]], first: int, stop: int, depth: int = 2
) -> Generator[list[Sample], None, None]:
    """`load(i)` for i from `first` to `stop` - 1, computed on a thread up to `depth` items in advance."""
    with ThreadPoolExecutor(1, "records") as pool:
        waiting: list[Future[list[Sample]]] = []
        following = first
        try:
            while waiting or following < stop:
                while following < stop and len(waiting) <= depth:
                    waiting.append(pool.submit(load, following))
                    following += 1
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


class Records:
    """Batches of records, in an order, read while the device computes."""

    def __init__(
        self,
        order: Order,
        counts: Sequence[Counts],
        load: Callable[[int, int], Sample],
        batch: int,
        parts: int,
        index: int = 0,
        size: int = 1,
    ) -> None:
        """`counts` are those of each record; `load(record, seed)` reads a sample.

        `batch` are the records of one of a step's `parts` in one of `size` processes; this one has the number `index`.
        """
        self._order, self._counts, self._load = order, counts, load
        self._batch, self._parts, self._index, self._size = batch, parts, index, size

    def counts(self, step: int) -> list[Counts]:
        """The counts of all records of a step."""
        return [self._counts[self._order.record(step, place)] for place in range(self._order.batch)]

    def parts(self, first: int, stop: int) -> Generator[list[Sample], None, None]:
        """This process's samples of each part."""
        return ahead(self._part, first, stop)

    def where(self, batch: Sequence[Sample]) -> list[str]:
        """Where the samples come from."""
        return [sample.where for sample in batch]

    def numbers(self) -> dict[str, Any]:
        """Nothing: records have no numbers of their own."""
        return {}

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: a step's batch depends on its number alone."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""

    def _part(self, number: int) -> list[Sample]:
        """This process's samples of part `number`, counted over all steps."""
        step, order = number // self._parts + 1, self._order
        start = (number % self._parts * self._size + self._index) * self._batch
        places = range(start, start + self._batch)
        return [self._load(order.record(step, place), order.sample_seed(step, place)) for place in places]


@dataclass(frozen=True)
class EmbeddedSequences:
    """Embeddings [B, T, H] of sequences, and positions in them as pairs (rows, places)."""

    embeds: Tensor
    queries: tuple[Tensor, Tensor]  # of all latent queries, in the order of the drawn pictures
    learnt: tuple[Tensor, Tensor]  # of the places whose next token is learnt
    targets: Tensor  # those tokens


def embed(language: LanguageModel, sequences: Sequence[TokenSequence], shown: Sequence[Tensor]) -> EmbeddedSequences:
    """The language model's input for sequences, padded on the right.

    `shown` are the latents [L, C] of the shown pictures in order.
    """
    tokens, device = language.config.tokens, language.device
    rows = [_expanded(sequence, tokens) for sequence in sequences]
    width = -(-max(len(ids) for ids, _ in rows) // _WIDTH) * _WIDTH
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])  # on the CPU, where places are looked up
    learnt = torch.tensor([flags + [False] * (width - len(flags)) for _, flags in rows])
    learnt[:, 0] = False  # nothing comes before it
    images, queries = ((ids == mark).nonzero(as_tuple=True) for mark in (IMAGE, QUERIES))
    row, place = learnt.nonzero(as_tuple=True)
    plain = ids.clamp(min=0).to(device)
    embeds: Tensor = language.model.embed_tokens(plain)
    embeds = embeds.to(language.dtype)
    if shown:
        projected = language.project(shown).flatten(0, 1)
        embeds = embeds.index_put((images[0].to(device), images[1].to(device)), projected)
    queries = queries[0].to(device), queries[1].to(device)
    if len(queries[0]):
        own = language.model.latent_queries.to(language.dtype)
        embeds = embeds.index_put(queries, own.repeat(len(queries[0]) // tokens, 1))
    targets = ids[row, place].to(device)
    return EmbeddedSequences(embeds, queries, (row.to(device), (place - 1).to(device)), targets)


def _expanded(sequence: TokenSequence, tokens: int) -> tuple[list[int], list[bool]]:
    """Ids with a picture's mark at each of its places, and which are learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    for i, flag in zip(sequence.ids, sequence.learnt, strict=True):
        count = tokens if i in (IMAGE, QUERIES) else 1
        ids += [i] * count
        learnt += [flag and count == 1] * count
    return ids, learnt
