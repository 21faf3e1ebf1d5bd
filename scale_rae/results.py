"""What the model gives back: drawings and answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from scale_rae.language import Reply


@dataclass
class GeneratedImage:
    """One drawn image: its latent [L, C] float32 on the CPU, its pixels unless decoding was skipped, its own seed."""

    latent: Tensor
    image: Image.Image | None
    seed: int


@dataclass
class Generation:
    """What one prompt gave: the model's text, its drawings (none when the reply asked for none), seconds per stage."""

    prompt: str
    text: str
    reply: Reply
    images: list[GeneratedImage]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The model's answer to a question: text, and for each of its tokens the id, logit and confidence."""

    text: str
    reply: Reply
