"""The options of `scale-rae distill`: names, defaults, help texts, checks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from scale_rae.errors import OptionError
from scale_rae.options import (
    DEFAULT_MODEL,
    DEFAULT_SEED,
    PROMPT_PREFIX,
    Knob,
    Lora,
    check_device_name,
    check_options,
    quantisation,
    to_record,
)
from scale_rae.student import MOST_STEPS
from scale_rae.training.settings import (
    DATA,
    LEARNING,
    RESULT,
    AdamBeta1,
    AdamBeta2,
    Alpha,
    CacheDir,
    CheckpointsTotalLimit,
    Compile,
    Device,
    EmaDecay,
    Full,
    GradientCheckpointing,
    LearningRate,
    LoggingSteps,
    LrScheduler,
    LrWarmupSteps,
    MaxGradNorm,
    MixedPrecision,
    Model,
    Optimizer,
    PromptPrefix,
    Quantize,
    Rank,
    Resume,
    Revision,
    SaveSteps,
    Seed,
    TrainingOptions,
)

STUDENT = "Student"
BATCH = 64  # states per step, at least, where no number is given
# Options that a resumed run may change.
_FREE = frozenset(
    [
        *("out", "prompts", "resume", "cache_dir", "device", "logging_steps", "save_steps", "checkpoints_total_limit"),
        *("model", "revision", "lora", "compile", "gradient_checkpointing"),
    ]
)


@dataclass(frozen=True)
class DistillOptions:
    """Options of a distillation. Only the velocity network learns; prompts are all the data."""

    model: Model = DEFAULT_MODEL
    revision: Revision = None
    lora: Lora = ()
    device: Device = None

    # --- the student
    steps: Annotated[int, Knob("Evaluations of the student per image.", STUDENT, least=1, most=MOST_STEPS)] = 4
    guidance: Annotated[float, Knob("Guidance of the teacher, folded into the student.", STUDENT, least=0)] = 4.0
    teacher_steps: Annotated[
        int, Knob("The teacher's steps from noise to latent, shared out among the student's.", STUDENT, least=1)
    ] = 20

    # --- data
    prompts: Annotated[
        Path | None,
        Knob("A .txt or .jsonl file of prompts. Default: prompts of the bundled model's world, for that model.", DATA),
    ] = None
    prompt_prefix: PromptPrefix = PROMPT_PREFIX
    exchanged: Annotated[
        int,
        Knob(
            "Conditions to add for new prompts, computed from the conditions of prompts that differ in one word. Only for models "
            "whose conditions add up, like the bundled one; where they do not, none is added.",
            DATA,
            least=0,
        ),
    ] = 0
    trajectories: Annotated[int, Knob("Images drawn per round, whose paths are learnt from.", DATA, least=1)] = 1024
    rounds: Annotated[
        int,
        Knob(
            "How often images are drawn: first the teacher draws them, then the student, from whose states the teacher goes on.",
            DATA,
            least=1,
        ),
    ] = 4
    cache_dir: CacheDir = None

    # --- result
    out: Annotated[
        Path,
        Knob("Folder for the student, its checkpoints and logs; made if missing.", RESULT, aliases=("output_dir",)),
    ] = Path("student")
    save_steps: SaveSteps = 500
    checkpoints_total_limit: CheckpointsTotalLimit = None
    resume: Resume = False
    logging_steps: LoggingSteps = 10

    # --- learning
    full: Full = False
    rank: Rank = 64
    alpha: Alpha = None
    learning_rate: LearningRate = 5e-4
    lr_scheduler: LrScheduler = "cosine"
    lr_warmup_steps: LrWarmupSteps = None
    max_train_steps: Annotated[int, Knob("Optimizer steps.", LEARNING, least=1)] = 1000
    train_batch_size: Annotated[
        int | None,
        Knob(
            f"States per step, equally many of each of the student's steps. Default: {BATCH}, or the next multiple of --steps.",
            LEARNING,
            least=1,
        ),
    ] = None
    optimizer: Optimizer = "adamw"
    adam_beta1: AdamBeta1 = 0.9
    adam_beta2: AdamBeta2 = 0.95
    max_grad_norm: MaxGradNorm = 1.0
    ema_decay: EmaDecay = 0.995
    seed: Seed = DEFAULT_SEED

    # --- memory and speed
    mixed_precision: MixedPrecision = None
    quantize: Quantize = None
    gradient_checkpointing: GradientCheckpointing = False
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize", quantisation(self.quantize))

    @property
    def small_steps(self) -> int:
        """The teacher's steps in each of the student's."""
        return -(-self.teacher_steps // self.steps)

    @property
    def batch(self) -> int:
        """The states of a step, a multiple of `steps`."""
        return self.train_batch_size or -(-BATCH // self.steps) * self.steps

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no distillation can use."""
        check_device_name(self.device)
        check_options(self, flags=True)
        if self.lora:
            raise OptionError(
                "--lora: a student's folder names its base model only; write one with the adapters first "
                "(scale-rae merge --model … --lora … --out DIR), then distil DIR"
            )
        if self.batch % self.steps:
            raise OptionError(
                f"--train-batch-size {self.train_batch_size}: must be a multiple of --steps {self.steps}, since each step of the "
                "student has equally many states"
            )
        if self.rounds > self.max_train_steps:
            raise OptionError(f"--rounds {self.rounds}: must be at most --max-train-steps {self.max_train_steps}")
        if self.teacher_steps < self.steps:
            raise OptionError(f"--teacher-steps {self.teacher_steps}: must be at least --steps {self.steps}")
        self.training().check_network()

    def training(self) -> TrainingOptions:
        """The options of the networks, adapters and optimizer, as a training has them."""
        names = (
            *("model", "out", "revision", "lora", "device", "cache_dir", "full", "rank", "alpha", "learning_rate"),
            *("lr_scheduler", "lr_warmup_steps", "max_train_steps", "optimizer", "adam_beta1", "adam_beta2"),
            *("max_grad_norm", "ema_decay", "seed", "mixed_precision", "quantize", "gradient_checkpointing"),
            *("compile", "resume", "prompt_prefix"),
        )
        same = {name: getattr(self, name) for name in names}
        return replace(TrainingOptions(), train="dit", train_batch_size=self.batch, **same)

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must not change, since they affect every step."""
        record = {name: value for name, value in to_record(self, complete=True).items() if name not in _FREE}
        return record | {"train_batch_size": self.batch}

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result, also those that a resumed run may change.

        The number of steps is recorded apart.
        """
        warmup = self.training().warmup(self.max_train_steps)
        return {**self.identity(), "revision": self.revision, "prompts": self.prompts, "lr_warmup_steps": warmup}
