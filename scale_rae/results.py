"""What the model gives back: drawings and answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from scale_rae.errors import shorten
from scale_rae.language import Reply


@dataclass
class GeneratedImage:
    """One drawn image: its latent [L, C] float32 on the CPU, its pixels unless decoding was skipped, its own seed."""

    latent: Tensor
    image: Image.Image | None
    seed: int

    def __repr__(self) -> str:
        size = f"{self.image.width} x {self.image.height}" if self.image is not None else "not decoded"
        return f"GeneratedImage(latent {list(self.latent.shape)}, {size}, seed {self.seed})"


@dataclass
class Generation:
    """What one prompt gave: the model's text, its drawings (none when the reply asked for none), seconds per stage."""

    prompt: str
    text: str
    reply: Reply
    images: list[GeneratedImage]
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Generation({shorten(self.prompt)!r} -> {shorten(self.text)!r}, {len(self.images)} images)"


@dataclass(frozen=True)
class Answer:
    """The model's answer to a question: text, and for each of its tokens the id, logit and confidence."""

    text: str
    reply: Reply

    def __repr__(self) -> str:
        return f"Answer({shorten(self.text)!r}, {len(self.reply.ids)} tokens)"
