"""The options of `scale-rae train`: names, defaults, help texts, checks. Imports no torch.

Names are those of diffusers' and PEFT's training scripts, where these have the option.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from scale_rae.errors import OptionError, need
from scale_rae.options import (
    COMPILE,
    DEFAULT_MODEL,
    DEFAULT_SEED,
    LARGEST_SEED,
    MODEL_HELP,
    PROMPT_PREFIX,
    REWARDS,
    SOLVERS,
    UNQUANTISED,
    Knob,
    Lora,
    check_device_name,
    check_options,
    lora_parts,
    quantisation,
    to_record,
)
from scale_rae.training.sequences import PICTURE

OBJECTIVES = ("sft", "self-reward")
NO_REWARD = "none"
TEXT = ("turns", "replies")
NETWORKS = ("dit", "language", "both")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
BOARDS = ("tensorboard", "wandb")
SCHEDULERS = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16")
STORED = ("int8", "fp8-storage", "nf4")  # quantisations of frozen weights: activations stay as they are
# Options that a resumed run may change. The resulting numbers of steps and records per step are compared instead.
_FREE = frozenset(
    [
        "out",
        "data",
        "class_prompts",
        "resume",
        "skip_bad",
        "cache_dir",
        "image_folder",
        "device",
        "logging_steps",
        "report_to",
        "save_steps",
        "checkpoints_total_limit",
        "model",
        "revision",
        "lora",
        "compile",
        "gradient_checkpointing",
        "validation_prompts",
        "validation_steps",
        "num_validation_images",
        "validation_guidance",
        "num_inference_steps",
        "max_train_steps",
        "num_train_epochs",
        "lr_warmup_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "prompts",
        "verify_prompts",
        "verify_reward",
        "verify_reward_path",
        "reward_path",
    ]
)
# Those of them that decide the result, too; the steps are recorded apart.
_RECORDED = ("revision", "train_batch_size", "gradient_accumulation_steps")
_RECORDED_SFT = ("data", "image_folder", "class_prompts", "num_inference_steps", "validation_guidance")
_RECORDED_SELF_REWARD = ("prompts", "reward_path")
# Options of pictures and texts that are given, and of what else --objective sft learns from them.
_ONLY_SFT = frozenset(
    [
        *("data", "image_folder", "class_prompts", "center_crop", "skip_bad", "language_learning_rate"),
        *("num_train_epochs", "text_targets", "prior_loss_weight", "timesteps_per_sample"),
    ]
)

STEPS = 1000
WARMUP_SHARE = 0.03  # of the steps, where no number is given: that of the official second stage

MODEL, DATA, LEARNING, SCALE, RESULT, LOOKS = "Model", "Data", "Learning", "Memory and speed", "Result", "Validation"
VERDICTS = "Learning from its own verdicts"


@dataclass(frozen=True, kw_only=True)
class SelfRewardOptions:
    """Options of `--objective self-reward`: what is drawn, how it is scored and learnt from."""

    prompts: Annotated[
        Path | None, Knob("A .txt or .jsonl file of the prompts that are drawn and scored.", VERDICTS, metavar="FILE")
    ] = None
    prompts_per_round: Annotated[int, Knob("Prompts that are drawn in a round.", VERDICTS, least=1)] = 64
    images_per_prompt: Annotated[
        int, Knob("Drawings per prompt in a round, which are compared with each other.", VERDICTS, least=2)
    ] = 16
    steps_per_round: Annotated[
        int, Knob("Optimizer steps on the drawings of a round, before others are drawn.", VERDICTS, least=1)
    ] = 30
    draw_steps: Annotated[int, Knob("Solver steps of a drawing.", VERDICTS, least=2)] = 20
    draw_solver: Annotated[str, Knob("Solver of the drawings.", VERDICTS, choices=SOLVERS)] = "ab2"
    draw_batch_size: Annotated[
        int | None, Knob("Drawings at once. Default: --train-batch-size.", VERDICTS, least=1)
    ] = None
    reading_weight: Annotated[
        float, Knob("Weight of the model's own reading, its log-odds of yes, in the score.", VERDICTS, least=0)
    ] = 1.0
    reward: Annotated[str, Knob("A reward that also counts in the score.", VERDICTS, choices=(*REWARDS, NO_REWARD))] = (
        NO_REWARD
    )
    reward_path: Annotated[Path | None, Knob("Folder with the reward's weights.", VERDICTS)] = None
    reward_weight: Annotated[float, Knob("Weight of the reward in the score.", VERDICTS, least=0)] = 1.0
    beta: Annotated[
        float,
        Knob(
            "How far the better and the worse policy are from the one that drew; smaller is bolder.",
            VERDICTS,
            least=1e-3,
            most=1,
        ),
    ] = 1.0
    old_decay: Annotated[
        float,
        Knob("Share of the drawing policy that remains after each round.", VERDICTS, least=0, most=1),
    ] = 0.7
    kl_weight: Annotated[
        float, Knob("Weight of the squared distance to the velocity before training.", VERDICTS, least=0)
    ] = 0.0
    fold_guidance: Annotated[
        float,
        Knob(
            "First learn, from accepted drawings, the velocity that this guidance gives, without guidance; 1: do not.",
            VERDICTS,
            least=0,
        ),
    ] = 1.0
    fold_steps: Annotated[
        int | None,
        Knob("Steps in which guidance is folded in. Default: two fifths of the steps.", VERDICTS, least=1),
    ] = None
    condition_noise: Annotated[
        float,
        Knob(
            "Noise on the conditions that are drawn and learnt, in standard deviations between prompts. Helps with prompts "
            "that are unlike those of --prompts.",
            VERDICTS,
            least=0,
        ),
    ] = 0.0
    verify_prompts: Annotated[
        Path | None,
        Knob(
            "Prompts that each validation draws and scores, better others than --prompts. Default: the first 64 of --prompts.",
            VERDICTS,
            metavar="FILE",
        ),
    ] = None
    verify_reward: Annotated[
        str,
        Knob(
            "A reward that only the validation sees, and the training never.", VERDICTS, choices=(*REWARDS, NO_REWARD)
        ),
    ] = NO_REWARD
    verify_reward_path: Annotated[Path | None, Knob("Folder with that reward's weights.", VERDICTS)] = None

    @property
    def folds(self) -> bool:
        """Whether guidance is folded in."""
        return self.fold_guidance != 1.0

    def folding(self, steps: int) -> int:
        """The first steps, in which guidance is folded in: whole rounds, at most all `steps`."""
        if not self.folds:
            return 0
        wanted = self.fold_steps or 0.4 * steps
        rounds = max(1, round(wanted / self.steps_per_round))
        return min(steps, rounds * self.steps_per_round)

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no training can use."""
        check_options(self, flags=True)
        if self.prompts is None:
            raise OptionError("--prompts: give a file of prompts to draw (--objective self-reward)")
        if not self.reading_weight and (self.reward == NO_REWARD or not self.reward_weight):
            raise OptionError(
                "--reading-weight 0: nothing would score the drawings; give a --reward, or another weight"
            )
        if self.verify_reward != NO_REWARD and self.verify_reward == self.reward:
            raise OptionError(
                f"--verify-reward {self.verify_reward}: is the --reward that is learnt from; a verifier must be another"
            )
        for flag, given, name in (
            ("--reward-path", self.reward_path is not None, self.reward),
            ("--reward-weight", self.reward_weight != 1.0, self.reward),
            ("--verify-reward-path", self.verify_reward_path is not None, self.verify_reward),
        ):
            if given and name == NO_REWARD:
                raise OptionError(f"{flag}: no reward is chosen that it would belong to")
        if self.fold_steps is not None and not self.folds:
            raise OptionError(
                "--fold-steps: has no meaning without --fold-guidance; give both, or leave out --fold-steps"
            )


