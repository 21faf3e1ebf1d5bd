"""The language model in training: a plain causal pass without cache and masks.

It can be compiled and captured. It calls the same submodules in the same order as inference does (tests compare both).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_rae.language import LanguageModel


def positions(language: LanguageModel, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rotary tables (cos, sin), each [1, length, head width], of places 0 … length-1."""
    place = torch.arange(length, device=language.device)[None]
    cos, sin = language.model.rotary_emb(torch.zeros(1, device=language.device, dtype=dtype), place)
    return cos.detach(), sin.detach()


def read(language: LanguageModel, embeds: Tensor) -> Tensor:
    """`hidden_states` [B, T, H] of input embeddings [B, T, H] at the places 0 … T-1."""
    return hidden_states(language, embeds, positions(language, embeds.shape[1], language.dtype))


def hidden_states(language: LanguageModel, embeds: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Final-normed hidden states [B, T, H] of input embeddings [B, T, H], causal.

    Sequences are padded on the right: no real token ever sees padding, so no mask is needed and places count from 0.
    """
    hidden = embeds
    for layer in language.model.layers:
        hidden = layer(hidden, rotary)
    return language.model.norm(hidden)
