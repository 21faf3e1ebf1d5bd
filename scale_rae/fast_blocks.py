"""The blocks and the final layer of the DiT given their modulations: plain operations, and Triton kernels between products.

Modulations are shared by images of a prompt, and a block's final residual addition can be left to the next block. `fast_dit` chooses
which of these functions run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_rae.dit import NORM_EPS, Attention, Block, FinalLayer, RMSNorm, attend, heads_output
from scale_rae.float8 import Quantized, raw_product
from scale_rae.quantization import QuantizedWeight, product

SPLIT, SPLIT_ROWS = 2, 256  # parts of the inner dimension of products with few outputs, up to so many rows

Attend = Callable[[Tensor, int, Tensor, Tensor], Tensor]  # the signature of `dit.attend`

_kernels = torch.ops.scale_rae  # has the operators of kernels.py after that module is imported


# --- modulations shared by images, and residual additions left to the next block ----------------------------------------


def spread(modulation: Tensor, null: Tensor | None, images: int) -> Tensor:
    """Modulations per image [images, L, W] from modulations per prompt [P, L, W]; a prompt's images are consecutive.

    With the null branch's modulations [W], the second half of the images gets them, the same for every token. A single
    prompt's [1, L, W] are returned unchanged, since they broadcast. Compiled code never stores the result.
    """
    prompts = len(modulation)
    if null is None:
        if prompts in (1, images):
            return modulation
        return modulation[:, None].expand(-1, images // prompts, -1, -1).flatten(0, 1)
    first = torch.arange(2, device=null.device).view(2, 1, 1, 1, 1) == 0
    conditional = modulation[:, None].expand(-1, images // prompts // 2, -1, -1)
    return torch.where(first, conditional, null).flatten(0, 2)


def per_image(modulation: Tensor, prompt_of: Tensor | None) -> Tensor:
    """Modulations [B, L, W] from those per prompt [P, L, W] by each image's prompt [B]; without numbers, as they are."""
    # Copied, so that the blocks run as for images of different prompts, whatever the numbers.
    return modulation if prompt_of is None else modulation.index_select(0, prompt_of)


class Parts(NamedTuple):
    """A linear's output that is not finished: sum of `values` [S, ..., N] · x_scale [..., 1] · scale [N, 1], plus bias [N]."""

    values: Tensor
    bias: Tensor
    x_scale: Tensor | None = None
    scale: Tensor | None = None

    def finished(self, dtype: torch.dtype) -> Tensor:
        """The output [..., N]."""
        out = self.values.float().sum(dim=0)
        if self.x_scale is not None and self.scale is not None:
            out = out * self.x_scale * self.scale.t()
        return (out + self.bias.float()).to(dtype)


class Deferred(NamedTuple):
    """A block's result as a sum that is not yet computed: x + gate · update. The gate is the last of the six modulations.

    x, update [B, L, D]; modulation [P, L, 6D]; null [6D]. If there is no update, x is the result.
    """

    x: Tensor
    update: Tensor | Parts | None = None
    modulation: Tensor | None = None
    null: Tensor | None = None


def summed(block: Deferred) -> Tensor:
    """The block's result [B, L, D]."""
    if block.update is None or block.modulation is None:
        return block.x
    gate, null = (None if m is None else m.chunk(6, dim=-1)[5] for m in (block.modulation, block.null))
    assert gate is not None
    update = block.update if isinstance(block.update, Tensor) else block.update.finished(block.x.dtype)
    return block.x + spread(gate, null, len(block.x)) * update


# --- a block and the final layer, given their modulations ------------------------------------------------------------


def deferred_block(
    block: Block,
    before: Deferred,
    modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    null: Tensor | None = None,
    attend: Attend = attend,
) -> Deferred:
    """`Block.forward` for modulations [P, L, 6D]; its final residual addition is left to the next block.

    `before` holds B images, B / P consecutive ones per prompt. With the null branch's modulations [6D] it holds 2B: first
    the conditional branch, then the null branch.
    """
    x = summed(before)
    shift1, scale1, gate1, shift2, scale2, _ = spread(modulation, null, len(x)).chunk(6, dim=-1)
    x = x + gate1 * _attention(block.attn, block.norm1(x) * (1 + scale1) + shift1, cos, sin, attend)
    return Deferred(x, block.mlp(block.norm2(x) * (1 + scale2) + shift2), modulation, null)


