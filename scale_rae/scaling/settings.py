"""The settings of a scaling experiment: everything that decides its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from scale_rae.acceptance import Rules
from scale_rae.errors import OptionError
from scale_rae.options import (
    AUTO_REWARD,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    POST_QA_MODES,
    PROMPT_PREFIX,
    SEARCHES,
    Knob,
    MaxNewTokens,
    ModelChoice,
    SamplingOptions,
    SearchOptions,
    Seed,
    check_count,
    check_options,
    options_of,
    quantisation,
)
from scale_rae.prompt import QUESTION
from scale_rae.wording import as_request

MOST_IMAGES = 1_000_000  # per prompt; the plan of a larger experiment fills the memory
MOST_TOGETHER = 64  # prompts that one worker searches at a time
SCALING, JUDGING = "Scaling", "Judging"  # headings in --help


@dataclass(frozen=True)
class Settings:
    """Everything that decides an experiment's files. `batch_size` None is measured (8 on the CPU).

    `memory` is the limit that a worker keeps below, for which `quantize`, `offload` and `batch_size` were chosen.
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
    search: Annotated[
        str,
        Knob(
            "best-of-n: all images are drawn, then ranked. adaptive: candidates are looked at early and dropped, until "
            "n-samples are accepted.",
            SCALING,
            choices=SEARCHES,
        ),
    ] = "best-of-n"
    adaptive: SearchOptions = field(default_factory=SearchOptions)
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
    offload: str = "none"
    memory: str | None = None
    lora: tuple[str, ...] = ()
    model_name: str = ""

    def __post_init__(self) -> None:
        if not self.model_name:
            object.__setattr__(self, "model_name", self.model_path)

    @property
    def is_adaptive(self) -> bool:
        """Whether candidates are begun until enough are accepted, instead of a fixed number of images."""
        return self.search == "adaptive"

    @property
    def rules(self) -> Rules:
        """What an adaptive search of a prompt goes by; the reward must be known."""
        return Rules(self.n_samples, self.adaptive, self.reward)

    @property
    def total(self) -> int:
        """Images drawn per prompt; in an adaptive search, the most candidates that may be begun."""
        if self.is_adaptive:
            return self.rules.most
        return self.n_samples * self.scaling_rounds

    @property
    def usual_total(self) -> int:
        """About how many images are drawn per prompt."""
        return min(self.total, 2 * self.n_samples) if self.is_adaptive else self.total

    def prompts_together(self, prompts: int) -> int:
        """How many of an experiment's prompts a worker draws together.

        In an adaptive search these are several, which fills batches. The number depends on the experiment alone, since a GPU's
        rounding depends on what is drawn together.
        """
        return max(1, min(MOST_TOGETHER, prompts // 4)) if self.is_adaptive else 1

    def check(self) -> None:
        """Raises OptionError for values that no experiment can use."""
        check_options(self, flags=True)
        check_count("--batch-size", self.batch_size)
        self._check_total()
        if not self.question.strip():
            raise OptionError("the question about the images is empty")
        self.options.check()

    def _check_total(self) -> None:
        """Raises OptionError for too many images, and for options of the search that is not chosen."""
        given = f"--n-samples {self.n_samples} x --scaling-rounds {self.scaling_rounds}"
        if self.is_adaptive:
            self.adaptive.check()
            given = f"--max-candidates {self.adaptive.max_candidates}"
            self.adaptive.check_keep(self.n_samples, "--n-samples, which is")
            if self.reward is None:
                self.adaptive.check_without_reward()
        elif self.adaptive != SearchOptions():
            changed = [o for o in options_of(SearchOptions) if getattr(self.adaptive, o.path[0]) != o.default]
            raise OptionError(f"--{changed[0].name.replace('_', '-')}: only with --search adaptive")
        if self.total > MOST_IMAGES:
            raise OptionError(f"{given}: at most {MOST_IMAGES:,} images of a prompt")

    def with_model(self, choice: ModelChoice) -> Settings:
        """The same settings with the model that was chosen; the device is no setting."""
        values = dataclasses.asdict(choice) | {"quantize": quantisation(choice.quantize)}
        del values["device"]
        return dataclasses.replace(self, **values, model_name=choice.model_path)

    def model_choice(self, device: str | None) -> ModelChoice:
        """The experiment's model on a device: the opposite of `with_model`.

        What `memory` chose is chosen for good.
        """
        names = {field.name for field in dataclasses.fields(ModelChoice)} - {"device", "memory"}
        return ModelChoice(**{name: getattr(self, name) for name in names}, device=device)

    def resumed(self, recorded: Mapping[str, Any] | None) -> Settings:
        """The settings to go on with.

        What is open, and the model's name, are those of the recorded experiment, if there is one. Open are a reward that is
        AUTO_REWARD, and the times of an adaptive search's looks where none is given.
        """
        known = (recorded or {}).get("settings")
        if not isinstance(known, dict):
            return self
        name = known.get("model_path")
        settings = dataclasses.replace(self, model_name=name) if isinstance(name, str) else self
        looks = known.get("check_at")
        if self.is_adaptive and not self.adaptive.check_at and isinstance(looks, list):
            settings = dataclasses.replace(settings, adaptive=dataclasses.replace(self.adaptive, check_at=tuple(looks)))
        if self.reward != AUTO_REWARD or not isinstance(known.get("reward"), str | None):
            return settings
        return dataclasses.replace(settings, reward=known.get("reward"))

    def folder(self, output_dir: Path) -> Path:
        """OUT/<model, dots to dashes>/<rounds or "adaptive">_<template>_scale_<mode>, as the guide has it."""
        model = Path(self.model_path.rstrip("/")).name if self.model_path.strip("/.") else ""
        if not model:
            model = Path(self.model_path).expanduser().resolve().name
        how = "adaptive" if self.is_adaptive else self.scaling_rounds
        kind = f"{how}_{self.question_name}_scale_{self.post_qa_mode}"
        return output_dir / model.replace(".", "-") / kind

    def request(self, prompt: str) -> str:
        """The message that asks for a drawing of the prompt: prefixed, unless it is a request already."""
        return as_request(prompt, self.prompt_prefix)

    def slices(self, batch_size: int) -> list[range]:
        """Which samples of a prompt are drawn together: fixed, so that their pixels are."""
        return [range(i, min(i + batch_size, self.total)) for i in range(0, self.total, batch_size)]
