"""What can be chosen, without torch: names, defaults, and the checks that need no model.

Everything that has a choice to offer or to check (the command line, the pipeline, the server, the page) takes it from here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from scale_rae.errors import OptionError

DEFAULT_MODEL = "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B"
PUBLISHED_DECODERS = {"siglip": "nyu-visionx/siglip2_decoder", "dinov2": "nyu-visionx/webssl300m_decoder"}
DTYPES = ("float32", "bfloat16", "float16")
COMPILE = ("auto", "on", "off")
QUANTIZE = ("fp8",)
ATTENTION = ("auto", "flash", "own")
SOLVERS: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "ab2")
DEFAULT_STEPS = 49
TRAINING_STEPS = 1000  # the published grids are picked from 1000 training times
REWARDS = ("imagereward", "siglip", "pickscore")
POST_QA_MODES = ("latent", "image")
PROMPT_PREFIX = "Can you generate "  # put before prompts that are not worded as requests

_DEVICE = re.compile(r"(cpu|cuda|mps)(:[1-9]?\d)?")  # torch takes higher numbers, and makes others of them


@dataclass(frozen=True)
class ModelChoice:
    """Which checkpoint, and where it runs."""

    model_path: str
    decoder_repo: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    compile: str = "auto"
    quantize: str | None = None

    def check(self) -> None:
        """Raises OptionError for values that are no choice on any machine."""
        check_device_name(self.device)
        check_dtype_name(self.dtype)
        check_speed(self.compile, self.quantize)


@dataclass(frozen=True)
class SamplingOptions:
    """How a latent is sampled. `guidance` 1 is no guidance; `interval` limits where in t it acts."""

    steps: int = DEFAULT_STEPS
    solver: str = "euler"
    guidance: float = 1.0
    interval: tuple[float, float] | None = None

    def check(self) -> None:
        """Raises OptionError for values no sampler can use."""
        check_options(self.guidance, self.steps, self.solver, self.interval)


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `image_seeds` are the noise seeds themselves, instead of `num_images` and `seed`."""

    num_images: int = 1
    seed: int = 42
    guidance_level: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    steps: int = DEFAULT_STEPS
    solver: str = "euler"
    max_new_tokens: int = 512
    batch_size: int | None = None
    image_seeds: tuple[int, ...] | None = None

    @property
    def options(self) -> SamplingOptions:
        """How each latent is sampled."""
        return SamplingOptions(self.steps, self.solver, self.guidance_level, self.guidance_interval)

    def check(self) -> None:
        """Raises OptionError, naming the option, for values that no run can use."""
        check_count("number of images", self.num_images)
        check_count("batch size", self.batch_size)
        check_count("max new tokens", self.max_new_tokens)
        check_seed(self.seed)
        check_options(self.guidance_level, self.steps, self.solver, self.guidance_interval)


@dataclass(frozen=True)
class Speed:
    """Which tricks make the networks fast: those of fast_dit.py under the names explained there, and `ahead`.

    `ahead`: the language model's next token is asked for before the host has seen this one. `graph`, `pad`, `group`,
    `kernels` and `ahead` act on CUDA devices only; `null` needs `together`. `attention` is PyTorch's ("flash"), our kernel
    ("own"), or our kernel where it was measured to be faster ("auto"). "own" needs `kernels` and `defer`; without them "auto"
    means PyTorch's. `compile` "auto" compiles on CUDA once enough images are to be drawn (`ScaleRAE.expect`) to make up for
    the seconds that compiling takes.
    """

    compile: str = "auto"
    quantize: str | None = None
    graph: bool = True
    pad: bool = True
    group: bool = True
    before: bool = True
    null: bool = True
    together: bool = True
    shared: bool = True
    defer: bool = True
    kernels: bool = True
    ahead: bool = True
    attention: str = "auto"

    def check(self) -> None:
        """Raises OptionError for values that do not exist."""
        check_speed(self.compile, self.quantize)
        if self.attention not in ATTENTION:
            raise OptionError(f"attention {self.attention!r}: use one of {', '.join(ATTENTION)}")
        if self.attention == "own" and not (self.kernels and self.defer):
            raise OptionError(f"attention {self.attention!r}: needs kernels and defer, which are switched off")

    def same_network(self, other: Speed) -> bool:
        """Whether the network runs the same way but for what is compiled."""
        return replace(self, compile=other.compile) == other


def check_count(name: str, value: int | None) -> None:
    """Raises OptionError unless a number of things is at least 1 (or None, which is a default)."""
    if value is not None and value < 1:
        raise OptionError(f"{name} {value}: must be at least 1")


def check_seed(seed: int) -> None:
    """Raises OptionError for a seed that is no 63-bit number."""
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed {seed}: must be at least 0 and less than 2^63")


def check_options(guidance: float, steps: int, solver: str, interval: tuple[float, float] | None) -> None:
    """Raises OptionError, naming the option, for values no sampler can use."""
    if not (_finite(guidance) and guidance >= 0):
        raise OptionError(
            f"guidance level {_short(guidance)}: must be a finite number of at least 0 (1 is no guidance)"
        )
    if solver not in SOLVERS:
        raise OptionError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if steps < 1 and solver != "euler":
        raise OptionError(f"steps {steps}: must be at least 1")
    if solver == "euler" and not 2 <= steps <= TRAINING_STEPS:
        raise OptionError(
            f"steps {steps}: the euler solver picks from the published {TRAINING_STEPS}-time grid and takes 2 to 1000"
        )
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise OptionError(f"guidance interval {interval[0]} {interval[1]}: needs 0 <= LO < HI <= 1 (in t, noise is 1)")


def check_device_name(name: str | None) -> None:
    """Raises OptionError for what is no name of a device; whether there is such a device, torch knows."""
    if name is not None and not _DEVICE.fullmatch(name):
        raise OptionError(f"device {name!r}: not a device name; use cpu, cuda, cuda:N or mps")


def check_dtype_name(name: str | None) -> None:
    """Raises OptionError for a name that is none of DTYPES."""
    if name is not None and name not in DTYPES:
        raise OptionError(f"dtype {name!r}: use one of {', '.join(DTYPES)}")


def check_speed(compile: str, quantize: str | None) -> None:
    """Raises OptionError for names that are none of COMPILE and QUANTIZE."""
    if compile not in COMPILE:
        raise OptionError(f"compile {compile!r}: use one of {', '.join(COMPILE)}")
    if quantize is not None and quantize not in QUANTIZE:
        raise OptionError(f"quantize {quantize!r}: use {', '.join(QUANTIZE)}, or leave it out")


def _finite(value: float) -> bool:
    """Whether a number is one that a float can be: JSON's whole numbers may be larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: float) -> str:
    """A number for a message; whole numbers of hundreds of digits are cut, and Python refuses to write the longest."""
    try:
        text = str(value)
    except ValueError:
        return "(a number of thousands of digits)"
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text)} digits)"
