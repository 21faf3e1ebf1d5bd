"""The Qwen2 network for inference: a layer in 16 kernels, with fused projections; self-certainty of tokens.

transformers' layer has 40 kernels, and at batch 1 each kernel takes longer to launch than to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.compiling import compiled
from scale_rae.quantization import QuantizedWeight, joined, linear

Weight = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Qwen2:
    """The weights and sizes of a Qwen2 network, for `KVCache`."""

    embed_tokens: nn.Module
    layers: Sequence[FusedLayer]
    norm: Any  # the final RMSNorm
    lm_head: nn.Module
    rotary_emb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    heads: int
    groups: int  # heads of keys and values
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def on_cuda(self) -> bool:
        """Whether the network is on CUDA: caches have fixed sizes, and passes are captured."""
        return self.device.type == "cuda"


class FusedLayer(NamedTuple):
    """The weights of a Qwen2 layer; projections that share an input are fused."""

    norm1: Tensor
    qkv: Weight  # [(heads + 2 groups) d, H]
    qkv_bias: Tensor
    out: Weight
    norm2: Tensor
    gate_up: Weight  # [2 M, H]
    down: Weight
    eps: float

    def is_of(self, layer: Any) -> bool:
        """Whether the layer's parameters are still these tensors, or views of them."""
        parts = (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias, layer.mlp.gate_proj.weight)
        rest = (layer.input_layernorm.weight, layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        mine = (self.qkv, self.qkv_bias, self.gate_up, self.norm1, self.out, self.down)
        return all(_address(a) == _address(b) for a, b in zip((*parts, *rest), mine, strict=True))


def _address(weight: Weight) -> int:
    return (weight if isinstance(weight, Tensor) else weight.values).data_ptr()


def fuse(layer: Any, in_place: bool = False) -> FusedLayer:
    """The layer's weights for `qwen2_layer`; `in_place` makes its parameters views of the fused matrices.

    Quantised weights that are consecutive in memory (`quantization.room`) are fused as they are.
    """

    def side_by_side(linears: Sequence[nn.Linear], name: str) -> Any:
        parts = [getattr(linear, name) for linear in linears]
        if isinstance(parts[0], QuantizedWeight):
            joint = joined(parts)
            if in_place:
                start = 0
                for linear in linears:
                    rows = slice(start, start + linear.out_features)
                    _, linear.values, linear.scale, _ = joint.rows(rows).alone()
                    start = rows.stop
            return joint
        whole = torch.cat([p.detach() for p in parts])
        if in_place:
            for part, place in zip(parts, torch.split(whole, [len(p) for p in parts]), strict=True):
                part.data = place
        return whole

    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return FusedLayer(
        norm1=layer.input_layernorm.weight.detach(),
        qkv=side_by_side(qkv, "weight"),
        qkv_bias=side_by_side(qkv, "bias"),
        out=_detached(attention.o_proj.weight),
        norm2=layer.post_attention_layernorm.weight.detach(),
        gate_up=side_by_side((mlp.gate_proj, mlp.up_proj), "weight"),
        down=_detached(mlp.down_proj.weight),
        eps=layer.input_layernorm.variance_epsilon,
    )


def _detached(weight: Weight) -> Weight:
    return weight.detach() if isinstance(weight, Tensor) else weight


def qwen2_layer(
    weights: FusedLayer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    row: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The output [B, T, H] of one Qwen2 layer for x at positions [B, T]; keys and values [B, slots, G, d] are updated.

    cos, sin [B, T, 1, d] belong to the positions; sin's first half is negated. mask [B, 1, heads/G · T, reach] is added to
    the attention scores of the first `reach` slots. Without a mask, x is the whole conversation and attention is causal.
    row [B, 1] counts the rows.
    """
    batch, tokens, hidden = x.shape
    groups, d = keys.shape[2:]
    normed = F.rms_norm(x, (hidden,), weights.norm1, weights.eps)
    qkv = linear(normed, weights.qkv, weights.qkv_bias).view(batch, tokens, -1, d)
    heads = qkv.shape[2] - 2 * groups
    # Qwen2's rotary embedding turns channel i with channel i + d/2.
    qk, v = torch.split(qkv, [heads + groups, groups], dim=2)
    qk = torch.addcmul(qk * cos, qk.roll(d // 2, dims=-1), sin)
    q, k = torch.split(qk, [heads, groups], dim=2)
    keys[row, positions] = k
    values[row, positions] = v
    if mask is None:
        k, v = (t.repeat_interleave(heads // groups, dim=2).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
    else:
        # Heads that share keys become queries of one head, so that keys need not be copied for each head.
        k, v = (t[:, : mask.shape[-1]].transpose(1, 2) for t in (keys, values))
        q = q.reshape(batch, tokens, groups, -1, d).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, heads/G · T, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.view(batch, groups, -1, tokens, d).permute(0, 3, 1, 2, 4)  # [B, T, G, heads/G, d]
    x = x + linear(out.reshape(batch, tokens, heads * d), weights.out)
    normed = F.rms_norm(x, (hidden,), weights.norm2, weights.eps)
    gate, up = linear(normed, weights.gate_up).chunk(2, dim=-1)
    return x + linear(F.silu(gate) * up, weights.down)


@lru_cache
def compiled_layer() -> Any:
    """`qwen2_layer`, compiled."""
    return compiled(qwen2_layer)


def self_certainty(logits: Tensor, total: Tensor | None = None) -> Tensor:
    """-mean over the vocabulary of log(V p), p = softmax(logits): [..., V] float32 -> [...]. Higher is more certain.

    `total` is the logsumexp of the logits, if known.
    """
    total = logits.logsumexp(dim=-1) if total is None else total
    return total - logits.mean(dim=-1) - math.log(logits.shape[-1])
