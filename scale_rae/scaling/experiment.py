"""What experiment.json and each prompt's metadata.jsonl say. store.py writes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scale_rae import acceptance
from scale_rae.acceptance import Candidate, Look
from scale_rae.errors import InputError
from scale_rae.jsonio import dump_json
from scale_rae.manifest import text_chunks
from scale_rae.options import AUTO_REWARD, ModelChoice, options_of, to_record
from scale_rae.prompt import chat_text
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.settings import Settings

# Not compared when an experiment is resumed: these settings name files, whose content is compared.
_NAMES = ("metadata_file", "post_qa_template_path", "model_path", "decoder_repo", "revision", "reward_path", "memory")

_DEFAULTS = Settings("", "")
_ONLY_IF_SET = [option.name for option in options_of(ModelChoice) if option.knob.only_if_set]


def experiment_record(settings: Settings, prompts: Sequence[PromptRecord]) -> dict[str, Any]:
    """experiment.json's part on settings and prompts."""
    values = to_record(settings)
    del values["model_name"]  # the model_path of the experiment's first record
    for name in _ONLY_IF_SET:
        if getattr(settings, name) == getattr(_DEFAULTS, name):
            del values[name]
    for name in () if settings.is_adaptive else ("search", *to_record(settings.adaptive)):
        del values[name]  # as before there was another search
    lines = [dump_json({**p.extra, "index": p.index, "prompt": p.prompt}) for p in prompts]
    content = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"settings": values, "prompts": {"count": len(prompts), "sha256": content}}


def setting_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between recorded settings and those of now, one text per difference.

    A setting that the record lacks has its default there. A setting that is still open (None, AUTO_REWARD, no time of a look)
    is not compared.
    """
    old, new = recorded.get("settings"), now["settings"]
    if not isinstance(old, dict):
        return ["its settings are missing"]
    found = []
    defaults = to_record(Settings("", ""), complete=True)
    old = defaults | old
    recorded_always = to_record(Settings("", ""))
    left_out = {n: value for n, value in defaults.items() if n not in recorded_always or n in _ONLY_IF_SET}
    new = {"search": "best-of-n"} | left_out | new
    for name in new if new["search"] == old["search"] else ("search",):
        here, there = new[name], old[name]
        if name in _NAMES or here == there or (name in ("batch_size", "dtype") and here is None):
            continue
        if (name == "reward" and here == AUTO_REWARD) or (name == "check_at" and here == []):
            continue
        found.append(f"{name} {_short(here)} here, {_short(there)} there")
    old_prompts = recorded.get("prompts")
    if not isinstance(old_prompts, dict) or old_prompts.get("sha256") != now["prompts"]["sha256"]:
        found.append(f"the prompts ({now['prompts']['count']} here)")
    return found


def _short(value: object) -> str:
    text = dump_json(value)
    return text if len(text) <= 60 else text[:57] + "…"


def check_finite(judged: Sequence[Mapping[str, Any]], rewards: Sequence[float] | None) -> None:
    """Raises InputError when a score or reward is not finite, since no JSON file can hold it."""
    for entry in judged:
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} came out as {value}; try --dtype float32")
    for value in rewards or ():
        if not math.isfinite(value):
            raise InputError(f"the reward came out as {value}; try --dtype float32")


def prompt_record(
    settings: Settings,
    prompt: PromptRecord,
    output_text: str,
    seeds: Sequence[int],
    judged: Sequence[Mapping[str, Any]],
    rewards: Sequence[float] | None,
    candidates: Sequence[Candidate] = (),
) -> dict[str, Any]:
    """metadata.jsonl's object, from settings, prompt and results alone.

    No time, device or worker is in it. `candidates` are those of an adaptive search; its finished images are numbered as
    `image_numbers` does.
    """
    best = best_rewards = None
    if rewards is not None:
        best = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[: settings.n_samples]
        best_rewards = [rewards[i] for i in best]
    request = settings.request(prompt.prompt)
    record = {
        "index": prompt.index,
        "prompt": prompt.prompt,
        "request": request,
        "input_prompt": chat_text(request),
        "output_text": output_text,
        "model_path": settings.model_name,
        "guidance_level": settings.options.guidance,
        "max_new_tokens": settings.max_new_tokens,
        "n_samples": settings.n_samples,
        "scaling_rounds": settings.scaling_rounds,
        "n_samples_generated": len(seeds),
        "qa_mode": settings.post_qa_mode,
        "reward": settings.reward,
        "image_seeds": list(seeds),
        "all_ir_scores": list(rewards) if rewards is not None else None,
        "top_ir_scores": best_rewards,
        "top_ir_indices": best,
        "text_responses": {str(i): dict(entry) for i, entry in enumerate(judged)},
    }
    if settings.is_adaptive:
        record |= {"scaling_rounds": None} | search_record(settings, candidates)
    clashing = {name: value for name, value in prompt.extra.items() if name in record}
    return {**prompt.extra, **record, **({"prompt_fields": clashing} if clashing else {})}


def search_record(settings: Settings, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What metadata.jsonl says of an adaptive search.

    `top_ir_indices` are the kept images, best first; where too few were accepted, `filled_up` has those of the kept images
    that were not. `evaluations` count looks at their cost.
    """
    images = image_numbers(candidates)
    by_number = {c.number: c for c in candidates}
    kept = acceptance.kept(candidates, settings.rules)
    rewards = [final.reward for number in kept if (final := by_number[number].final) is not None]
    return {
        "search": settings.search,
        "evaluations": round(sum(c.evaluations for c in candidates), 2),
        "n_accepted": sum(c.fate == acceptance.ACCEPTED for c in candidates),
        "top_ir_scores": rewards if settings.reward is not None else None,
        "top_ir_indices": [images[number] for number in kept],
        "filled_up": [images[number] for number in kept if by_number[number].fate != acceptance.ACCEPTED],
        "candidates": [candidate_record(c, images.get(c.number)) for c in candidates],
    }