# --- options that `train` and `distill` share

Model = Annotated[str, Knob(MODEL_HELP, MODEL, aliases=("model_path",))]
Revision = Annotated[str | None, Knob("Branch, tag or commit of a model on the hub.", MODEL)]
Device = Annotated[str | None, Knob("cpu, cuda, cuda:N or mps. Default: the best there is.", MODEL)]
PromptPrefix = Annotated[str, Knob("Put before a prompt, or a picture's text, that is not worded as a request.", DATA)]
CacheDir = Annotated[
    Path | None,
    Knob("Folder for what is computed before the first step. Default: `cache` in the folder of --out.", DATA),
]
Full = Annotated[bool, Knob("Train all weights of what learns, instead of a LoRA.", LEARNING)]
Rank = Annotated[int, Knob("Rank of the LoRA.", LEARNING, least=1)]
Alpha = Annotated[
    float | None,
    Knob(
        "The LoRA's output is scaled by alpha / rank. Default: the rank.",
        LEARNING,
        least=1e-6,
        must="must be above 0",
        aliases=("lora_alpha",),
    ),
]
LearningRate = Annotated[float, Knob("Peak learning rate.", LEARNING, least=0)]
LrScheduler = Annotated[str, Knob("cosine, linear or constant.", LEARNING, choices=SCHEDULERS)]
LrWarmupSteps = Annotated[int | None, Knob("Steps of linear warm-up. Default: 3 % of the steps.", LEARNING, least=0)]
Optimizer = Annotated[
    str, Knob("adamw, adamw8bit (its state in 8 bits), or muon (with --full).", LEARNING, choices=OPTIMIZERS)
]
AdamBeta1 = Annotated[
    float, Knob("AdamW's first beta.", LEARNING, least=0, most=0.999999, must="must be 0 to 0.999999")
]
AdamBeta2 = Annotated[
    float, Knob("AdamW's second beta.", LEARNING, least=0, most=0.999999, must="must be 0 to 0.999999")
]
MaxGradNorm = Annotated[float, Knob("Gradients are clipped to this norm; 0: they are not clipped.", LEARNING, least=0)]
EmaDecay = Annotated[
    float,
    Knob(
        "Decay of the moving average of the weights; this average is the result.",
        LEARNING,
        least=0,
        most=1,
        must="must be 0 to 1",
    ),
]
Seed = Annotated[
    int,
    Knob(
        "Seed of the data's order, of the noise and of the LoRA's first weights.",
        LEARNING,
        least=0,
        most=LARGEST_SEED,
        must="must be at least 0 and less than 2^63",
    ),
]
MixedPrecision = Annotated[str | None, Knob("no or bf16. Default: bf16, but no on the CPU.", SCALE, choices=PRECISIONS)]
Quantize = Annotated[
    str | None,
    Knob("Quantise the frozen weights: none, int8, fp8-storage or nf4.", SCALE, choices=(UNQUANTISED, *STORED)),
]
GradientCheckpointing = Annotated[
    bool, Knob("Recompute activations instead of storing them: less memory, a third more time.", SCALE)
]
Compile = Annotated[str, Knob("Compile the networks' blocks; auto: on CUDA.", SCALE, choices=COMPILE)]
SaveSteps = Annotated[
    int,
    Knob(
        "Write a checkpoint every N steps; a crash loses at most N steps.",
        RESULT,
        least=1,
        aliases=("checkpointing_steps",),
    ),
]
CheckpointsTotalLimit = Annotated[
    int | None, Knob("Keep only the newest N checkpoints. Default: all.", RESULT, least=1)
]
Resume = Annotated[bool, Knob("Go on from the newest checkpoint in --out.", RESULT)]
LoggingSteps = Annotated[int, Knob("Log every N steps.", RESULT, least=1)]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training. Networks that `train` does not choose are frozen, as are encoder and decoder."""

    model: Model = DEFAULT_MODEL
    data: Annotated[
        tuple[Path, ...],
        Knob(
            "Training data: a folder of pictures with metadata.jsonl, metadata.csv or a .txt beside each, a .jsonl file with "
            "`conversations`, a WebDataset .tar or a folder of them, or a manifest of tars. May be given several times.",
            DATA,
            metavar="PATH",
            aliases=("train_data_dir",),
        ),
    ] = ()
    out: Annotated[
        Path,
        Knob("Folder for the result, its checkpoints and logs; made if missing.", RESULT, aliases=("output_dir",)),
    ] = Path("trained")
    revision: Revision = None
    lora: Lora = ()
    device: Device = None

    # --- data
    image_folder: Annotated[
        Path | None, Knob("Folder that names of pictures are relative to. Default: the data file's folder.", DATA)
    ] = None
    prompt_prefix: PromptPrefix = PROMPT_PREFIX
    reply: Annotated[
        str | None,
        Knob(
            "The reply before the picture, for records that give only a text. Default: the model's own reply.",
            DATA,
            show_default=False,
        ),
    ] = None
    class_prompts: Annotated[
        Path | None,
        Knob(
            "A .txt or .jsonl file of prompts whose drawings should not change: half of each batch are the untrained model's "
            "drawings of them, made with --validation-guidance.",
            DATA,
        ),
    ] = None
    center_crop: Annotated[
        bool, Knob("Crop pictures to squares. Default: the encoder's preprocessing; SigLIP's stretches them.", DATA)
    ] = False
    skip_bad: Annotated[bool, Knob("Leave out records that cannot be used, instead of stopping.", DATA)] = False
    cache_dir: CacheDir = None

    # --- learning
    objective: Annotated[
        str,
        Knob(
            "sft: learn from --data. self-reward: draw --prompts, score the drawings with the model's own reading, and learn "
            "to draw the better ones.",
            LEARNING,
            choices=OBJECTIVES,
        ),
    ] = "sft"
    train: Annotated[str, Knob("Which networks learn: dit, language or both.", LEARNING, choices=NETWORKS)] = "dit"
    full: Full = False
    rank: Rank = 32
    alpha: Alpha = None
    learning_rate: LearningRate = 1e-4
    language_learning_rate: Annotated[
        float | None, Knob("Peak learning rate of the language model. Default: --learning-rate.", LEARNING, least=0)
    ] = None
    lr_scheduler: LrScheduler = "cosine"
    lr_warmup_steps: LrWarmupSteps = None
    max_train_steps: Annotated[
        int | None, Knob(f"Optimizer steps. Default: {STEPS}, without --num-train-epochs.", LEARNING, least=1)
    ] = None
    num_train_epochs: Annotated[
        int | None,
        Knob("Passes through the data, instead of --max-train-steps.", LEARNING, least=1),
    ] = None
    train_batch_size: Annotated[int, Knob("Records per step and device.", LEARNING, least=1)] = 8
    gradient_accumulation_steps: Annotated[
        int, Knob("Batches whose gradients are summed for one step.", LEARNING, least=1)
    ] = 1
    optimizer: Optimizer = "adamw"
    adam_beta1: AdamBeta1 = 0.9
    adam_beta2: AdamBeta2 = 0.999
    max_grad_norm: MaxGradNorm = 1.0
    ema_decay: EmaDecay = 0.999
    condition_dropout: Annotated[
        float,
        Knob(
            "Probability that the null embedding replaces a condition, which guidance needs.",
            LEARNING,
            least=0,
            most=1,
            must="must be 0 to 1",
        ),
    ] = 0.1
    text_targets: Annotated[
        str,
        Knob(
            "Which text the language model learns. turns: as the official code, the assistant's turns with their headers, and "
            "newlines and control tokens anywhere; replies: only what the assistant says.",
            LEARNING,
            choices=TEXT,
        ),
    ] = "turns"
    prior_loss_weight: Annotated[float, Knob("Weight of the loss on --class-prompts.", LEARNING, least=0)] = 1.0
    timesteps_per_sample: Annotated[int, Knob("Noisy latents per picture and step.", LEARNING, least=1)] = 1
    seed: Seed = DEFAULT_SEED
    self_reward: SelfRewardOptions = field(default_factory=SelfRewardOptions)

    # --- memory and speed
    mixed_precision: MixedPrecision = None
    quantize: Quantize = None
    gradient_checkpointing: GradientCheckpointing = False
    compile: Compile = "auto"

    # --- result
    save_steps: SaveSteps = 500
    checkpoints_total_limit: CheckpointsTotalLimit = None
    resume: Resume = False
    report_to: Annotated[
        str | None,
        Knob(
            "Where the log is shown, besides log.jsonl: tensorboard or wandb. Default: tensorboard, if it is installed.",
            RESULT,
            choices=BOARDS,
        ),
    ] = None
    logging_steps: LoggingSteps = 10

    # --- validation
    validation_prompts: Annotated[
        tuple[str, ...],
        Knob(
            "Prompt to draw every --validation-steps. May be given several times.",
            LOOKS,
            metavar="TEXT",
            aliases=("validation_prompt",),
        ),
    ] = ()
    validation_steps: Annotated[int, Knob("Draw the validation prompts every N steps.", LOOKS, least=1)] = 100
    num_validation_images: Annotated[int, Knob("Pictures per validation prompt.", LOOKS, least=1)] = 1
    validation_guidance: Annotated[float, Knob("Guidance of validation pictures; 1 is none.", LOOKS, least=0)] = 1.0
    num_inference_steps: Annotated[int, Knob("Solver steps of validation pictures.", LOOKS, least=2)] = 25

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize", quantisation(self.quantize))

    @property
    def rewards_itself(self) -> bool:
        """Whether the model learns from its own drawings."""
        return self.objective == "self-reward"

    @property
    def cache(self) -> Path:
        """The folder of what is prepared: latents, replies, conditions."""
        return self.cache_dir or self.out / "cache"

    @property
    def trains_dit(self) -> bool:
        """Whether the velocity network learns."""
        return self.train != "language"

    @property
    def trains_language(self) -> bool:
        """Whether the language model learns."""
        return self.train != "dit"

    def steps(self, records: int, processes: int) -> int:
        """The number of steps, given the records of the data.

        Beside --class-prompts, these records are half of a batch.
        """
        if self.num_train_epochs is None:
            return STEPS if self.max_train_steps is None else self.max_train_steps
        batch = self.train_batch_size * self.gradient_accumulation_steps * processes
        places = self.num_train_epochs * records * (2 if self.class_prompts else 1)
        return max(1, -(-places // batch))

    def warmup(self, steps: int) -> int:
        """The steps of the learning rate's warm-up."""
        return round(WARMUP_SHARE * steps) if self.lr_warmup_steps is None else self.lr_warmup_steps

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no training can use."""
        check_device_name(self.device)
        check_options(self, flags=True)
        for text in self.lora:
            lora_parts(text)
        if self.rewards_itself:
            self._check_self_reward()
        else:
            self._check_sft()
        if self.reply is not None and PICTURE in self.reply:
            raise OptionError(f"--reply: give the words before the picture, without {PICTURE}")
        if self.full and self.class_prompts:
            raise OptionError(
                "--class-prompts: their targets are computed without the LoRA, and --full has no LoRA; leave out one of them"
            )
        self.check_network()

    def check_network(self) -> None:
        """Raises OptionError, naming the flag, for options of networks and optimizer that do not go together."""
        if self.full and self.quantize:
            raise OptionError(
                f"--quantize {self.quantize}: only frozen weights can be quantised, and --full trains all; leave out one of them"
            )
        if self.optimizer == "muon" and not self.full:
            raise OptionError("--optimizer muon: needs whole weight matrices; give --full, or --optimizer adamw")
        if self.optimizer == "adamw8bit":
            need("training", "--optimizer adamw8bit", "bitsandbytes")
        if self.report_to is not None:
            need("training", f"--report-to {self.report_to}", self.report_to)

    def _check_sft(self) -> None:
        """Raises OptionError for options that do not go with --objective sft."""
        own = self.self_reward
        if given := [one.name for one in fields(own) if getattr(own, one.name) != one.default]:
            flag = "--" + given[0].replace("_", "-")
            raise OptionError(f"{flag}: has no meaning without --objective self-reward; give both, or leave out {flag}")
        if not self.data:
            raise OptionError("--data: give at least one file or folder to train on")
        if self.num_train_epochs is not None and self.max_train_steps is not None:
            raise OptionError(
                "--num-train-epochs: gives the number of steps, as --max-train-steps does; leave out one of them"
            )
        if self.language_learning_rate is not None and not self.trains_language:
            raise OptionError(
                "--language-learning-rate: the language model does not learn with --train dit; use --train both or language"
            )

    def _check_self_reward(self) -> None:
        """Raises OptionError for options that do not go with --objective self-reward."""
        self.self_reward.check()
        for option in fields(self):
            if option.name in _ONLY_SFT and getattr(self, option.name) != option.default:
                flag = "--" + option.name.replace("_", "-")
                raise OptionError(
                    f"{flag}: has no meaning for --objective self-reward, which learns from its own drawings"
                )
        if self.trains_language:
            raise OptionError(
                f"--train {self.train}: the language model is the judge of --objective self-reward and stays as it is; "
                "use --train dit"
            )

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must not change, since they affect every step."""
        record = {name: value for name, value in to_record(self, complete=True).items() if name not in _FREE}
        if not self.rewards_itself:  # as the records of trainings from before there was a choice
            unused = {"objective", *to_record(self.self_reward, complete=True)}
            record = {name: value for name, value in record.items() if name not in unused}
        return record

    def decisive(self, steps: int) -> dict[str, Any]:
        """The options that decide the result of so many steps, those that a resumed run may change included."""
        names = (*_RECORDED, *(_RECORDED_SELF_REWARD if self.rewards_itself else _RECORDED_SFT))
        given = to_record(self, complete=True)
        return {**self.identity(), **{name: given[name] for name in names}, "lr_warmup_steps": self.warmup(steps)}
