"""What one scaling experiment is: its prompts and settings, the request each prompt becomes, the record each leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae import __version__
from scale_rae.errors import InputError, OptionError
from scale_rae.jsonio import dump_json
from scale_rae.options import check_options
from scale_rae.prompt import chat_text
from scale_rae.promptfile import PromptRecord

if TYPE_CHECKING:
    from scale_rae.scores import Score

PROMPT_PREFIX = "Can you generate "  # before prompts that ask for nothing
MOST_IMAGES = 1_000_000  # of a prompt; beyond, the plan alone fills the memory
AUTO_REWARD = "auto"  # the model's own reward where it brings one, else the guide's; known once the model is loaded

# A prompt that begins so asks for a picture already. Bare verbs ask only before an article or a number: "paint brushes"
# is a thing to draw, "paint a brush" a request.
_REQUEST = re.compile(
    r"(please|(can|could|would|will) (you|i)|(show|give) me|i (want|need|would like)|i['’]d like|let me see"
    r"|(generate|draw|create|make|paint|produce|render)( me)? (an?|the|one|two|three|four|five|some|this|\d+))\b",
    re.IGNORECASE,
)

# Not compared when an experiment goes on: they only name what is compared by content.
_NAMES = ("metadata_file", "post_qa_template_path", "model_path", "decoder_repo", "revision", "reward_path")


@dataclass(frozen=True)
class Settings:
    """Everything that decides an experiment's files. `batch_size` None is measured (8 on the CPU).

    `question` is a template with `{prompt}`; `question_name` and `post_qa_mode` are in the folder's name. `reward` may be
    AUTO_REWARD until the model is loaded. `model_name` is what records call the model: the model_path that the experiment
    was begun with, also where the same model is found under another path today.
    """

    metadata_file: str
    model_path: str
    decoder_repo: str | None = None
    revision: str | None = None
    dtype: str | None = None
    n_samples: int = 4
    scaling_rounds: int = 2
    question: str = "Does this image align with the prompt: {prompt}?"
    question_name: str = "qa_prompt_template"
    post_qa_mode: str = "latent"
    post_qa_max_new_tokens: int = 64
    prompt_prefix: str = PROMPT_PREFIX
    seed: int = 42
    guidance_level: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    steps: int = 49
    solver: str = "euler"
    max_new_tokens: int = 512
    batch_size: int | None = None
    reward: str | None = "imagereward"
    reward_path: str | None = None
    save_latents: bool = False
    compile: str = "auto"
    quantize: str | None = None
    model_name: str = ""

    def __post_init__(self) -> None:
        if not self.model_name:
            object.__setattr__(self, "model_name", self.model_path)

    @property
    def total(self) -> int:
        """Images drawn of each prompt."""
        return self.n_samples * self.scaling_rounds

    def check(self) -> None:
        """Raises OptionError for values that no experiment can use."""
        for name in ("n_samples", "scaling_rounds", "max_new_tokens", "post_qa_max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.total > MOST_IMAGES:
            raise OptionError(
                f"--n-samples {self.n_samples} x --scaling-rounds {self.scaling_rounds}: at most {MOST_IMAGES:,} images of a prompt"
            )
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed}: must be at least 0 and less than 2^63")
        if not self.question.strip():
            raise OptionError("the question about the images is empty")
        check_options(self.guidance_level, self.steps, self.solver, self.guidance_interval)

    def resumed(self, recorded: Mapping[str, Any] | None) -> Settings:
        """The settings to go on with: an open reward, and the model's name, are as the experiment (if any) has them."""
        known = (recorded or {}).get("settings")
        if not isinstance(known, dict):
            return self
        name = known.get("model_path")
        settings = dataclasses.replace(self, model_name=name) if isinstance(name, str) else self
        if self.reward != AUTO_REWARD or not isinstance(known.get("reward"), str | None):
            return settings
        return dataclasses.replace(settings, reward=known.get("reward"))

    def folder(self, output_dir: Path) -> Path:
        """OUT/<model name, dots to dashes>/<rounds>_<template>_scale_<mode>, as the guide has it."""
        model = Path(self.model_path.rstrip("/")).name if self.model_path.strip("/.") else ""
        if not model:
            model = Path(self.model_path).expanduser().resolve().name
        kind = f"{self.scaling_rounds}_{self.question_name}_scale_{self.post_qa_mode}"
        return output_dir / model.replace(".", "-") / kind

    def request(self, prompt: str) -> str:
        """The message that asks for a drawing of the prompt: prefixed, unless it is a request already."""
        return as_request(prompt, self.prompt_prefix)

    def slices(self, batch_size: int) -> list[range]:
        """Which samples of a prompt are drawn together: fixed, so that their pixels are."""
        return [range(i, min(i + batch_size, self.total)) for i in range(0, self.total, batch_size)]


