"""Requests and answers of the HTTP interface: OpenAI's fields, and the options of Scale-RAE's sampler.

OpenAI's fields without effect here are accepted with any value (`user`; `temperature`, since text is greedy), or with the values
that are true of every answer (`tool_choice: "none"`). Any other field is refused by name. null means the same as an absent field.
Validation of a list ends at its first error, and objects may have at most MOST_FIELDS fields, so a wrong request causes only a few
errors, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scale_rae.options import (
    DEFAULT_STEPS,
    LARGEST_SEED,
    REWARDS,
    TRAINING_STEPS,
    Option,
    SamplingOptions,
    options_of,
    with_values,
)
from scale_rae.student import Student

Seed = Annotated[int, Field(ge=0, lt=LARGEST_SEED + 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _no(value: bool) -> bool:
    if value:
        raise PydanticCustomError("only_false", "only false is possible here")
    return value


def _number_or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:  # one for each of the two
        raise PydanticCustomError("number_or_auto", 'must be an integer from 1 to 64, or "auto"') from None


MOST_FIELDS = 100  # of an object
AUTO: Literal["auto"] = "auto"  # best_of: candidates are searched until enough are accepted
BestOf = Annotated[Annotated[int, Field(ge=1, le=64)] | Literal["auto"], WrapValidator(_number_or_auto)]
NoList = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[int, Field(ge=0, le=0)]  # as Literal[False] would take 0, Literal[0] would take false

# Literal[False] would take 0 too.
No = Annotated[bool, AfterValidator(_no), WithJsonSchema({"type": "boolean", "const": False})]


# An image of one pixel.
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)


class _Strict(BaseModel):
    # Strict: a number in quotes, or true for 1, is not what the document says.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        json_schema_extra=lambda schema: _take_null(schema),
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, value: Any) -> Any:
        """Null is absent."""
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", f"has more than {MOST_FIELDS} fields")
        return {name: given for name, given in value.items() if given is not None}


def _take_null(schema: dict[str, Any]) -> None:
    """Says in an object's JSON schema that fields which may be absent may be null."""
    for name, field in schema.get("properties", {}).items():
        variants = field.get("anyOf", [field])
        if name in schema.get("required", ()) or {"type": "null"} in variants or field.get("type") == "null":
            continue
        said = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
        schema["properties"][name] = {"anyOf": [*field.pop("anyOf", [dict(field)]), {"type": "null"}], **said}


class _Seeded(_Strict):
    """How images are sampled: the seed, and from `_with_sampler_options` one field per option of the sampler."""

    seed: Seed | None = Field(None, description="The same seed draws the same image; one is picked if none is given.")

    def options(self, most_steps: int, student: Student | None) -> SamplingOptions:
        """The sampler's options; `steps` not given is the default, or `most_steps` where that is less. A student has its own.

        Raises:
            InputError: for values that do not go together.
        """
        if student is not None:
            return student.sampling(*self._given(DEFAULT_STEPS))
        options, _ = self._given(min(DEFAULT_STEPS, most_steps))
        options.check()
        return options

    def refused_by(self, student: Student) -> Iterator[tuple[str, str]]:
        """The fields that a student does not take, each with its value and why."""
        return ((_field_name(option), why) for option, why in student.refused(*self._given(DEFAULT_STEPS)))

    def _given(self, steps: int) -> tuple[SamplingOptions, set[str]]:
        """(the sampler's options, names of those that the request chooses); `steps` are taken where it gives none."""
        known = options_of(SamplingOptions)
        values = {option.name: getattr(self, _field_name(option)) for option in known}
        chosen = {option.name for option in known if self._chooses(_field_name(option))}
        return with_values(SamplingOptions(), values | {"steps": values["steps"] or steps}), chosen

    def _chooses(self, field: str) -> bool:
        """Whether the request gives a value other than null to a field."""
        return field in self.model_fields_set and getattr(self, field) is not None


