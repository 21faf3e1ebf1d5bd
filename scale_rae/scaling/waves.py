"""Adaptive searches of an experiment's prompts: stored waves are read, the others drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from scale_rae.acceptance import with_wave
from scale_rae.outputs import latent_bytes, png_bytes
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.batches import Replied
from scale_rae.scaling.experiment import candidate_record, check_finite, image_numbers, png_text
from scale_rae.scaling.records import Batch, dropped_name
from scale_rae.scaling.store import Store

if TYPE_CHECKING:
    from scale_rae.adaptive import Drawn, Search, Searcher
    from scale_rae.pipeline import ScaleRAE


class Writes:
    """For a `with`: runs functions that write files, one after the other, in a thread.

    The end of the `with` waits for them. Waves of a prompt are stored in their order, so that after a kill none is there
    without those before it. `count` is called, in the caller's thread, with the number of images that a function has stored.
    """

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count
        self._thread = ThreadPoolExecutor(1)
        self._underway: deque[tuple[Future[None], int]] = deque()
        self._failed = False

    def __enter__(self) -> Writes:
        return self

    def add(self, write: Callable[[], None], images: int) -> None:
        """Has `write` called after all that were added before, unless one of them failed."""
        self._underway.append((self._thread.submit(self._run, write), images))

    def _run(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            write()
        except BaseException:
            self._failed = True
            raise

    def settle(self, wait: bool = False) -> None:
        """Counts what is stored by now or, with `wait`, all. Raises what a function raised."""
        while self._underway and (wait or self._underway[0][0].done()):
            written, images = self._underway.popleft()
            written.result()
            self._count(images)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.settle(wait=True)
        finally:
            self._thread.shutdown(cancel_futures=True)


class WaveWriter:
    """Takes prompts through their rounds together; stores each wave while the next is drawn.

    On a GPU, rounding depends on what is drawn together. A round that some prompt lacks is therefore drawn again for all of
    them, so that a run that was killed ends with the bytes of one that was not. On a CPU (`exact`) only what lacks is drawn.
    """

    def __init__(
        self,
        store: Store,
        model: ScaleRAE,
        searcher: Searcher,
        encoders: Executor,
        exact: bool,
        count: Callable[[int], None],
    ) -> None:
        self._store, self._model, self._searcher = store, model, searcher
        self._encoders, self._exact = encoders, exact
        self._count = count  # called with the number of images that were finished

    def search(self, replies: Sequence[Replied], unfinished: Sequence[PromptRecord]) -> None:
        """Draws and stores the waves that prompts lack.

        `replies` are those of all prompts that are drawn together.

        Raises:
            OutputError: when something cannot be written. ScaleRAEError: when something cannot be drawn.
        """
        from scale_rae.adaptive import Search
        from scale_rae.noise import image_seed
        from scale_rae.scores import Asked

        lacking = {p.index for p in unfinished}
        searches: dict[int, Search] = {}
        waves: dict[int, list[Batch]] = {}
        by_index = {replied.prompt.index: replied for replied in replies}
        for index, replied in by_index.items():
            asked = Asked(replied.prompt.prompt, replied.request, replied.reply)
            searches[index] = Search(asked, partial(image_seed, self._store.settings.seed, index))
            waves[index] = self._store.reopen(index) if index in lacking else self._store.batches(index)[0]
        with Writes(self._count) as underway:
            round_number = 0
            while going := [index for index, search in searches.items() if not self._searcher.is_over(search)]:
                underway.settle()
                without = [index for index in going if len(waves[index]) <= round_number]
                to_draw = without if self._exact or not without else going
                for index in going:
                    if index not in to_draw:
                        wave = waves[index][round_number].searched()
                        searches[index].candidates = with_wave(searches[index].candidates, wave)
                drawn = self._searcher.next_round([searches[index] for index in to_draw]) if to_draw else []
                for index, new in zip(to_draw, drawn, strict=True):
                    if index in without:
                        underway.add(*self._wave(by_index[index], searches[index], new))
                round_number += 1

    def _encode(self, drawn: Drawn, text: Mapping[str, str]) -> Future[bytes]:
        assert drawn.picture is not None
        return self._encoders.submit(png_bytes, drawn.picture, text)

    def _wave(self, replied: Replied, search: Search, wave: Sequence[Drawn]) -> tuple[Callable[[], None], int]:
        """(a function that stores a prompt's wave, the number of its finished images).

        The wave has what became of every candidate, too.
        """
        settings, index = self._store.settings, replied.prompt.index
        new = {d.candidate.number for d in wave}
        start = sum(c.final is not None for c in search.candidates if c.number not in new)
        images = image_numbers([d.candidate for d in wave], start)
        finished = [d for d in wave if d.candidate.final is not None]
        finals = [d.candidate.final for d in finished if d.candidate.final is not None]
        judged = [dict(final.judgement) for final in finals]
        rewards = [final.reward for final in finals if final.reward is not None] if settings.reward else None
        check_finite(judged, rewards)
        for drawn in wave:
            check_finite([look.record() for look in drawn.candidate.looks], None)
        files: dict[str, bytes] = {}
        pngs: dict[str, Future[bytes]] = {}
        for drawn in wave:
            number, seed = drawn.candidate.number, drawn.candidate.seed
            text = png_text(settings, replied.request, seed)
            if number in images:
                pngs[f"{images[number]:05}.png"] = self._encode(drawn, text)
                if settings.save_latents:
                    files[f"{images[number]:05}_latent.pt"] = latent_bytes(drawn.latent)
            elif settings.adaptive.save_dropped:
                pngs[dropped_name(drawn.candidate)] = self._encode(drawn, text)
        batch = Batch(
            start,
            self._model.tokenizer.decode(replied.reply.ids),
            [d.candidate.seed for d in finished],
            judged,
            rewards,
            {},
            [candidate_record(d.candidate, images.get(d.candidate.number)) for d in wave],
        )

        def write() -> None:
            self._store.save_batch(index, batch, {name: png.result() for name, png in pngs.items()} | files)

        return write, len(finished)
