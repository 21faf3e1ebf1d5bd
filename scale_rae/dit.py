"""The velocity network, without speed tricks: plain DiT, DDT and two-width DDT (arXiv 2601.16208; DDT: 2504.05741).

v = f(x, t, y) with x [B, C, S, S], t [B] in (0, 1], y [B, L, Z]; L = S*S. Parameter names are those of the published
checkpoints below `diff_head.model.`.

Dtype policy: the time embedding is float32 always, RMSNorms compute in float32, everything else runs in the dtype of
the weights. The result has the dtype of `x`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.config import DiTConfig
from scale_rae.layout import TIME_FREQUENCIES, swiglu_inner

NORM_EPS = 1e-6
TIME_SEED = 114514  # the published networks' frequencies are not in their files: they are drawn from this seed


def rope_table(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary embedding, each float32 [side*side, head_dim].

    The first half of a head turns by the row index, the second by the column index; frequencies
    10000^(-2i/n), n = head_dim / 2, each repeated for its pair of neighbouring channels.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
    angle = torch.arange(side, dtype=torch.float32, device="cpu")[:, None] * frequency.repeat_interleave(2)  # [S, half]
    rows = angle[:, None, :].expand(side, side, half)
    columns = angle[None, :, :].expand(side, side, half)
    angles = torch.cat([rows, columns], dim=-1).reshape(side * side, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, heads, head_dim] with neighbouring channels rotated: (x0 cos - x1 sin, x1 cos + x0 sin).

    The tables are [L, head_dim]; the product is float32 like the tables, the result has x's dtype.
    """
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos[:, None] + swapped * sin[:, None]).to(x.dtype)


def attend(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads' outputs [B, L, D] for queries, keys and values [B, L, 3D] that are not rotated yet."""
    qkv = qkv.view(*qkv.shape[:2], 3 * heads, -1)  # [B, L, 3 heads, head_dim]
    return heads_output(rotate(qkv[:, :, : 2 * heads], cos, sin), qkv[:, :, 2 * heads :])


def heads_output(qk: Tensor, v: Tensor) -> Tensor:
    """Full attention [B, L, D] of rotated queries and keys [B, L, 2 heads, head_dim] over values [B, L, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (*qk.chunk(2, dim=2), v))  # [B, heads, L, head_dim]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, computed in float32; returns the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=NORM_EPS)
        return normed.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.proj(attend(self.qkv(x), self.heads, cos, sin))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = swiglu_inner(width)
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulation(condition_width: int, width: int, chunks: int) -> nn.Sequential:
    """The adaLN projection: `chunks` vectors of `width` per token from the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(condition_width, chunks * width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, condition_width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = modulation(condition_width, width, 6)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, condition_width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = modulation(condition_width, width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TokenEmbedder(nn.Module):
    """A 1x1 convolution over the latent grid, flattened row-major: [B, C, S, S] -> [B, L, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # The same sum as the convolution, as the matrix product it is.
        return F.linear(x.flatten(2).transpose(1, 2), self.proj.weight[:, :, 0, 0], self.proj.bias)


class TimeEmbedder(nn.Module):
    """t [B] -> [B, Z], float32: an MLP on cat(sin(2 pi t W), cos(2 pi t W)), W fixed normal draws."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(TIME_SEED)
        frequencies = torch.randn(TIME_FREQUENCIES, generator=generator, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies * (2 * math.pi)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


class NullCondition(nn.Module):
    """The learnt condition [Z] of "no prompt", used at every token by classifier-free guidance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout_embedding = nn.Parameter(torch.zeros(width))


class DiT(nn.Module):
    """A velocity network (module docstring). Build it under `torch.device("meta")` to allocate nothing.

    Source: Scale-RAE (arXiv 2601.16208) with the DiT of RAE (2510.11690) and the DDT head of 2504.05741.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    decoder_rope_cos: Tensor
    decoder_rope_sin: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, z = config.width, config.condition_width
        decoder_width = config.decoder_width or width
        decoder_heads = config.decoder_heads or config.heads
        ddt = config.encoder_depth is not None
        self.encoder_depth = config.depth if config.encoder_depth is None else config.encoder_depth

        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.x_embedder = TokenEmbedder(config.channels, width)
        self.t_embedder = TimeEmbedder(z)
        if config.null_condition:
            self.y_embedder = NullCondition(z)
        self.dit_blocks = nn.ModuleList(
            Block(width, config.heads, z)
            if i < self.encoder_depth
            else Block(decoder_width, decoder_heads, decoder_width)
            for i in range(config.depth)
        )
        if ddt:
            self.s_embedder = TokenEmbedder(config.channels, decoder_width)
        if ddt and config.wide and decoder_width != width:
            self.s_projector = nn.Linear(width, decoder_width)
        self.final_layer = FinalLayer(decoder_width, decoder_width if ddt else z, config.channels)

        cos, sin = rope_table(config.side, width // config.heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if ddt:
            cos, sin = rope_table(config.side, decoder_width // decoder_heads)
            self.register_buffer("decoder_rope_cos", cos, persistent=False)
            self.register_buffer("decoder_rope_sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the blocks compute in."""
        return self.final_layer.linear.weight.dtype

    @property
    def null_condition(self) -> Tensor | None:
        """The null embedding [Z], or None when the checkpoint was trained without condition dropout."""
        return self.y_embedder.dropout_embedding if self.config.null_condition else None

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity [B, C, S, S], in the dtype of `x`, for x [B, C, S, S], t [B], condition [B, L, Z]."""
        dtype = self.dtype
        tokens_in = x.to(dtype)
        time = self.t_embedder(t).to(dtype)
        c = F.silu(time[:, None] + condition.to(dtype))  # [B, L, Z]
        h = self.x_embedder(tokens_in) + self.pos_embed
        cos, sin = self.rope_cos, self.rope_sin
        for block in self.dit_blocks[: self.encoder_depth]:
            h = block(h, c, cos, sin)
        if self.config.encoder_depth is not None:
            c = F.silu(h)
            if hasattr(self, "s_projector"):
                c = self.s_projector(c)
            h = self.s_embedder(tokens_in)
            cos, sin = self.decoder_rope_cos, self.decoder_rope_sin
            for block in self.dit_blocks[self.encoder_depth :]:
                h = block(h, c, cos, sin)
        velocity = self.final_layer(h, c)  # [B, L, C]
        return velocity.transpose(1, 2).reshape(x.shape).to(x.dtype)
