"""The ranking of a best of N, while its images come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from scale_rae.demo.results import RankedImage, RankingState
from scale_rae.options import PROMPT_PREFIX, Sampling
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.experiment import check_finite, prompt_record
from scale_rae.scaling.explain import why_dropped
from scale_rae.scaling.select import Prompt, Ranking, rank
from scale_rae.scaling.settings import Settings


class BestOf:
    """Images of one prompt and their scores; ranks the images so far."""

    def __init__(
        self, prompt: str, model_path: str, sampling: Sampling, keep: int, metric: str, reward: str | None, text: str
    ) -> None:
        self._settings = Settings(
            metadata_file="",
            model_path=model_path,
            n_samples=keep,
            scaling_rounds=1,
            prompt_prefix=PROMPT_PREFIX,
            seed=sampling.seed,
            reward=reward,
        )
        self._prompt, self._metric, self._text, self._total = PromptRecord(1, prompt, 0), metric, text, 0
        self._total, self._keep = sampling.num_images, keep
        self.seeds: list[int] = []
        self._latents: list[Tensor] = []
        self._images: list[Image.Image] = []
        self._judged: list[dict[str, Any]] = []
        self._rewards: list[float] | None = None if reward is None else []
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
        record = prompt_record(self._settings, self._prompt, self._text, self.seeds, self._judged, self._rewards)
        prompt = Prompt(Path("this prompt"), record, [Path(f"{i:05}.png") for i in range(count)])
        ranking = rank(prompt, self._metric)
        keep = min(self._keep, count)
        return [self._one(prompt, ranking, keep, place, i) for place, i in enumerate(ranking.order)]

    def _one(self, prompt: Prompt, ranking: Ranking, keep: int, place: int, i: int) -> RankedImage:
        judged = self._judged[i]
        scores: dict[str, float | None] = {self._metric: ranking.scores[i]}
        if self._rewards is not None:
            scores["reward"] = self._rewards[i]
        if judged["answer"] != "uncertain":
            scores["confidence"] = judged[f"{judged['answer']}_conf_score"]
        scores |= {name: judged[name] for name in ("prompt_loss", "prompt_conf_score", "image_conf_score")}
        why = why_dropped(prompt, ranking, keep, self._metric, i)
        return RankedImage(
            self._images[i], self._latents[i], self.seeds[i], place, place < keep, judged["answer"], scores, why
        )
