"""The settings of a scaling experiment: everything that decides its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.errors import OptionError
from scale_rae.options import PROMPT_PREFIX, check_options
from scale_rae.prompt import QUESTION
from scale_rae.wording import as_request

MOST_IMAGES = 1_000_000  # per prompt; the plan of a larger experiment fills the memory
AUTO_REWARD = "auto"  # the model's own reward where it brings one, else the guide's; known once the model is loaded


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
    question: str = QUESTION
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
