"""The result classes of generating and answering: images with their latents, and text."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from scale_rae.errors import shorten
from scale_rae.language import Reply


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
        return f"Generation({shorten(self.prompt)!r} -> {shorten(self.text)!r}, {len(self.images)} images)"


@dataclass(frozen=True)
class Answer:
    """The answer to a question: its text, and the Reply with each token's id, logit and confidence."""

    text: str
    reply: Reply

    def __repr__(self) -> str:
        return f"Answer({shorten(self.text)!r}, {len(self.reply.ids)} tokens)"
