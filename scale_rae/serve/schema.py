"""Requests and answers as they are on the wire: OpenAI's, and what a Scale-RAE can be told besides.

Fields that OpenAI's clients send and that mean nothing here are either taken at every value that changes no promise (`user`,
`temperature`: text is greedy), or at the one value that is true here. Anything else is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from scale_rae.flow import DEFAULT_STEPS
from scale_rae.options import SamplingOptions

Solver = Literal["euler", "heun", "dpmpp_2m", "ab2"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _no(value: bool) -> bool:
    if value:
        raise PydanticCustomError("only_false", "only false is possible here")
    return value


# Literal[False] would take 0 too.
No = Annotated[bool, AfterValidator(_no), WithJsonSchema({"type": "boolean", "const": False})]


# An image of one pixel.
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)


class _Strict(BaseModel):
    # Strict: a number in quotes, or true for 1, is not what the document says.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class _Sampling(_Strict):
    """How drawings are sampled."""

    seed: Seed | None = Field(None, description="The same seed draws the same image; one is picked if none is given.")
    guidance: Annotated[float, Field(ge=0, le=100)] = Field(1.0, description="Classifier-free guidance; 1 is none.")
    guidance_interval: Annotated[tuple[Finite, Finite], Field(strict=False)] | None = Field(  # a list is meant
        None, description="[lo, hi]: guide only where t is in it; noise is t = 1."
    )
    steps: int | None = Field(
        None, ge=1, le=1000, description="Steps of the solver; 49 if not given, or as many as the server allows."
    )
    solver: Solver = "euler"

    def options(self, most_steps: int) -> SamplingOptions:
        """The pipeline's options.

        Raises:
            InputError: for values that do not go together.
        """
        steps = self.steps or min(DEFAULT_STEPS, most_steps)
        options = SamplingOptions(steps, self.solver, self.guidance, self.guidance_interval)
        options.check()
        return options


class ImageRequest(_Sampling):
    """POST /v1/images/generations"""

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = None
    n: int = Field(1, ge=1, le=64, description="Images to return.")
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="auto, or the model's.")
    response_format: Literal["b64_json"] = "b64_json"
    best_of: int | None = Field(None, ge=1, le=64, description="Images to draw, of which the best n are returned.")
    reward: Literal["answer", "imagereward", "siglip", "pickscore"] | None = Field(
        None,
        description="What picks the best: a reward model that the server has loaded, or answer: the model's own yes or no.",
    )
    output_format: Literal["png"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] | None = None
    stream: No | None = None
    user: str | None = None


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


class UserMessage(_Strict):
    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None


class AssistantMessage(_Strict):
    """What the model said before. `images` as they were in the answer."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    images: list[ImagePart] = []
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    model: str | None = None
    n: int = Field(1, ge=1, le=64, description="Choices. Their text is the same, their images have noise of their own.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: list[Literal["text", "image"]] | None = Field(
        None, description='Without "image", what the answer asks to draw is not drawn.'
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="Ignored: text is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Ignored: text is greedy.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Ignored.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Ignored.")
    response_format: TextFormat | None = None
    logprobs: No | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: No | None = None
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
    """One image: a PNG in base64, and the seed of its noise. With best_of, what it was scored."""

    b64_json: str
    seed: int
    reward: str | None = None
    score: float | None = None
    answer: str | None = None


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    size: str
    output_format: str = "png"
    quality: str = "auto"
    background: str = "opaque"


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


class Status(BaseModel):
    status: str
