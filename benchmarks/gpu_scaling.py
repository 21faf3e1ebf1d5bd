"""Stage `scaling` of gpu.py: prompts drawn and judged by an experiment's worker."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.gpu_kernels import busy_seconds
from benchmarks.made_up import prompt_that_draws
from scale_rae.options import DEFAULT_STEPS, SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.batches import BatchMaker
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment, Worker


def scaling_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Seconds per prompt of 4 × 2 images: reply, latents, pictures, answers, all scores, files written and synced."""
    prompt = prompt_that_draws(model, 10)
    settings = Settings(
        "prompts.jsonl",
        size,
        prompt_prefix="",
        post_qa_max_new_tokens=16,
        options=SamplingOptions(steps=6 if b.tiny else DEFAULT_STEPS),
        reward=None,
        batch_size=8,
        max_new_tokens=16,
    )
    store = Store(Path(tempfile.mkdtemp(dir=model.source.folder)), settings)
    store.make_folders()
    assignment = Assignment(0, str(b.device), [], [], {})
    index = itertools.count()
    before: dict[str, float] = {}

    def one_prompt() -> None:
        nonlocal before
        before = worker.seconds()
        number = next(index)
        record = PromptRecord(number + 1, prompt, number)
        worker.attempt([record])
        if not store.has_record(record.index):
            raise RuntimeError(f"the prompt failed: {store.failure(record.index)}")

    with Worker(store, BatchMaker(settings, model), 8, assignment, lambda event: None) as worker:
        first, seconds = b.seconds(one_prompt)
        stages = {name: round(value - before.get(name, 0.0), 4) for name, value in worker.seconds().items()}
        name = f"{size}: 4×2 with latent QA (16 tokens) and scores"
        b.add("scaling", name, seconds, "s/prompt", "≤ 1.5" if size != "7b" else "", first=first, stages=stages)
        print(f"          {stages}", flush=True)
        if b.device.type == "cuda":
            share = busy_seconds(one_prompt) / seconds
            b.add("scaling", f"{size}: share of it in GPU kernels", share, "", "≥ 0.90")
