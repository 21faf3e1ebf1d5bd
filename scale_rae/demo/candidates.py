"""The demo's adaptive search: the candidates so far, as cards for the page. Independent of gradio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from scale_rae import acceptance
from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED, Candidate, Rules
from scale_rae.adaptive import Drawn
from scale_rae.demo.results import CandidateCard, SearchState
from scale_rae.errors import ScaleRAEError, counted
from scale_rae.flow import StepCallback
from scale_rae.pipeline import ScaleRAE

PREVIEWS = 6  # pictures shown of a candidate that forms


class Candidates:
    """The candidates of one prompt. `update` is the `watch` of a Searcher; `now` gives all cards."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self._keep, self._most = rules, rules.keep, rules.most
        self._candidates: dict[int, Candidate] = {}
        self._pictures: dict[int, Image.Image] = {}
        self._latents: dict[int, Tensor] = {}  # of finished images

    def update(self, drawn: Drawn) -> None:
        """Takes what is known of a candidate, not what the sampler remembers of it."""
        number = drawn.candidate.number
        self._candidates[number] = drawn.candidate
        if drawn.picture is not None:
            self._pictures[number] = drawn.picture
        if drawn.candidate.final is not None:
            self._latents[number] = drawn.latent

    def forming(self, some: Sequence[Drawn], model: ScaleRAE, show: Callable[[str], None]) -> StepCallback:
        """The sampler's callback while it draws `some`: a few times, decodes what they are on their way to, and shows it."""
        lowest = 1.0

        def step(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
            nonlocal lowest
            if evaluation % max(1, evaluations // PREVIEWS):
                return
            if t <= lowest:  # not the published loop's odd last step, whose estimate is far off
                lowest = t
                try:
                    pictures = model.decode(model.estimate(t, x, v))
                except ScaleRAEError:
                    return  # the sampler raises an error that says more
                for drawn, picture in zip(some, pictures, strict=False):  # a batch may be padded
                    self._pictures[drawn.candidate.number] = picture
            show(f"Drawing {self.names(some)}: {evaluation} of {evaluations}")

        return step

    def names(self, some: Sequence[Drawn]) -> str:
        """The numbers of candidates as the page shows them, from 1."""
        numbers = [d.candidate.number + 1 for d in some]
        return f"candidate{'s' if len(numbers) > 1 else ''} {', '.join(str(n) for n in numbers)}"

    def now(self, progress: str) -> SearchState:
        """All cards in the order in which the candidates were begun; accepted ones have their place so far."""
        candidates = list(self._candidates.values())
        accepted = self._count(ACCEPTED)
        places = {n: place for place, n in enumerate(acceptance.kept(candidates, self.rules)[:accepted])}
        decided = sum(bool(c.fate) or c.is_revived for c in candidates)
        done = max(accepted / self._keep, decided / self._most)
        return SearchState([self._card(c, places.get(c.number)) for c in candidates], min(done, 1.0), progress, [])

    def finished(self) -> tuple[SearchState, list[tuple[Image.Image, Tensor, int]]]:
        """The cards at the end, the kept images first; and image, latent and seed of each of those, best first."""
        kept = acceptance.kept(list(self._candidates.values()), self.rules)
        others = [n for n in self._candidates if n not in kept]
        cards = [self._card(self._candidates[n], place) for place, n in enumerate(kept)]
        cards += [self._card(self._candidates[n], None) for n in others]
        images = [(self._pictures[n], self._latents[n], self._candidates[n].seed) for n in kept]
        return SearchState(cards, 1.0, self._summary(), []), images

    def _count(self, fate: str) -> int:
        return Counter(c.fate for c in self._candidates.values())[fate]

    def _summary(self) -> str:
        begun, accepted = len(self._candidates), self._count(ACCEPTED)
        evaluations = sum(c.evaluations for c in self._candidates.values())
        said = (
            f"{counted(begun, 'candidate')} begun, {self._count(DROPPED)} dropped, "
            f"{self._count(REJECTED)} rejected, {accepted} accepted; {counted(round(evaluations), 'evaluation')} of the network, looks included."
        )
        if accepted >= self._keep:
            return said
        if not accepted:
            kept = (
                "image that was drawn is kept" if self._keep == 1 else f"{self._keep} images that were drawn are kept"
            )
            return f"{said} None was accepted: the best {kept}."
        return f"{said} Only {accepted} of {self._keep} accepted: the best of the rejected images are kept too."

    def _card(self, candidate: Candidate, place: int | None) -> CandidateCard:
        look = candidate.final or (candidate.looks[-1] if candidate.looks else None)
        scores: dict[str, float | None] = {}
        if look is not None:
            judged = look.judgement
            if look.reward is not None:
                scores["reward"] = look.reward
            if judged["answer"] != "uncertain":
                scores["confidence"] = judged[f"{judged['answer']}_conf_score"]
            scores["prompt_conf_score"] = judged["prompt_conf_score"]
        return CandidateCard(
            self._pictures.get(candidate.number),
            candidate.number,
            candidate.seed,
            candidate.fate,
            place,
            None if look is None else look.judgement["answer"],
            None if look is None else look.t,
            scores,
            candidate.reason,
            candidate.evaluations,
        )
