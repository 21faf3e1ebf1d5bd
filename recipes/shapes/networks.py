"""The networks in training: built from the package's classes, initialised, with forward passes without cache and masks.

The forward functions call the same submodules in the same order as inference does (tests compare them). Without caches and masks,
they can be compiled and captured as CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.shapes import settings
from recipes.shapes.settings import Preset
from scale_rae.config import ScaleRAEConfig, parse_config
from scale_rae.decoder import PixelDecoder
from scale_rae.dit import DiT
from scale_rae.fast_weights import pad_swiglu
from scale_rae.language import LanguageModel

INIT_TOKENS = 0.02  # standard deviation of token and query embeddings
INIT_CONDITION = 0.5  # of the condition, about
PAD_TO = 8  # SwiGLU widths in training, so that matrix products run on aligned memory; `crop_swiglu` takes it off again

# Encoder ----------------------------------------------------------------------------------------------------------------------


def build_encoder(config: Mapping[str, Any]) -> nn.Module:
    """transformers' SiglipModel of a config.json, initialised as SigLIP is (its scale and bias as in the paper)."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {name: config[name] for name in ("text_config", "vision_config")}
    siglip = SiglipConfig(**sizes)
    for part in (siglip, siglip.text_config, siglip.vision_config):
        part._attn_implementation = "sdpa"
    model: Any = SiglipModel(siglip)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


def encoder_layers(siglip: Any) -> list[nn.Module]:
    """The transformer layers of both towers."""
    return [*siglip.vision_model.encoder.layers, *siglip.text_model.encoder.layers]


def image_tokens(siglip: Any, pixels: Tensor) -> Tensor:
    """hidden_states[-1] [B, L, C] of normalised pixels [B, 3, H, W]: before the post-layernorm."""
    hidden = siglip.vision_model.embeddings(pixels)
    for layer in siglip.vision_model.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def pooled_image(siglip: Any, hidden: Tensor) -> Tensor:
    """Image embeddings [B, C] of `image_tokens`."""
    return siglip.vision_model.head(siglip.vision_model.post_layernorm(hidden))


def pooled_text(siglip: Any, ids: Tensor) -> Tensor:
    """Text embeddings [B, C] of captions [B, T], padded; the last place is read, padding or not."""
    hidden = siglip.text_model.embeddings(ids)
    for layer in siglip.text_model.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return siglip.text_model.head(siglip.text_model.final_layer_norm(hidden)[:, -1])


def latent_of(hidden: Tensor) -> Tensor:
    """Latents [B, L, C] float32: layer norm without gain or bias (REFERENCE §9)."""
    return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)


def with_noise(latents: Tensor, most: float) -> Tensor:
    """Latents [B, L, C] with added noise; its standard deviation is drawn from U(0, most) for each image."""
    sigma = most * torch.rand(len(latents), 1, 1, device=latents.device)
    return latents + sigma * torch.randn_like(latents)


def normalised(images: Tensor) -> Tensor:
    """uint8 pictures -> pixels as the encoder's processor makes them, float32 in -1..1."""
    return images.float() / (255 * settings.PIXEL_STD) - settings.PIXEL_MEAN / settings.PIXEL_STD


# Decoder ----------------------------------------------------------------------------------------------------------------------


def build_decoder(preset: Preset) -> PixelDecoder:
    """The pixel decoder, freshly initialised."""
    decoder = PixelDecoder(settings.decoder_sizes(preset))
    with torch.no_grad():
        _xavier(decoder)
        grid = sin_cos_positions(preset.side, preset.decoder_width)
        decoder.decoder_pos_embed[0, 1:] = grid
        nn.init.normal_(decoder.trainable_cls_token, std=0.02)
    return decoder


# Language model and DiT -------------------------------------------------------------------------------------------------------


def build_joint(config: Mapping[str, Any]) -> tuple[ScaleRAEConfig, LanguageModel, DiT]:
    """Language model and velocity network of a config.json, initialised, ready to train (`pad_swiglu`)."""
    parsed = parse_config(dict(config), Path("config.json"))
    language, dit = LanguageModel(parsed), DiT(parsed.dit)
    language.lm_head.weight = language.model.embed_tokens.weight
    with torch.no_grad():
        _initialise_language(language, parsed)
        _initialise_dit(dit)
        pad_swiglu(dit, PAD_TO)
    return parsed, language, dit


def _initialise_language(language: LanguageModel, config: ScaleRAEConfig) -> None:
    """Matrices keep the size of what they read, tokens and queries begin small.

    So a hidden state is what attention gathered rather than the token it stands on, and the condition depends on the prompt
    from the first step. (From the usual 0.02 everywhere, it differs by a twentieth between prompts, and the flow loss, which
    the constant part disturbs, removes that before the velocity network has learnt to use it.)
    """
    depth = len(language.model.layers)
    for name, parameter in language.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            scale = 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * depth)
            elif name.endswith(("embed_tokens.weight", "latent_queries")):
                scale = INIT_TOKENS
            nn.init.normal_(parameter, std=scale)
    for module in (language.model.mm_projector, getattr(language, "diff_head_projector", None)):
        if module is not None:
            _xavier(module)
    if config.condition_projector:
        language.diff_head_projector.weight.mul_(INIT_CONDITION)


def _initialise_dit(dit: DiT) -> None:
    """As DiT: Xavier, adaLN-zero, zero output, sin-cos positions. The time embedding is Xavier too: it must be heard beside
    the condition."""
    _xavier(dit)
    nn.init.xavier_uniform_(dit.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(dit.x_embedder.proj.bias)  # type: ignore[arg-type]
    nn.init.normal_(dit.y_embedder.dropout_embedding, std=0.02)
    dit.pos_embed[0] = sin_cos_positions(dit.config.side, dit.config.width)
    for owner in (*dit.dit_blocks, dit.final_layer):
        nn.init.zeros_(owner.adaLN_modulation[1].weight)
    nn.init.zeros_(dit.final_layer.linear.weight)


def _xavier(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def sin_cos_positions(side: int, width: int) -> Tensor:
    """2-D sine-cosine position table [side², width]; a width that is no multiple of 4 ends in zeros."""
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency  # [side, quarter]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, 2 quarter]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return F.pad(torch.cat([rows, columns], dim=-1).flatten(0, 1), (0, width - 4 * quarter))


def compiled_parts(language: LanguageModel, dit: DiT) -> list[nn.Module]:
    """The modules that are worth compiling."""
    return [*language.model.layers, language.model.norm, *dit.dit_blocks, dit.final_layer]


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[…] -> […, size]. Products with it gather; their gradient is a product too, which needs no atomics and no sorting."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).to(dtype)
