"""The options that command line, Python and servers share: names, defaults, help texts, checks. Imports no torch.

An option is a field of a dataclass whose annotation has a `Knob`. From these fields come the command line's flags
(`cli/signature.py`), the fields of manifests and experiment.json (`to_record`), the server's request fields and the page's
sliders. To add an option of the sampler, add a field to `SamplingOptions` and use it where latents are sampled. To add an option
of loading, add a field to `ModelChoice` and use it in `networks.load`; `ScaleRAE.from_pretrained` and `scale_rae.load` have it
as an argument and `diffusers.LoadOptions` as a key, so that editors complete it, and an experiment's `Settings` as a field, since it
is part of what resuming compares.
"""

from __future__ import annotations

import math
import re
import secrets
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from scale_rae.errors import OptionError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_MODEL = "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B"
PUBLISHED_DECODERS = {"siglip": "nyu-visionx/siglip2_decoder", "dinov2": "nyu-visionx/webssl300m_decoder"}
Dtype = Literal["float32", "bfloat16", "float16"]
CompileMode = Literal["auto", "on", "off"]
QuantizeKind = Literal["int8", "int8-products", "fp8", "fp8-storage", "nf4"]
OffloadMode = Literal["none", "model", "stream"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
COMPILE: tuple[CompileMode, ...] = get_args(CompileMode)
QUANTIZE: tuple[QuantizeKind, ...] = get_args(QuantizeKind)
OFFLOAD: tuple[OffloadMode, ...] = get_args(OffloadMode)
UNQUANTISED = "none"  # a choice of quantisation like None, but one that --memory keeps
# The quantisation of the language model by that of the DiT. Activations stay as they are: decoding gains nothing from smaller
# ones, and those of language models have outliers.
LANGUAGE_KINDS = {"int8": "int8", "int8-products": "int8", "fp8-storage": "fp8-storage", "nf4": "nf4"}
ATTENTION = ("auto", "flash", "own")
SOLVERS: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "ab2")
NOISE = ("cpu", "cuda")
REWARDS = ("imagereward", "siglip", "pickscore")
AUTO_REWARD = "auto"  # the model's own reward where it brings one, else the guide's; known once the model is loaded
POST_QA_MODES = ("latent", "image")
SEARCHES = ("best-of-n", "adaptive")

DEFAULT_STEPS = 49
DEFAULT_SEED = 42
DEFAULT_NEW_TOKENS = 512  # of a reply
DEFAULT_ANSWER_TOKENS = 64  # of an answer to a question about a drawn image
DECODE_AT_ONCE = 32  # latents
PROMPT_PREFIX = "Can you generate "  # put before prompts that are not worded as requests
TRAINING_STEPS = 1000  # the published grids are picked from 1000 training times
LARGEST_SEED = 2**63 - 1
RANDOM_SEED_BITS = 32  # short enough to be typed again

MODEL, SAMPLING, QUESTIONS, OUTPUT = "Model", "Sampling", "Questions about what was drawn", "Output"
SEARCH = "Adaptive search"
MODEL_HELP = 'Hub id, folder, or "shapes" (the bundled model).'

_DEVICE = re.compile(r"(cpu|cuda|mps)(:[1-9]?\d)?")  # torch takes longer numbers too, and wraps them around


