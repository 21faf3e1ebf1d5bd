"""Stage `search` of gpu.py: adaptive search against 4 × 8 images, as an experiment's worker runs both."""

from __future__ import annotations

import dataclasses
import itertools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.gpu_kernels import busy_seconds
from benchmarks.made_up import prompt_that_draws
from scale_rae.options import SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.batches import BatchMaker
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, Worker
from scale_rae.scores import EarlyScore, Score

# Shares of candidates that the model says no to. With `_said`'s confidences, 8.8 candidates are begun and 5.3 finished per
# prompt, as by the bundled model without a reward at guidance 1 (replayed by study_search.py).
EARLY_NO, FINAL_NO = 0.20, 0.05
ANSWER_TOKENS = 2  # the word and the end of the reply, as a trained model answers; made-up weights never end a reply
S = TypeVar("S", Score, EarlyScore)


def search_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Prompts per second of 4 × 8 and of adaptive search for 4, both with 20 evaluations, answers, scores and files.

    Made-up weights accept nothing, so answers are drawn at random, after the model has given its own at their full cost.
    """
    steps = 4 if b.tiny else 20
    together = 2 if b.tiny else 64
    best = Settings(
        "prompts.jsonl",
        size,
        scaling_rounds=2 if b.tiny else 8,
        prompt_prefix="",
        post_qa_max_new_tokens=ANSWER_TOKENS,
        options=SamplingOptions(steps=steps, solver="ab2"),
        reward=None,
        batch_size=32,
        max_new_tokens=16,
    )
    adaptive = dataclasses.replace(best, search="adaptive")
    model.expect(10_000)  # as an experiment of hundreds of prompts does: what pays is compiled in the first run
    read = model.score_each, model.score_early
    model.score_each = _stub(read[0], FINAL_NO)  # type: ignore[method-assign]
    model.score_early = _stub(read[1], EARLY_NO)  # type: ignore[method-assign]
    try:
        rates = {
            "4×8": _prompts_per_second(b, model, size, best, 1, "4×8, 32 images at once"),
            "adaptive": _prompts_per_second(
                b, model, size, adaptive, together, f"adaptive, {together} prompts together"
            ),
        }
    finally:
        model.score_each, model.score_early = read  # type: ignore[method-assign]
    b.add("search", f"{size}: adaptive over 4×8", rates["adaptive"] / rates["4×8"], "×", "≥ 3.5")


def _prompts_per_second(b: Bench, model: ScaleRAE, size: str, settings: Settings, together: int, name: str) -> float:
    prompt = prompt_that_draws(model, 10)
    store = Store(Path(tempfile.mkdtemp(dir=model.source.folder)), settings)
    store.make_folders()
    numbers = itertools.count(1)
    drawn: list[float] = []
    begun: list[float] = []

    def one_group() -> None:
        group = [PromptRecord(i, prompt, i) for i in itertools.islice(numbers, together)]
        worker.attempt(group)
        for record in group:
            if not store.has_record(record.index):
                raise RuntimeError(f"a prompt failed: {store.failure(record.index)}")
        drawn.append(sum(len(store.answers(record.index)) for record in group) / together)
        begun.append(sum(_begun(store, record.index) for record in group) / together)

    before: dict[str, float] = {}
    with Worker(
        store, BatchMaker(settings, model), 32, Assignment(0, str(b.device), [], [], {}), lambda e: None
    ) as worker:

        def timed_group() -> None:
            nonlocal before
            before = worker.seconds()
            one_group()

        # Sizes of batches that the first group lacks are compiled and captured in a group of their own.
        if settings.is_adaptive:
            one_group()
        # A group of many prompts is an average by itself.
        first, seconds = b.seconds(timed_group, repeat=1 if settings.is_adaptive else None)
        stages = {key: round(value - before.get(key, 0.0), 4) for key, value in worker.seconds().items()}
        candidates, images = sum(begun) / len(begun), sum(drawn) / len(drawn)
        b.add(
            "search",
            f"{size}: {name}",
            together / seconds,
            "prompts/s",
            first=first,
            stages=stages,
            begun=candidates,
            finished=images,
        )
        print(f"          {stages}, per prompt {candidates:.2f} begun, {images:.2f} finished", flush=True)
        if b.device.type == "cuda":
            target = "≥ 0.85" if settings.is_adaptive else ""
            b.add("search", f"{size}: share of it in GPU kernels", busy_seconds(one_group) / seconds, "", target)
    return together / seconds


def _begun(store: Store, index: int) -> int:
    """How many candidates of a prompt were begun, or images drawn."""
    batches = store.batches(index)[0]
    return len({c.number for b in batches for c in b.searched()}) or sum(len(b.samples) for b in batches)


def _stub(read: Callable[..., list[S]], no: float) -> Callable[..., list[S]]:
    """A reader that costs what `read` costs and says no to a share `no` of latents, always to the same ones."""

    def scores(latents: Sequence[Tensor], *about: Any) -> list[S]:
        found = read(latents, *about)
        return [_said(score, random.Random(float(x[0, 0])), no) for score, x in zip(found, latents, strict=True)]

    return scores


def _said(score: S, chance: random.Random, no: float) -> S:
    says_no = chance.random() < no
    # A few candidates are far below the mean, as with trained models; made-up weights' confidences hardly differ.
    numbers = {"yes_conf_score": 0.0 if says_no else 10.0, "prompt_conf_score": 10 - chance.expovariate(1)}
    return dataclasses.replace(score, answer="no" if says_no else "yes", **numbers)  # type: ignore[arg-type]