# What requests call otherwise than files do, and what else holds for them: bounds of one request, and descriptions.
_NAMES = {"guidance_level": "guidance"}
_MOST: dict[str, float] = {"guidance_level": 100, "steps": TRAINING_STEPS}
_DESCRIPTIONS = {
    "guidance_interval": "[lo, hi]: guide only where t is in it; noise is t = 1.",
    "steps": f"Steps of the solver; {DEFAULT_STEPS} if not given, or as many as the server allows.",
    "solver": None,
}


def _field_name(option: Option) -> str:
    return _NAMES.get(option.name, option.name)


def _with_sampler_options(base: type[_Seeded]) -> type[_Seeded]:
    """The model with one field per option of the sampler: its type, default and bounds are those in `options`."""
    fields: dict[str, Any] = {}
    for option in options_of(SamplingOptions):
        name, kind, knob, default = option.name, option.kind, option.knob, option.default
        bounds: dict[str, Any] = {}
        if knob.least is not None:
            bounds["ge"] = knob.least
        if most := _MOST.get(name, knob.most):
            bounds["le"] = most
        if name == "steps":
            kind, default = int | None, None  # not given: as many as the server allows
        elif knob.choices:
            kind = Literal[knob.choices]
        elif kind == tuple[float, float] | None:
            kind = Annotated[tuple[Finite, Finite], Field(strict=False)] | None  # strict takes no list
        fields[_field_name(option)] = (kind, Field(default, description=_DESCRIPTIONS.get(name, knob.help), **bounds))
    return create_model("_Sampling", __base__=base, **fields)


if TYPE_CHECKING:

    class _Sampling(_Seeded):  # the fields that routes/checks.py reads
        guidance: float
        guidance_interval: tuple[float, float] | None
        steps: int | None
        noise: str

else:
    _Sampling = _with_sampler_options(_Seeded)


class ImageRequest(_Sampling):
    """POST /v1/images/generations"""

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = None
    n: int = Field(1, ge=1, le=64, description="Images to return.")
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="auto, or the model's.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="url: a link to the image on this server, which keeps it for a limited time."
    )
    best_of: BestOf | None = Field(
        None,
        description="Images to draw, of which the best n are returned. auto: as many as it takes until n are accepted; those "
        "that will not do are dropped while they form.",
    )
    reward: Literal["answer", *REWARDS] | None = Field(  # type: ignore[valid-type]
        None,
        description="What picks the best: a reward model that the server has loaded, or answer: the model's own yes or no.",
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of JPEG and WebP; at 100, the default, WebP is lossless. PNG takes 100 only."
    )
    partial_images: Zero | None = None
    stream: No | None = None
    user: str | None = None
    safety_identifier: str | None = None


class ImageURL(_Strict):
    url: str = Field(
        description="data:image/png;base64,… (or jpeg, webp, gif)", json_schema_extra={"examples": [PIXEL]}
    )
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Texts = Annotated[list[TextPart], Field(max_length=256, fail_fast=True)]


class UserMessage(_Strict):
    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=256, fail_fast=True)]
    name: str | None = None


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: str | Annotated[Texts, Field(min_length=1)]
    name: str | None = None


class AssistantMessage(_Strict):
    """What the model said before, with all that clients add to it. `images` as they were in the answer."""

    role: Literal["assistant"]
    content: str | Texts | None = None
    images: Annotated[list[ImagePart], Field(max_length=64, fail_fast=True)] = []
    name: str | None = None
    refusal: Literal[""] | None = None
    reasoning_content: Literal[""] | None = None
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    audio: None = None
    function_call: None = None
    parsed: None = None
    tool_calls: NoList | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    model: str | None = None
    n: int = Field(1, ge=1, le=64, description="Choices. Their text is the same, their images have noise of their own.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description='Without "image", the answer ends where it would draw; without modalities, it draws.'
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="Ignored: text is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Ignored: text is greedy.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Ignored.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Ignored.")
    response_format: TextFormat | None = None
    logprobs: No | None = None
    top_logprobs: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    stop: NoList | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: No | None = None
    user: str | None = None


