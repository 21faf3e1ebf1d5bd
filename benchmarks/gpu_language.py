"""Stage `tokens` of gpu.py: tokens per second of replies and answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.bench import Bench
from benchmarks.made_up import prompt_of
from scale_rae.language import Conversation, LanguageModel
from scale_rae.options import Speed
from scale_rae.pipeline import ScaleRAE


def tokens_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Greedy tokens per second, prefill included: replies to 40-token prompts and answers about latents."""
    prompt = prompt_of(model, 40)
    latent = torch.randn(model.config.tokens, model.config.channels, generator=torch.Generator().manual_seed(1))
    count = 8 if b.tiny else 128
    compiling = model.speed.compile == "on"
    cases = [("reply", 1, compiling), ("reply", 32, compiling), ("answer", 1, compiling), ("answer", 32, compiling)]
    if compiling:
        cases += [("reply", 1, False), ("reply", 32, False)]
    for kind, batch, compile_steps in cases:
        ids = model.tokenizer.chat(prompt, image=kind == "answer")
        conversations = [Conversation(ids, latent if kind == "answer" else None)] * batch
        language = model.language if compile_steps == compiling else model.with_speed(Speed("off")).language

        runs: list[list[float]] = []  # of each run: when it began, then when each token arrived

        def run(
            language: LanguageModel = language,
            conversations: Sequence[Conversation] = conversations,
            runs: list[list[float]] = runs,
        ) -> None:
            def hear(row: int, token: int) -> bool:
                if row == 0:
                    at.append(time.perf_counter())
                return True

            at = [time.perf_counter()]
            runs.append(at)
            limits = [count] * len(conversations)
            replies = language.reply(conversations, limits, stop=-1, image_start=-1, listen=hear)
            assert all(len(r.ids) == count for r in replies)

        first, seconds = b.seconds(run)
        to_first = statistics.median(at[1] - at[0] for at in runs[1:] or runs)
        each = statistics.median((at[-1] - at[1]) / (count - 1) for at in runs[1:] or runs)
        goal = "" if size == "7b" else "≥ 300" if batch == 1 else "≥ 5000"
        name = f"{size}: {kind}, batch {batch}" + (
            ", captured, not compiled" if compiling and not compile_steps else ""
        )
        b.add("tokens", f"{name}, {count} tokens", batch * count / seconds, "tokens/s", goal, first=first)
        b.add("tokens", f"{name}: prefill and first token", to_first, "s")
        b.add("tokens", f"{name}: each token after", each, "s")
    weights = sum(p.numel() * p.element_size() for p in model.language.parameters())
    b.add("tokens", f"{size}: weights read for each token", weights / 1e9, "GB")
