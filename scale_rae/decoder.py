"""The pixel decoder (ViT) of a representation autoencoder: latent [L, C] -> pixels (REFERENCE §8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.checkpoint import RowSink
from scale_rae.config import DecoderConfig
from scale_rae.encoder import resize_tokens
from scale_rae.quantization import Place, quantize_linears


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)


class _Dense(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width_out)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = _SelfAttention(width)
        self.output = _Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.attention.query, self.attention.key, self.attention.value)
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projections)  # [B, heads, T, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output.dense(out.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config.width, config.heads)
        self.intermediate = _Dense(config.width, config.inner)
        self.output = _Dense(config.inner, config.width)
        self.layernorm_before = nn.LayerNorm(config.width, eps=config.eps)
        self.layernorm_after = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class PixelDecoder(nn.Module):
    """latents [B, L, C] -> pixels [B, 3, H, W] in the encoder processor's normalised units (before × std + mean)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder_embed = nn.Linear(config.channels, config.width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.patches**2 + 1, config.width))
        self.decoder_layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.decoder_pred = nn.Linear(config.width, config.patch**2 * 3)

    def forward(self, latents: Tensor) -> Tensor:
        side, patch = self.config.patches, self.config.patch
        x = resize_tokens(self.decoder_embed(latents.to(self.decoder_embed.weight.dtype)), side * side)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        patches: Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]  # [B, side², patch² · 3]
        pixels = patches.view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, 3, side * patch, side * patch)


def quantize_layers(decoder: PixelDecoder, kind: str, place: Place) -> dict[str, RowSink]:
    """Quantises the linears of the layers, in place; the first and the last linear keep their dtype.

    Without weights (on "meta"), the sinks take those of a checkpoint, by their names.
    """
    linears = [
        (f"{path}.{name}", owner, name)
        for path, owner in decoder.named_modules()
        if path.startswith("decoder_layers.")
        for name, module in owner.named_children()
        if isinstance(module, nn.Linear)
    ]
    sinks: dict[str, RowSink] = {}
    for linear in linears:
        sinks |= quantize_linears([linear], kind, place)
    return sinks


def to_uint8(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> uint8 [B, H, W, 3]: × std + mean, clipped to [0, 1], × 255 truncated."""
    return (denormalise(pixels, mean, std).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def denormalise(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> float32 pixels, 0 black and 1 white, not clipped."""
    shape = (1, 3, 1, 1)
    scale, offset = pixels.new_tensor(std, dtype=torch.float32), pixels.new_tensor(mean, dtype=torch.float32)
    return pixels.float() * scale.view(shape) + offset.view(shape)