def image_numbers(candidates: Sequence[Candidate], first: int = 0) -> dict[int, int]:
    """The image of each finished candidate: candidate number -> number in samples/, from `first` on.

    Images are numbered in the order they were finished: by candidate, those of revived candidates last.
    """
    finished = sorted((c for c in candidates if c.final is not None), key=lambda c: (c.is_revived, c.number))
    return {c.number: first + i for i, c in enumerate(finished)}


def candidate_record(candidate: Candidate, image: int | None) -> dict[str, Any]:
    """What metadata.jsonl says of a candidate.

    The scores of its finished image stand with those of the other images. A candidate that was dropped and then drawn to the
    end after all has `dropped_at` and `dropped_for`, besides what became of its image.
    """
    was_dropped = candidate.fate == acceptance.DROPPED or candidate.is_revived
    return {
        "candidate": candidate.number,
        "image": image,
        "seed": candidate.seed,
        "fate": candidate.fate,
        "dropped_at": candidate.looks[-1].t if was_dropped else None,
        "dropped_for": candidate.dropped_for,
        "reason": candidate.reason,
        "evaluations": candidate.evaluations,
        "looks": [look.record() for look in candidate.looks],
    }


def candidate_of(record: Mapping[str, Any], judged: Mapping[str, Any] | None, reward: float | None) -> Candidate:
    """The candidate of a `candidate_record`, with what was found of its finished image.

    Raises:
        ValueError, KeyError, TypeError: when it is not such a record.
    """
    looks = [
        Look(look["t"], {name: value for name, value in look.items() if name not in ("t", "reward")}, look["reward"])
        for look in record["looks"]
    ]
    if record["fate"] not in (acceptance.ACCEPTED, acceptance.REJECTED, acceptance.DROPPED):
        raise ValueError(f"fate is {record['fate']!r:.40}")
    if (judged is None) != (record["fate"] == acceptance.DROPPED):
        raise ValueError("a finished image's scores are missing, or a dropped candidate has some")
    final = None if judged is None else Look(None, dict(judged), reward)
    return Candidate(
        int(record["candidate"]),
        int(record["seed"]),
        looks,
        final,
        record["fate"],
        record["reason"],
        record["evaluations"],
        record["dropped_for"],
    )


def png_text(settings: Settings, request: str, seed: int) -> dict[str, str]:
    """The text chunks of one of the experiment's PNGs; experiment.json has the remaining settings."""
    return text_chunks(
        {
            "mode": "scale",
            "prompt": request,
            "image_seed": seed,
            "guidance_level": settings.options.guidance,
            "solver": settings.options.solver,
            "steps": settings.options.steps,
            "noise": to_record(settings.options).get("noise"),
        }
    )