def _attention(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    return attention.proj(attend(attention.qkv(x), attention.heads, cos, sin))


def summed_block(
    block: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None = None
) -> Deferred:
    """`deferred_block` followed by its final residual addition; used if `defer` is off."""
    return Deferred(summed(deferred_block(block, before, modulation, cos, sin, null)))


def quantized_block(
    block: Block,
    before: Deferred,
    modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    null: Tensor | None = None,
    attend: Attend = attend,
) -> Deferred:
    """`deferred_block` in Triton kernels, for blocks whose products are in float8 or int8. `before` must have an update."""
    vectors = modulation.chunk(6, dim=-1)
    nulls = null.chunk(6, dim=-1) if null is not None else (None,) * 6
    int8 = _is_int8(block.attn.qkv)
    gate, null_gate, update = _gates(before)
    x, read = _quantized_norm(block.norm1, before.x, update, (gate, null_gate), vectors[:2], nulls[:2], int8)
    seen = attend(_product(block.attn.qkv, read), block.attn.heads, cos, sin)
    update = _product(block.attn.proj, Quantized(*_kernels.quantize_rows(seen, int8)))
    x, read = _quantized_norm(block.norm2, x, update, (vectors[2], nulls[2]), vectors[3:5], nulls[3:5], int8)
    inner = Quantized(*_kernels.quantize_swiglu(_product(block.mlp.w12, read), int8))
    update = _product(block.mlp.w3, inner)
    return Deferred(x, update, modulation, null)


def few_block(
    block: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None = None
) -> Deferred:
    """`deferred_block` with Triton kernels between its products, for weights in bfloat16 or of kind fp8.

    `before` must have an update; that of the result is in parts.
    """
    v = modulation.chunk(6, dim=-1)
    n = null.chunk(6, dim=-1) if null is not None else (None,) * 6
    gate, null_gate, update = _gates(before)
    x, read = _few_normed(block.norm1, before.x, update, (gate, null_gate), v[:2], n[:2], _is_quantized(block))
    seen = _kernels.attend_pairs(_product(block.attn.qkv, read), block.attn.heads, cos, sin, True)
    x, read = _few_normed(
        block.norm2, x, _few_product(block.attn.proj, seen), (v[2], n[2]), v[3:5], n[3:5], _is_quantized(block)
    )
    inner: Any
    if isinstance(read, Quantized):
        raw = _few_product(block.mlp.w12, read)
        inner = Quantized(*_kernels.few_gated_float8(raw.values[0], raw.x_scale, raw.scale, raw.bias))
    else:
        inner = _kernels.few_gated(block.mlp.w12(read))
    return Deferred(x, _few_product(block.mlp.w3, inner), modulation, null)


def _few_normed(
    norm: RMSNorm,
    x: Tensor,
    update: Tensor | Parts,
    gates: tuple[Tensor, Tensor | None],
    vectors: tuple[Tensor, ...],
    nulls: tuple[Tensor | None, ...],
    quantize: bool,
) -> tuple[Tensor, Tensor | Quantized]:
    """`_quantized_norm` for an update in parts; without `quantize`, the second is in bfloat16."""
    parts = (update[None], None, None, None) if isinstance(update, Tensor) else _ordered(update)
    x, values, scale = _kernels.few_normed(x, *parts, *gates, *vectors, *nulls, norm.weight, NORM_EPS, quantize)
    return x, Quantized(values, scale) if quantize else values


def _ordered(parts: Parts) -> tuple[Tensor | None, ...]:
    return parts.values, parts.x_scale, parts.scale, parts.bias


def _few_product(linear: Any, x: Tensor | Quantized) -> Parts:
    """A linear's output in parts."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        assert isinstance(x, Tensor)
        return split_product(x, weight, linear.bias)
    values, scale = x if isinstance(x, Quantized) else _kernels.quantize_rows(x, False, True)
    return Parts(raw_product(values, weight.values)[None], linear.bias, scale, weight.scale)


def split_product(x: Tensor, weight: Tensor, bias: Tensor) -> Parts:
    """The linear of x [..., K] with a weight [N, K]. With few rows, the GPU computes both halves of K at the same time."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    parts = SPLIT if rows <= SPLIT_ROWS else 1
    step = columns // parts
    values = torch.bmm(x.view(rows, parts, step).transpose(0, 1), weight.view(-1, parts, step).permute(1, 2, 0))
    return Parts(values.view(parts, *x.shape[:-1], -1), bias)


def _is_quantized(block: Any) -> bool:
    return isinstance(block.attn.qkv.weight, QuantizedWeight)


def _gates(before: Deferred) -> tuple[Tensor, Tensor | None, Any]:
    """The gate of a deferred sum, the null branch's, and the update."""
    assert before.update is not None
    assert before.modulation is not None
    null_gate = None if before.null is None else before.null.chunk(6, dim=-1)[5]
    return before.modulation.chunk(6, dim=-1)[5], null_gate, before.update


def with_attention(block: Callable[..., Deferred], attend: Attend) -> Callable[..., Deferred]:
    """The block function `block` with its attention computed by `attend`."""

    def run(
        weights: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None = None
    ) -> Deferred:
        return block(weights, before, modulation, cos, sin, null, attend)

    return run


def _is_int8(linear: Any) -> bool:
    return linear.weight.kind == "int8-products"


def _product(linear: Any, x: Tensor | Quantized) -> Tensor:
    if isinstance(x, Tensor):
        return linear(x)
    return product(x, linear.weight, linear.bias)


def _quantized_norm(
    norm: RMSNorm,
    x: Tensor,
    update: Tensor,
    gates: tuple[Tensor, Tensor | None],
    vectors: tuple[Tensor, ...],
    nulls: tuple[Tensor | None, ...],
    int8: bool,
) -> tuple[Tensor, Quantized]:
    """x' = x + gate · update, and norm(x') · (1 + scale) + shift, quantised. vectors and nulls are (shift, scale)."""
    (shift, factor), (null_shift, null_factor) = vectors, nulls
    x, values, scale = _kernels.quantize_normed(
        x, update, *gates, shift, factor, null_shift, null_factor, norm.weight, NORM_EPS, int8
    )
    return x, Quantized(values, scale)


def attend_rotating(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """`dit.attend` with a Triton kernel for the rotation; cos and sin are `kernels.of_axis` of its tables."""
    qkv = qkv.view(*qkv.shape[:2], 3 * heads, -1)
    return heads_output(_kernels.rotate_pairs(qkv[:, :, : 2 * heads], cos, sin), qkv[:, :, 2 * heads :])


def final_layer(final: FinalLayer, before: Deferred, modulation: Tensor, null: Tensor | None = None) -> Tensor:
    """`FinalLayer.forward` for modulations [P, L, 2D] and, as in `deferred_block`, the null branch's [2D]."""
    x = summed(before)
    shift, scale = spread(modulation, null, len(x)).chunk(2, dim=-1)
    return final.linear(final.norm_final(x) * (1 + scale) + shift)