class InputText(_Strict):
    type: Literal["input_text"]
    text: str


class InputImage(_Strict):
    type: Literal["input_image"]
    image_url: str = Field(description="As in ImageURL.", json_schema_extra={"examples": [PIXEL]})
    detail: Literal["auto", "low", "high"] | None = None


class OutputText(_Strict):
    type: Literal["output_text"]
    text: str
    annotations: NoList | None = None
    logprobs: NoList | None = None


class InputMessage(_Strict):
    """What a user or the developer says, or what the model said before."""

    role: Literal["user", "assistant", "system", "developer"]
    content: (
        str
        | Annotated[
            list[Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]],
            Field(min_length=1, max_length=256, fail_fast=True),
        ]
    )
    type: Literal["message"] = "message"
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


class DrawnImage(_Strict):
    """An image that the model drew before, as it was in the answer."""

    type: Literal["image_generation_call"]
    id: str | None = None
    result: str = Field(description="The PNG in base64.", json_schema_extra={"examples": [PIXEL.partition(",")[2]]})
    status: Literal["in_progress", "completed", "generating", "failed"] | None = None
    seed: Seed | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    action: str | None = None
    background: str | None = None
    quality: str | None = None
    size: str | None = None
    revised_prompt: str | None = None


class ImageTool(_Strict):
    type: Literal["image_generation"]
    output_format: Literal["png"] | None = None
    size: Literal["auto"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    action: Literal["auto", "generate"] | None = None
    model: str | None = None
    partial_images: Zero | None = None


class TextOptions(_Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(_Sampling):
    """POST /v1/responses"""

    input: str | Annotated[list[InputMessage | DrawnImage], Field(min_length=1, max_length=1000, fail_fast=True)]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[ImageTool], Field(max_length=16)] | None = Field(
        None,
        description="Without image_generation in it, the answer ends where it would draw; without tools, it draws.",
    )
    tool_choice: Literal["none", "auto"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="Ignored: text is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Ignored: text is greedy.")
    text: TextOptions | None = None
    include: NoList | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: No | None = None
    store: No | None = Field(None, description="The server keeps no answers.")
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


# Answers -----------------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ImageData(BaseModel):
    """One image: its file in base64 or a link to it, and the seed of its noise. With best_of, what it was scored.

    With best_of "auto", `accepted` is false for an image that only makes up the number.
    """

    b64_json: str | None = None
    url: str | None = None
    seed: int
    reward: str | None = None
    score: float | None = None
    answer: str | None = None
    accepted: bool | None = None


class SearchSummary(BaseModel):
    """What best_of "auto" took: candidates begun, those of them that were dropped early, and those that were accepted.

    `evaluations` are those of the network, per image, with looks at their cost.
    """

    candidates: int
    dropped: int
    accepted: int
    evaluations: float


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    size: str
    output_format: str = "png"
    quality: str = "auto"
    background: str = "opaque"
    search: SearchSummary | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "scale-rae"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    images: list[ImagePart] | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class OutputMessage(BaseModel):
    """The text of an answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[dict[str, Any]]


class OutputImage(BaseModel):
    """An image of an answer: a PNG in base64, and the seed of its noise."""

    id: str
    type: Literal["image_generation_call"] = "image_generation_call"
    status: Literal["in_progress", "completed"]
    result: str | None = None
    output_format: str = "png"
    seed: int | None = None


class ResponsesResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    model: str
    output: list[OutputMessage | OutputImage] = []
    parallel_tool_calls: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    tool_choice: str = "auto"
    tools: list[dict[str, Any]] = []
    usage: dict[str, Any] | None = None


class Status(BaseModel):
    status: str