# --- what is known of an option --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """An option's help text, names and bounds; its type and default are those of the dataclass field.

    `name` is the option's name in flags and files, `label` its name in error messages. `must` says what a value must be,
    where `least`, `most` and `choices` do not say it well enough. With `show_range`, --help shows least and most. A flag's
    value times `unit` is the field's. `bare` is the value of a flag that is given without one. With `only_if_set`, records
    leave out the default, so files are the same as before the option existed. `aliases` are other names of the flag, as other
    programs have them; one letter is a short flag. `parse` makes the field's value of a flag's text; a text that ends with a
    comma goes on in the next argument.
    """

    help: str
    panel: str | None = None  # the heading that --help lists the option under
    name: str = ""  # default: the field's name
    label: str = ""  # default: `name` with spaces
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    must: str = ""
    metavar: str | None = None
    show_default: bool = True
    show_range: bool = False
    unit: int = 1
    bare: int | None = None
    only_if_set: bool = False
    aliases: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None

    def check(self, label: str, value: Any) -> None:
        """Raises OptionError, beginning with `label`, for a value that the option does not take. None is always taken."""
        for one in value if isinstance(value, tuple) else (value,):
            self._check_one(label, one)

    def _check_one(self, label: str, value: Any) -> None:
        if value is None:
            return
        if self.choices:
            if value not in self.choices:
                raise OptionError(f"{label} {value!r}{self.must or ': use one of'} {', '.join(self.choices)}")
        elif self.least is not None or self.most is not None:
            above = self.least is None or value >= self.least
            if not (above and _finite(value) and (self.most is None or value <= self.most)):
                most = "" if self.most is None else f" to {self.most}"
                bounds = f"must be {self.least}{most}" if most else f"must be at least {self.least}"
                raise OptionError(f"{label} {_short(value)}: {self.must or bounds}")


@dataclass(frozen=True)
class Option:
    """One option of an options dataclass, as `options_of` lists them. `path` are the field names that lead to it."""

    path: tuple[str, ...]
    kind: Any  # its type
    default: Any  # dataclasses.MISSING where there is none
    knob: Knob

    @property
    def name(self) -> str:
        """Its name in flags (with dashes) and in files."""
        return self.knob.name or self.path[-1]

    @property
    def label(self) -> str:
        """Its name in error messages."""
        return self.knob.label or self.name.replace("_", " ")


T = TypeVar("T", bound="DataclassInstance")


def options_of(kind: type[DataclassInstance], defaults: DataclassInstance | None = None) -> list[Option]:
    """The options of a dataclass in order, those of contained options dataclasses in their place.

    `defaults`, an instance, has the defaults instead of the class. Fields without a Knob are no options.
    """
    found: list[Option] = []
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = getattr(defaults, field.name) if defaults is not None else _default(field)
        inner = hints[field.name]
        if isinstance(inner, type) and is_dataclass(inner):
            contained = options_of(inner, None if default is MISSING else default)
            found += [replace(option, path=(field.name, *option.path)) for option in contained]
        elif knob := knob_of(inner):
            found.append(Option((field.name,), get_args(inner)[0], default, knob))
    return found


def knob_of(annotation: Any) -> Knob | None:
    """The Knob of an Annotated type, None for any other annotation."""
    if get_origin(annotation) is Annotated:
        return next((item for item in annotation.__metadata__ if isinstance(item, Knob)), None)
    return None


def check_options(options: DataclassInstance, flags: bool = False) -> None:
    """Raises OptionError, naming the option, for a value that one of a dataclass's own options does not take.

    Contained dataclasses check themselves. With `flags`, messages name options as the command line does.
    """
    for option in options_of(type(options)):
        if len(option.path) == 1:
            label = f"--{option.name.replace('_', '-')}" if flags else option.label
            option.knob.check(label, getattr(options, option.path[0]))


def with_values(defaults: T, values: Mapping[str, Any]) -> T:
    """A copy of an options dataclass with the values of some options, given by the options' names."""
    changes: dict[str, Any] = {}
    for option in options_of(type(defaults)):
        if option.name in values:
            inner = changes
            for name in option.path[:-1]:
                inner = inner.setdefault(name, {})
            inner[option.path[-1]] = values[option.name]
    return _replaced(defaults, changes)