def as_request(prompt: str, prefix: str) -> str:
    """The prompt with the prefix before it, unless it is a request already."""
    if not prefix.strip() or _REQUEST.match(prompt) or prompt.lower().startswith(prefix.strip().lower()):
        return prompt
    return f"{prefix}{'' if prefix[-1].isspace() else ' '}{prompt}"


def describe(settings: Settings, prompts: Sequence[PromptRecord]) -> dict[str, Any]:
    """experiment.json's part on settings and prompts."""
    values = dataclasses.asdict(settings)
    del values["model_name"]  # the first run's model_path
    if settings.guidance_interval is not None:
        values["guidance_interval"] = list(settings.guidance_interval)
    lines = [dump_json({**p.extra, "index": p.index, "prompt": p.prompt}) for p in prompts]
    content = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"settings": values, "prompts": {"count": len(prompts), "sha256": content}}


def setting_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of an experiment and those it is to go on with, in words.

    Only what both know is compared, and what is left to be worked out (None) is not, when the record has it.
    """
    old, new = recorded.get("settings"), now["settings"]
    if not isinstance(old, dict):
        return ["its settings are missing"]
    found = []
    for name in new:
        here, there = new[name], old.get(name)
        if name in _NAMES or here == there or (name in ("batch_size", "dtype") and here is None):
            continue
        if name == "reward" and here == AUTO_REWARD:
            continue
        found.append(f"{name} {_short(here)} here, {_short(there)} there")
    old_prompts = recorded.get("prompts")
    if not isinstance(old_prompts, dict) or old_prompts.get("sha256") != now["prompts"]["sha256"]:
        found.append(f"the prompts ({now['prompts']['count']} here)")
    return found


def _short(value: object) -> str:
    text = dump_json(value)
    return text if len(text) <= 60 else text[:57] + "…"


def judgement(score: Score) -> dict[str, Any]:
    """One image's entry in text_responses. `score` is the confidence of a yes, minus that of a no, else 0."""
    values = dataclasses.asdict(score)
    signed = {"yes": score.yes_conf_score, "no": -score.no_conf_score}.get(score.answer, 0.0)
    first = ("answer", "yes_logit", "yes_conf_score", "no_logit", "no_conf_score")
    return {name: values.pop(name) for name in first} | {"score": signed} | values


def check_finite(judged: Sequence[Mapping[str, Any]], rewards: Sequence[float] | None) -> None:
    """Raises InputError when a score is no number: such files could not be read again."""
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
) -> dict[str, Any]:
    """metadata.jsonl's object: a function of settings, prompt and what the models said, and nothing that varies."""
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
        "guidance_level": settings.guidance_level,
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
    clashing = {name: value for name, value in prompt.extra.items() if name in record}
    return {**prompt.extra, **record, **({"prompt_fields": clashing} if clashing else {})}


def png_text(settings: Settings, request: str, seed: int) -> dict[str, str]:
    """What a PNG says of itself: how to draw it again."""
    return {
        "Software": f"scale_rae {__version__}",
        "mode": "scale",
        "prompt": request,
        "image_seed": str(seed),
        "guidance_level": str(settings.guidance_level),
        "solver": settings.solver,
        "steps": str(settings.steps),
    }
