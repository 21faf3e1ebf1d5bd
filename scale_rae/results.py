"""The result classes of generating and answering: images with their latents, and text; and the options of generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from PIL import Image
from torch import Tensor

from scale_rae.acceptance import Candidate
from scale_rae.errors import counted, shorten
from scale_rae.flow import StepCallback
from scale_rae.language import Reply
from scale_rae.loading import LoadProgress
from scale_rae.options import SamplingOptions


class GenerateOptions(TypedDict, total=False):
    """The options of `ScaleRAE.generate`, which says what they are."""

    num_images: int
    seed: int
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    steps: int | None
    solver: str | None
    options: SamplingOptions | None
    max_new_tokens: int
    latents: Sequence[Tensor] | None
    image_seeds: Sequence[Sequence[int]] | None
    batch_size: int | None
    decode: bool
    draw: bool
    callback: StepCallback | None
    progress: LoadProgress | None
    guidance_scale: float | None
    num_inference_steps: int | None


@dataclass
class GeneratedImage:
    """One image: latent [L, C] float32 on the CPU, pixels unless decoding was skipped, and the seed of its noise."""

    latent: Tensor
    image: Image.Image | None
    seed: int

    def __repr__(self) -> str:
        size = f"{self.image.width} x {self.image.height}" if self.image is not None else "not decoded"
        return f"GeneratedImage(latent {list(self.latent.shape)}, {size}, seed {self.seed})"


@dataclass
class Generation:
    """The result of one prompt: text, images (none when the reply asks for none), and seconds per stage of the call."""

    prompt: str
    text: str
    reply: Reply
    images: list[GeneratedImage]
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Generation({shorten(self.prompt)!r} -> {shorten(self.text)!r}, {counted(len(self.images), 'image')})"


@dataclass
class FoundImage:
    """One image that a search kept: latent [L, C] float32 on the CPU, pixels, its noise seed, and what it was found to be.

    `candidate` is its number among the prompt's candidates. `judgement` has the fields of a Score, `reward` is None without a
    reward. `accepted` is False for an image that is kept because too few were accepted.
    """

    latent: Tensor
    image: Image.Image
    seed: int
    candidate: int
    accepted: bool
    judgement: dict[str, Any]
    reward: float | None

    def __repr__(self) -> str:
        reward = "" if self.reward is None else f", reward {self.reward:.3f}"
        fate = "accepted" if self.accepted else "not accepted"
        size = f"{self.image.width} x {self.image.height}"
        return f"FoundImage({fate}, {self.judgement['answer']}{reward}, {size}, seed {self.seed})"


@dataclass
class SearchResult:
    """The result of one prompt's search: the kept images, best first, and what became of every candidate.

    `images` is empty when the reply asks for no image. `accepted` counts accepted images. `evaluations` of the network
    include looks at their cost. `dropped` has the half-formed pictures of dropped candidates by number, where they were to be
    saved. `seconds` per stage are those of all prompts that were searched together.
    """

    prompt: str
    request: str  # the message that asked for the images
    text: str
    reply: Reply
    images: list[FoundImage] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    accepted: int = 0
    evaluations: float = 0.0
    dropped: dict[int, Image.Image] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        candidates = counted(len(self.candidates), "candidate")
        return (
            f"SearchResult({shorten(self.prompt)!r}: {self.accepted} of {counted(len(self.images), 'image')} accepted, {candidates}, "
            f"{counted(self.evaluations, 'evaluation', 'g')})"
        )


@dataclass(frozen=True)
class Answer:
    """The answer to a question: its text, and the Reply with each token's id, logit and confidence."""

    text: str
    reply: Reply

    def __repr__(self) -> str:
        return f"Answer({shorten(self.text)!r}, {counted(len(self.reply.ids), 'token')})"