def to_record(options: DataclassInstance, complete: bool = False) -> dict[str, Any]:
    """All fields of an options dataclass as JSON values under the options' names; contained dataclasses are flattened.

    Defaults of options that are `only_if_set` are left out, unless the record is to be `complete`.
    """
    record: dict[str, Any] = {}
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, knob = getattr(options, field.name), knob_of(hints[field.name])
        if is_dataclass(value) and not isinstance(value, type):
            record |= to_record(value, complete)
        elif complete or knob is None or not knob.only_if_set or value != _default(field):
            name = (knob.name if knob else "") or field.name
            record[name] = list(value) if isinstance(value, tuple) else value
    return record


def from_record(kind: type[T], record: Mapping[str, Any]) -> T:
    """The options dataclass that `to_record` made a record of; what the record does not have takes its default.

    Raises:
        ValueError: naming the field, for a value of another type. TypeError: for a missing field without a default.
    """
    values: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            values[field.name] = from_record(hint, record)
            continue
        knob = knob_of(hint)
        name = (knob.name if knob else "") or field.name
        if name in record:
            values[field.name] = _typed(name, record[name], get_args(hint)[0] if knob else hint)
    return kind(**values)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _replaced(options: T, changes: Mapping[str, Any]) -> T:
    """The dataclass with changed fields; a dict stands for changes of a contained dataclass."""
    made = {
        name: _replaced(getattr(options, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(options, **made)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the type of its field: whole numbers are floats where floats are meant, lists are tuples."""
    variants = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for variant in variants:
        if get_origin(variant) is tuple and isinstance(value, list | tuple):
            parts = get_args(variant)
            if parts[-1] is Ellipsis:
                parts = (parts[0],) * len(value)
            if len(parts) == len(value):
                return tuple(_typed(name, item, part) for item, part in zip(value, parts, strict=True))
        elif variant is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if _finite(value) else value
        elif (
            isinstance(variant, type)
            and isinstance(value, variant)
            and not (isinstance(value, bool) and variant is int)
        ):
            return value
    raise ValueError(f"{name} is missing" if value is None else f"{name} is {value!r:.40}")


# --- options that several dataclasses have ---------------------------------------------------------------------------

_DTYPE = Knob("float32, bfloat16 or float16. Default: float32 on the CPU, bfloat16 elsewhere.", MODEL, choices=DTYPES)
Compile = Annotated[
    str,
    Knob(
        "Compile the networks: takes seconds, then draws faster. auto: on CUDA, when many images are to be drawn.",
        MODEL,
        choices=COMPILE,
    ),
]
Quantize = Annotated[
    str | None,
    Knob(
        "Smaller weights. none: as they are. int8: half of bfloat16's memory, on any device. nf4: a third or less, a little less exact. "
        "fp8-storage: as int8, in float8. int8-products: as int8, and the DiT multiplies in int8, which is faster on most "
        "GPUs. fp8: draw with float8 matrix products, fastest; needs a GPU that has them (Ada, Hopper, Blackwell).",
        MODEL,
        choices=(UNQUANTISED, *QUANTIZE),
    ),
]
Offload = Annotated[
    str,
    Knob(
        "Where weights wait, on a GPU with little memory. none: all on the GPU; model: in the host's memory until their part "
        "of the model has its turn; stream: in the host's memory, and the GPU holds two blocks at a time.",
        MODEL,
        choices=OFFLOAD,
        only_if_set=True,
    ),
]
Memory = Annotated[
    str | None,
    Knob(
        "Most memory of the device to take, as in 8G; auto: what is free. Chooses --quantize, --offload and the batch size so "
        "that the peak stays below, and says what it chose; --quantize and --offload narrow the choice.",
        MODEL,
        metavar="SIZE|auto",
        only_if_set=True,
    ),
]
Lora = Annotated[
    tuple[str, ...],
    Knob(
        "Folder or hub id of a LoRA adapter in PEFT's format, and a weight that scales it (1 is as trained). May be given "
        "several times.",
        MODEL,
        metavar="DIR[:WEIGHT]",
        only_if_set=True,
    ),
]
_SEED_BOUNDS = {"least": 0, "most": LARGEST_SEED, "must": "must be at least 0 and less than 2^63"}
Seed = Annotated[int, Knob("The same seed draws the same image.", SAMPLING, **_SEED_BOUNDS)]


def seeds_of(text: str) -> int | tuple[int, ...]:
    """The seed, or the several seeds, that a text names: "42", "1,2,3", "random".

    Raises:
        ValueError: for any other text.
    """
    words = [word.strip() for word in text.split(",")]
    seeds = tuple(secrets.randbits(RANDOM_SEED_BITS) if word == "random" else _whole(word) for word in words)
    return seeds if len(seeds) > 1 else seeds[0]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        raise ValueError(f"{text!r:.40} is not a whole number, whole numbers with commas between, or random")
    return int(text)


Seeds = Annotated[
    int | tuple[int, ...],
    Knob(
        "The same seed draws the same image. Several, as in 1,2,3: an image of each. random: a new seed, which is printed.",
        SAMPLING,
        **_SEED_BOUNDS,
        metavar="N[,N…]|random",
        parse=seeds_of,
    ),
]
MaxNewTokens = Annotated[int, Knob("Longest reply, in tokens.", SAMPLING, least=1)]


# --- the dataclasses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelChoice:
    """Which checkpoint, and how it is loaded."""

    model_path: Annotated[str, Knob(MODEL_HELP, MODEL, aliases=("model",))] = DEFAULT_MODEL
    decoder_repo: Annotated[
        str | None,
        Knob(
            "Pixel decoder: hub id or folder. Default: the one that matches the model, which is a folder `decoder` inside "
            f"or beside it, else {PUBLISHED_DECODERS['siglip']} (SigLIP-2) or {PUBLISHED_DECODERS['dinov2']} (WebSSL).",
            MODEL,
            show_default=False,
        ),
    ] = None
    revision: Annotated[str | None, Knob("Branch, tag or commit of a model on the hub.", MODEL)] = None
    device: Annotated[str | None, Knob("cpu, cuda, cuda:N or mps. Default: the best there is.", MODEL)] = None
    dtype: Annotated[str | None, _DTYPE] = None
    compile: Compile = "auto"
    quantize: Quantize = None
    offload: Offload = "none"
    memory: Memory = None
    lora: Lora = ()

    def check(self) -> None:
        """Raises OptionError for values that exist on no machine."""
        check_device_name(self.device)
        check_options(self)
        if self.memory is not None:
            memory_bytes(self.memory)
        check_offload(self.offload, self.device)
        for text in self.lora:
            lora_parts(text)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The sampler's options: how one latent is drawn from noise."""

    guidance: Annotated[
        float,
        Knob(
            "Classifier-free guidance; 1 is none.",
            SAMPLING,
            name="guidance_level",
            least=0,
            must="must be a finite number of at least 0 (1 is no guidance)",
            aliases=("guidance_scale",),
        ),
    ] = 1.0
    interval: Annotated[
        tuple[float, float] | None,
        Knob("Guide only where t is in [LO, HI]; noise is t = 1.", SAMPLING, name="guidance_interval", metavar="LO HI"),
    ] = None
    steps: Annotated[int, Knob("Steps of the solver.", SAMPLING, least=1, aliases=("num_inference_steps",))] = (
        DEFAULT_STEPS
    )
    solver: Annotated[
        str,
        Knob(
            "euler (the published schedule), heun, dpmpp_2m or ab2.",
            SAMPLING,
            choices=SOLVERS,
            must=" is unknown; choose one of",
        ),
    ] = "euler"
    noise: Annotated[
        str,
        Knob(
            "Where an image's noise is drawn. cpu: a seed means the same noise on every device; cuda: the noise that the "
            "official code draws on this GPU.",
            SAMPLING,
            choices=NOISE,
            only_if_set=True,
        ),
    ] = "cpu"

    def check(self) -> None:
        """Raises OptionError, naming the option, for values that no sampler can use."""
        if self.solver == "euler" and not 2 <= self.steps <= TRAINING_STEPS:
            raise OptionError(
                f"steps {self.steps}: the euler solver picks from the published {TRAINING_STEPS}-time grid and takes 2 to "
                f"{TRAINING_STEPS}"
            )
        check_options(self)
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low < high <= 1:
                raise OptionError(f"guidance interval {low} {high}: needs 0 <= LO < HI <= 1 (in t, noise is 1)")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of adaptive search: when candidates are looked at, how many are begun, and which are accepted."""

    check_at: Annotated[
        tuple[float, ...],
        Knob(
            "Look at a half-formed candidate where its t comes nearest to this, and drop it if it will not do; noise is "
            "t = 1. Given twice, look twice. Default: after two fifths of the evaluations, t = 0.84 with the bundled model, "
            "0.94 with the published ones.",
            SEARCH,
            metavar="T",
            show_default=False,
        ),
    ] = ()  # `adaptive.with_looks` knows the model
    max_candidates: Annotated[int, Knob("Begin at most this number of candidates per prompt.", SEARCH, least=1)] = 32
    accept_reward: Annotated[
        float | None,
        Knob(
            "Accept only images with at least this reward. Default: an image that is not far below the mean of its "
            "prompt's candidates, by reward and confidence.",
            SEARCH,
            show_default=False,
            least=-math.inf,
            must="must be a finite number",
        ),
    ] = None
    save_dropped: Annotated[bool, Knob("Also save the half-formed picture of each dropped candidate.", SEARCH)] = False

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no search can use."""
        check_options(self, flags=True)
        if len(self.check_at) > 2:
            raise OptionError("--check-at: give one or two times")
        for t in self.check_at:
            if not 0 < t <= 1:
                raise OptionError(f"--check-at {t:g}: must be above 0 and at most 1 (noise is 1)")
        if self.check_at != tuple(sorted(set(self.check_at), reverse=True)):
            raise OptionError(f"--check-at {' '.join(f'{t:g}' for t in self.check_at)}: must fall, as t does")

    def check_keep(self, keep: int, named: str = "the images to keep, which are") -> None:
        """Raises OptionError for more images to keep than candidates; `named` says in the message what the number is."""
        if keep > self.max_candidates:
            raise OptionError(f"--max-candidates {self.max_candidates}: must be at least {named} {keep}")

    def check_without_reward(self) -> None:
        """Raises OptionError for a search that has no reward, where these options need one."""
        if self.accept_reward is not None:
            raise OptionError(f"--accept-reward {self.accept_reward:g}: there is no reward; give --reward too")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: `num_images` of each prompt and seed.

    `image_seeds` are the noise seeds themselves, instead of `num_images` and `seed`.
    """

    num_images: Annotated[int, Knob("Images of each prompt.", SAMPLING, label="number of images", least=1)] = 1
    seed: Seeds = DEFAULT_SEED
    options: SamplingOptions = SamplingOptions()
    max_new_tokens: MaxNewTokens = DEFAULT_NEW_TOKENS
    batch_size: Annotated[
        int | None, Knob("Images drawn at once. Default: 8 on the CPU, 32 elsewhere.", SAMPLING, least=1)
    ] = None
    image_seeds: tuple[int, ...] | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, one or several."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    def check(self) -> None:
        """Raises OptionError, naming the option, for values that no run can use."""
        check_options(self)
        self.options.check()


@dataclass(frozen=True)
class Speed:
    """Which optimisations are on: those of fast_dit.py under the names explained there, and `ahead`.

    `ahead`: the language model's next token is asked for before the host has seen this one. `graph`, `pad`, `group`,
    `kernels`, `few` and `ahead` act on CUDA devices only; `null` needs `together`. `attention` is PyTorch's ("flash"), our kernel
    ("own"), or our kernel where it was measured to be faster ("auto"). "own" needs `kernels` and `defer`; without them "auto"
    means PyTorch's. `compile` "auto" compiles on CUDA once enough images are to be drawn (`ScaleRAE.expect`) to make up for
    the seconds that compiling takes.
    """

    compile: Compile = "auto"
    quantize: Quantize = None
    graph: bool = True
    pad: bool = True
    group: bool = True
    before: bool = True
    null: bool = True
    together: bool = True
    shared: bool = True
    defer: bool = True
    kernels: bool = True
    few: bool | None = None  # None: in float8, where it was measured to be faster
    ahead: bool = True
    attention: Annotated[str, Knob("Which attention kernel.", choices=ATTENTION)] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize", quantisation(self.quantize))

    def check(self) -> None:
        """Raises OptionError for values that do not exist."""
        check_options(self)
        if self.attention == "own" and not (self.kernels and self.defer):
            raise OptionError(f"attention {self.attention!r}: needs kernels and defer, which are switched off")

    def same_network(self, other: Speed) -> bool:
        """Whether the network runs the same way but for what is compiled."""
        return replace(self, compile=other.compile) == other


# --- checks of single values -----------------------------------------------------------------------------------------


def quantisation(choice: str | None) -> str | None:
    """The quantisation of a choice: None for "none"."""
    return None if choice == UNQUANTISED else choice


def default_batch_size(device: str) -> int:
    """Images per batch where none is chosen, on a kind of device ("cuda"): 8 on the CPU, 32 elsewhere."""
    return 8 if device == "cpu" else 32


def check_count(name: str, value: int | None) -> None:
    """Raises OptionError unless a number of things is at least 1 (or None, which is a default)."""
    if value is not None and value < 1:
        raise OptionError(f"{name} {value}: must be at least 1")


def check_device_name(name: str | None) -> None:
    """Raises OptionError for what is not the name of a device; whether the device exists, torch knows."""
    if name is not None and not _DEVICE.fullmatch(name):
        raise OptionError(f"device {name!r}: not a device name; use cpu, cuda, cuda:N or mps")


def check_offload(offload: str, device: str | None) -> None:
    """Raises OptionError for offloading from a device that has no memory of its own; None may be any device."""
    kind = (device or "cuda").partition(":")[0]
    if offload != "none" and kind != "cuda":
        holds = "computes in the host's memory" if kind == "cpu" else "shares its memory with the host"
        raise OptionError(
            f"offload {offload!r}: weights would move to the host's memory, but the device {device} {holds}; use --offload none"
        )


def memory_bytes(text: str) -> int | None:
    """The bytes of a size like "8G", "6.5GiB" or "6000M" (units of 1024); None for "auto".

    Raises:
        OptionError: for any other text.
    """
    if text == "auto":
        return None
    known = isinstance(text, str)  # a script can give a number
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([GM])(?:i?B)?", text, re.IGNORECASE) if known else None
    size = int(float(match[1]) * (1 << (30 if match[2] in "gG" else 20))) if match else 0
    if not size:
        raise OptionError(f"memory {text!r:.40}: must be a size like 8G or 6000M, or auto")
    return size


def lora_parts(text: str) -> tuple[str, float]:
    """(folder or hub id, weight) of DIR[:WEIGHT]; the weight is 1 if none is given.

    Raises:
        OptionError: for a weight that is no finite number, or for no folder.
    """
    name, colon, number = text.rpartition(":")
    if not colon or "/" in number or "\\" in number:  # a colon within the folder's name
        name, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise OptionError(f"lora {text!r:.80}: must be DIR or DIR:WEIGHT, as in my-lora:0.8")
    return name, weight


def check_dtype_name(name: str | None) -> None:
    """Raises OptionError for a name that is none of DTYPES."""
    _DTYPE.check("dtype", name)


def _finite(value: float) -> bool:
    """Whether a float can hold a number: JSON's whole numbers may be larger."""
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
