"""The demo's best of N: collects scores while images are drawn, and ranks the images so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from scale_rae.demo.results import RankedImage, RankingState
from scale_rae.ranking import Ranking, Verdicts, rank, why_dropped
from scale_rae.scaling.experiment import check_finite


class BestOf:
    """Images of one prompt and their scores; ranks the images so far."""

    def __init__(self, total: int, keep: int, metric: str, with_reward: bool) -> None:
        self._metric = metric
        self._total, self._keep = total, keep
        self.seeds: list[int] = []
        self._latents: list[Tensor] = []
        self._images: list[Image.Image] = []
        self._judged: list[dict[str, Any]] = []
        self._rewards: list[float] | None = [] if with_reward else None
        self._last: list[RankedImage] = []

    def add(
        self,
        seeds: Sequence[int],
        latents: Sequence[Tensor],
        images: Sequence[Image.Image],
        judged: Sequence[dict[str, Any]],
        rewards: Sequence[float] | None,
    ) -> None:
        """Adds images; raises InputError when a score is not a number."""
        check_finite(judged, rewards)
        self.seeds += seeds
        self._latents += latents
        self._images += images
        self._judged += judged
        if self._rewards is not None and rewards is not None:
            self._rewards += rewards
        self._last = self._rank()

    def now(self, progress: str) -> RankingState:
        """The ranking so far."""
        return RankingState(self._last, self._total, progress, [])

    def _rank(self) -> list[RankedImage]:
        count = len(self.seeds)
        verdicts = Verdicts.made(self._judged, self._rewards)
        ranking = rank(verdicts, self._metric)
        keep = min(self._keep, count)
        return [self._one(verdicts, ranking, keep, place, i) for place, i in enumerate(ranking.order)]

    def _one(self, verdicts: Verdicts, ranking: Ranking, keep: int, place: int, i: int) -> RankedImage:
        judged = self._judged[i]
        scores: dict[str, float | None] = {self._metric: ranking.scores[i]}
        if self._rewards is not None:
            scores["reward"] = self._rewards[i]
        if judged["answer"] != "uncertain":
            scores["confidence"] = judged[f"{judged['answer']}_conf_score"]
        scores |= {name: judged[name] for name in ("prompt_loss", "prompt_conf_score", "image_conf_score")}
        why = why_dropped(verdicts, ranking, keep, self._metric, i)
        return RankedImage(
            self._images[i], self._latents[i], self.seeds[i], place, place < keep, judged["answer"], scores, why
        )
