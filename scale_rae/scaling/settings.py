"""The settings of a scaling experiment: everything that decides its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from scale_rae.errors import OptionError
from scale_rae.options import (
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    POST_QA_MODES,
    PROMPT_PREFIX,
    Knob,
    MaxNewTokens,
    ModelChoice,
    SamplingOptions,
    Seed,
    check_count,
    check_options,
)
from scale_rae.prompt import QUESTION
from scale_rae.wording import as_request

MOST_IMAGES = 1_000_000  # per prompt; the plan of a larger experiment fills the memory
SCALING, JUDGING = "Scaling", "Judging"  # headings in --help
AUTO_REWARD = "auto"  # the model's own reward where it brings one, else the guide's; known once the model is loaded


@dataclass(frozen=True)
class Settings:
    """Everything that decides an experiment's files. `batch_size` None is measured (8 on the CPU).

    `question` is a template with `{prompt}`; `question_name` and `post_qa_mode` are in the folder's name. `reward` may be
    AUTO_REWARD until the model is loaded. `model_name` is what records call the model: the model_path that the experiment
    was started with, also where the same model is found under another path today.
    """

    metadata_file: str
    model_path: str
    decoder_repo: str | None = None
    revision: str | None = None
    dtype: str | None = None
    n_samples: Annotated[int, Knob("Images to keep of each prompt.", SCALING, least=1)] = 4
    scaling_rounds: Annotated[int, Knob("Rounds: n-samples times as many images are drawn.", SCALING, least=1)] = 2
    question: str = QUESTION
    question_name: str = "qa_prompt_template"
    post_qa_mode: Annotated[
        str,
        Knob(
            "latent: the model looks at its latents; image: at the decoded images, encoded again.",
            JUDGING,
            choices=POST_QA_MODES,
        ),
    ] = "latent"
    post_qa_max_new_tokens: Annotated[int, Knob("Longest answer, in tokens.", JUDGING, least=1)] = DEFAULT_ANSWER_TOKENS
    prompt_prefix: Annotated[str, Knob("Put before each prompt that is not a request already.", SCALING)] = (
        PROMPT_PREFIX
    )
    seed: Seed = DEFAULT_SEED
    options: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: MaxNewTokens = DEFAULT_NEW_TOKENS
    batch_size: int | None = None
    reward: str | None = "imagereward"
    reward_path: str | None = None
    save_latents: Annotated[bool, Knob("Also save each image's latent.", SCALING)] = False
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
        check_options(self, flags=True)
        check_count("--batch-size", self.batch_size)
        if self.total > MOST_IMAGES:
            raise OptionError(
                f"--n-samples {self.n_samples} x --scaling-rounds {self.scaling_rounds}: at most {MOST_IMAGES:,} images of a prompt"
            )
        if not self.question.strip():
            raise OptionError("the question about the images is empty")
        self.options.check()

    def with_model(self, choice: ModelChoice) -> Settings:
        """The same settings with the model that was chosen; the device is no setting."""
        values = dataclasses.asdict(choice)
        del values["device"]
        return dataclasses.replace(self, **values, model_name=choice.model_path)

    def model_choice(self, device: str | None) -> ModelChoice:
        """The experiment's model on a device: the opposite of `with_model`."""
        names = {field.name for field in dataclasses.fields(ModelChoice)} - {"device"}
        return ModelChoice(**{name: getattr(self, name) for name in names}, device=device)

    def resumed(self, recorded: Mapping[str, Any] | None) -> Settings:
        """The settings to go on with: an open reward and the model's name are those of the recorded experiment, if any."""
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
