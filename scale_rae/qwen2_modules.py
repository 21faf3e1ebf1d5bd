"""Qwen2's parameters as torch modules under their published names, with a plain layer for training.

They equal transformers' Qwen2Model (a test compares both), whose import takes seconds. Inference uses fused layers (`qwen2`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Qwen2Modules(nn.Module):
    """Embedding, layers and final norm of a Qwen2 with the fields of `ScaleRAEConfig.language`.

    Published checkpoints keep the latent queries and the projector of latents beside them; `LanguageModel` adds those.
    """

    latent_queries: nn.Parameter
    mm_projector: nn.Module

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.heads: int = config["num_attention_heads"]
        self.groups: int = config["num_key_value_heads"]
        self.head_dim: int = hidden // self.heads
        # Not initialised: on the "meta" device that imports torch's compiler, which takes a second.
        self.embed_tokens = nn.Embedding(
            config["vocab_size"], hidden, _weight=torch.empty(config["vocab_size"], hidden)
        )
        self.layers = nn.ModuleList(
            Layer(hidden, config["intermediate_size"], self.heads, self.groups, eps)
            for _ in range(config["num_hidden_layers"])
        )
        self.norm = RMSNorm(hidden, eps)
        self.rotary_emb = RotaryEmbedding(self.head_dim, config["rope_theta"])


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 up to the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin, each [B, T, d] in x's dtype, of positions [B, T]."""

    inv_freq: Tensor

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        # On the CPU also when all else is on "meta": the table is computed, not loaded.
        steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        self.register_buffer("inv_freq", 1.0 / (theta**steps), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Layer(nn.Module):
    """One Qwen2 layer, causal, on x [B, T, H] with cos and sin [B, T, d] of its positions."""

    def __init__(self, hidden: int, inner: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, heads, groups)
        self.mlp = MLP(hidden, inner)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention; `heads / groups` heads of queries share a head of keys and values."""

    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, groups * self.head_dim)
        self.v_proj = nn.Linear(hidden, groups * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for p in projections)  # [B, heads, T, d]
        cos, sin = cos[:, None], sin[:, None]
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
