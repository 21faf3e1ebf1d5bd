"""Triton kernels for the diffusion transformer on NVIDIA GPUs: quantised rows, rotary embedding, attention.

Each does in one pass what PyTorch's compiled code does in several:

- Quantised rows, float8 or int8: each token's row is read once, kept in registers, scaled and written. Compiled code reads its
  inputs twice, first for the row's largest value and then for the quantised values.
- The rotary embedding: each pair of channels is read once. (In bfloat16, PyTorch's compiled code is as fast.)
- Attention over the tokens of an image, rotation included. An image has few tokens, so a block of queries sees all keys at once.

Kernels take rotary tables as `of_axis` returns them: the angles along one edge of the grid, which fit in a multiprocessor's cache.
A token's row gives the angles for the first half of a head, its column those for the second half.

The public functions are torch operators, so compiled blocks can call them. Triton comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_rae.codes import INT8_LARGEST
from scale_rae.config import DiTConfig
from scale_rae.errors import first_line
from scale_rae.float8 import FLOAT8, LARGEST, LEAST

_log = logging.getLogger("scale_rae")


@triton.jit
def _converted(values, dtype: tl.constexpr):
    """Scaled values in float8 or int8. The conversion clamps what rounding moved beyond the range; tl.minimum would hide NaN."""
    if dtype == tl.int8:
        values = tl.floor(values + 0.5)
    return values.to(dtype)


@triton.jit
def _scale_of(largest, values, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """A row's scale. int8 has no NaN, so a row with NaN or infinity among its values gets the scale NaN."""
    scale = largest / LARGEST
    if dtype == tl.int8:
        scale += tl.sum(values * 0.0, axis=0)
    return scale


@triton.jit
def _store_quantized(values, out, scale, row, i, inside, width, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), LEAST)
    tl.store(scale + row, _scale_of(largest, values, out.dtype.element_ty, LARGEST))
    tl.store(out + row * width + i, _converted(values * (LARGEST / largest), out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(
    x, out, scale, width, EARLY: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    values = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(values, out, scale, row, i, inside, width, LARGEST, LEAST)


@triton.jit
def _swiglu(x, i, inside, width):
    gate = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + width + i, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * value


@triton.jit
def _swiglu_kernel(
    x, out, scale, width, MOST: tl.constexpr, REST: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
):
    # A row is split into a power of two and a rest: 5504 = 4096 + 1408 takes 4096 + 2048 lanes, unsplit it takes 8192.
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MOST)
    values = _swiglu(x + row * 2 * width, i, i < width, width)
    largest = tl.max(tl.abs(values), axis=0)
    if REST > 0:
        j = MOST + tl.arange(0, REST)
        others = _swiglu(x + row * 2 * width, j, j < width, width)
        largest = tl.maximum(largest, tl.max(tl.abs(others), axis=0))
    largest = tl.maximum(largest, LEAST)
    by = _scale_of(largest, values, out.dtype.element_ty, LARGEST)
    if REST > 0:
        by += _scale_of(largest, others, out.dtype.element_ty, LARGEST) - largest / LARGEST
    tl.store(scale + row, by)
    factor = LARGEST / largest
    tl.store(out + row * width + i, _converted(values * factor, out.dtype.element_ty), mask=i < width)
    if REST > 0:
        tl.store(out + row * width + j, _converted(others * factor, out.dtype.element_ty), mask=j < width)


@triton.jit
def _angles(cos, sin, token, pair, side, HEAD: tl.constexpr):
    """cos and sin for pairs of channels of a head; each table is [side, HEAD / 4]."""
    at = tl.where(pair < HEAD // 4, token // side, token % side) * (HEAD // 4) + pair % (HEAD // 4)
    return tl.load(cos + at), tl.load(sin + at)


@triton.jit
def _turned(x0, x1, c, s):
    return x0 * c - x1 * s, x1 * c + x0 * s


@triton.jit
def _rotate_kernel(x, cos, sin, out, x_row, x_token, tokens, side, width, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates a token's channels [width], heads of HEAD channels side by side. Rows of x may be strided, rows of out are dense."""
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    i = tl.arange(0, BLOCK)
    inside = i < width
    given = tl.load(x + row // tokens * x_row + token * x_token + i, mask=inside, other=0.0).to(tl.float32)
    x0, x1 = tl.split(given.reshape(BLOCK // 2, 2))
    c, s = _angles(cos, sin, token, tl.arange(0, BLOCK // 2) % (HEAD // 2), side, HEAD)
    x0, x1 = _turned(x0, x1, c, s)
    tl.store(out + row * width + i, tl.join(x0, x1).reshape(BLOCK).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(
    x,
    update,
    gate,
    shift,
    factor,
    weight,
    x_out,
    out,
    scale,
    first,
    tokens,
    each,
    gate_stride,
    modulation_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + first
    place = row // tokens // each * tokens + row % tokens  # of the row's prompt, which has `each` images
    i = tl.arange(0, BLOCK)
    inside = i < width
    h = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(update + row * width + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(gate + place * gate_stride + i, mask=inside, other=0.0).to(tl.float32) * added
    rounded = h.to(x_out.dtype.element_ty)
    tl.store(x_out + row * width + i, rounded, mask=inside)
    h = rounded.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, axis=0) / width + eps)
    h *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    h *= 1.0 + tl.load(factor + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(shift + place * modulation_stride + i, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(h, out, scale, row, i, inside, width, LARGEST, LEAST)


@triton.jit
def _words(at, HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs of 16-bit floats, each pair as one 32-bit word [rows, PAIRS]. Pairs beyond the head's width are zeros."""
    if PAIRS == HEAD // 2:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(tl.arange(0, PAIRS) < HEAD // 2)[None, :], other=0)
    return words


@triton.jit
def _rotated_words(words, cos, sin, token, side, HEAD: tl.constexpr, PAIRS: tl.constexpr, TYPE: tl.constexpr):
    """The first and the second channels of all pairs after rotation, each float32 [rows, PAIRS]."""
    first = (words & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    second = (words >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    c, s = _angles(cos, sin, token[:, None], tl.arange(0, PAIRS)[None, :], side, HEAD)
    return _turned(first, second, c, s)


@triton.jit
def _attend_kernel(
    qkv,
    words,
    cos,
    sin,
    out,
    tokens,
    side,
    heads,
    factor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of STEPS blocks of ROWS queries of a head. `words` is qkv by pairs of channels.

    WHOLE: no block has rows or keys beyond the image's tokens, so nothing is masked. EARLY: launched before qkv is complete.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    TYPE: tl.constexpr = out.dtype.element_ty
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    width = heads * HEAD
    channel = head * HEAD + tl.arange(0, HEAD)[None, :]
    PAIRS: tl.constexpr = max(16, HEAD // 2)  # tl.dot takes at least 16
    pair = head * (HEAD // 2) + tl.arange(0, PAIRS)[None, :]
    start, start_word = qkv + image * tokens * 3 * width, words + image * tokens * 3 * (width // 2)
    word_row = 3 * (width // 2)
    # Keys and rows beyond the tokens read token 0 and are masked later.
    key = tl.arange(0, KEYS)
    is_key = key < tokens
    if not WHOLE:
        key = tl.where(is_key, key, 0)
    k = _words(start_word + width // 2 + key[:, None] * word_row + pair, HEAD, PAIRS)
    k0, k1 = _rotated_words(k, cos, sin, key, side, HEAD, PAIRS, TYPE)
    k0, k1 = tl.trans(k0.to(TYPE)), tl.trans(k1.to(TYPE))
    if STEPS > 1:
        v = tl.load(start + 2 * width + key[:, None] * 3 * width + channel)
    row = tl.program_id(0) * (STEPS * ROWS) + tl.arange(0, ROWS)
    is_row = row < tokens
    here = row if WHOLE else tl.where(is_row, row, 0)
    q = _words(start_word + here[:, None] * word_row + pair, HEAD, PAIRS)
    for step in tl.static_range(STEPS):
        q0, q1 = _rotated_words(q, cos, sin, here, side, HEAD, PAIRS, TYPE)
        place, is_there = here, is_row
        if step + 1 < STEPS:  # prefetches the next queries
            row += ROWS
            is_row = row < tokens
            here = row if WHOLE else tl.where(is_row, row, 0)
            q = _words(start_word + here[:, None] * word_row + pair, HEAD, PAIRS)
        scores = tl.dot((q0 * factor).to(TYPE), k0)
        scores = tl.dot((q1 * factor).to(TYPE), k1, scores)
        if not WHOLE:
            scores = tl.where(is_key[None, :], scores, -float("inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        total = tl.sum(weights, axis=1)
        if STEPS == 1:
            v = tl.load(start + 2 * width + key[:, None] * 3 * width + channel)
        seen = tl.dot(weights.to(TYPE), v) / total[:, None]
        at = out + (image * tokens + place[:, None]) * width + channel
        if WHOLE:
            tl.store(at, seen.to(TYPE))
        else:
            tl.store(at, seen.to(TYPE), mask=is_there[:, None])


def _sizes(width: int, int8: bool) -> dict[str, int | float]:
    block = triton.next_power_of_2(width)
    largest = INT8_LARGEST if int8 else LARGEST
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8, "LARGEST": largest, "LEAST": LEAST}


def _launch(early: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if early else {}


def _empty_rows(x: Tensor, width: int, int8: bool) -> tuple[Tensor, Tensor]:
    values = torch.empty((*x.shape[:-1], width), dtype=torch.int8 if int8 else FLOAT8, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@torch.library.custom_op("scale_rae::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, int8: bool = False, early: bool = False) -> tuple[Tensor, Tensor]:
    """(values [..., K], scale [..., 1]) of `float8.quantize` for rows [..., K]; with `int8`, values from -127 to 127.

    `early` is that of `attend_pairs`.
    """
    x = x.contiguous()
    width = x.shape[-1]
    values, scale = _empty_rows(x, width, int8)
    with torch.cuda.device(x.device):
        _rows_kernel[(x.numel() // width,)](
            x, values, scale, width, EARLY=early, **_sizes(width, int8), **_launch(early)
        )
    return values, scale


@quantize_rows.register_fake
def _(x: Tensor, int8: bool = False, early: bool = False) -> tuple[Tensor, Tensor]:
    return _empty_rows(x, x.shape[-1], int8)


@torch.library.custom_op("scale_rae::quantize_swiglu", mutates_args=())
def quantize_swiglu(x: Tensor, int8: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of SiLU(gate) · value [..., K]; gate and value are side by side in x [..., 2 K]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    values, scale = _empty_rows(x, width, int8)
    sizes = _sizes(width, int8)
    most = sizes.pop("BLOCK")
    if most > width:
        most //= 2
    rest = triton.next_power_of_2(width - most) if width > most else 0
    with torch.cuda.device(x.device):
        _swiglu_kernel[(x.numel() // x.shape[-1],)](x, values, scale, width, MOST=most, REST=rest, **sizes)
    return values, scale


@quantize_swiglu.register_fake
def _(x: Tensor, int8: bool = False) -> tuple[Tensor, Tensor]:
    return _empty_rows(x, x.shape[-1] // 2, int8)


@torch.library.custom_op("scale_rae::quantize_normed", mutates_args=())
def quantize_normed(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    null_gate: Tensor | None,
    shift: Tensor,
    factor: Tensor,
    null_shift: Tensor | None,
    null_factor: Tensor | None,
    weight: Tensor,
    eps: float,
    int8: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', values, scale): x' = x + gate · update; values and scale are `quantize_rows` of norm(x') · (1 + factor) + shift.

    x, update [B, L, D]; gate, shift, factor [P, L, D], with a dense last axis and B / P images per prompt. With the null
    branch's modulations, [D] each, the first half of x is the conditional branch and the second half the null branch.
    """
    x, update = x.contiguous(), update.contiguous()
    images, tokens, width = x.shape
    conditional = images if null_gate is None else images // 2
    each = conditional // len(gate)
    x_out = torch.empty_like(x)
    values, scale = _empty_rows(x, width, int8)
    with torch.cuda.device(x.device):
        gates, shifts, factors = gate.flatten(0, -2), shift.flatten(0, -2), factor.flatten(0, -2)
        if shifts.stride(0) != factors.stride(0) or each * len(gate) != conditional or len(gate) != len(shift):
            raise ValueError("shift and factor must be parts of one tensor, with equally many images per prompt")
        common = (weight, x_out, values, scale)
        sizes = _sizes(width, int8)
        strides = (gates.stride(0), shifts.stride(0))
        rows = conditional * tokens
        _norm_kernel[(rows,)](
            x, update, gates, shifts, factors, *common, 0, tokens, each, *strides, width, eps, **sizes
        )
        if null_gate is not None:
            _norm_kernel[(rows,)](
                x, update, null_gate, null_shift, null_factor, *common, rows, tokens, each, 0, 0, width, eps, **sizes
            )
    return x_out, values, scale


@quantize_normed.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    int8 = len(rest) > 9 and rest[9]
    return torch.empty_like(x.contiguous()), *_empty_rows(x, x.shape[-1], int8)


def of_axis(table: Tensor) -> Tensor:
    """A rotary table [S · S, head_dim] along one edge of the grid, one value per pair of channels: [S, head_dim / 4]."""
    side = math.isqrt(len(table))
    return table[:side, table.shape[1] // 2 :: 2].contiguous()


@torch.library.custom_op("scale_rae::rotate_pairs", mutates_args=())
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`dit.rotate` of x [B, L, heads, head_dim]; cos and sin are `of_axis` of its tables."""
    batch, tokens, heads, head = x.shape
    if x.stride(3) != 1 or x.stride(2) != head:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = heads * head
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _rotate_kernel[(batch * tokens,)](
            x, cos, sin, out, x.stride(0), x.stride(1), tokens, len(cos), width, HEAD=head, BLOCK=block, num_warps=4
        )
    return out


@rotate_pairs.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton works on this device (`toolchain.missing` knows what it needs). If not, a warning is logged."""
    try:
        with torch.inference_mode():
            rotate_pairs(torch.zeros(1, 1, 1, 64, device=device), *torch.zeros(2, 1, 16, device=device))
    except Exception as e:
        _log.warning(
            "Triton does not work on %s (%s), so nothing is compiled and PyTorch's own kernels are used; images are the same up "
            "to rounding, and take longer",
            device,
            first_line(e),
        )
        return False
    return True


MOST_KEYS = 256  # keys that a block of queries sees at once; the published networks have 256
_ROWS = 64  # queries per block
_MOST_STEPS = 4  # blocks that share rotated keys: 256 queries in blocks of 64
_PROGRAMS = 256  # fill a Hopper GPU of 132 multiprocessors, where this was measured
_HEADS = (16, 32, 64)  # supported channels per head


@torch.library.custom_op("scale_rae::attend_pairs", mutates_args=())
def attend_pairs(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, early: bool = False) -> Tensor:
    """`dit.attend` in one kernel; cos and sin are `of_axis` of its tables. Needs dtype and sizes that `attention_fits` accepts.

    With `early` (Hopper), the kernel is launched while the kernel before it ends.
    """
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    head = width // 3 // heads
    out = torch.empty((batch, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    factor = math.log2(math.e) / math.sqrt(head)
    keys = max(16, triton.next_power_of_2(tokens))
    blocks, steps = triton.cdiv(tokens, _ROWS), 1
    while steps < min(_MOST_STEPS, blocks) and batch * heads * blocks // (2 * steps) >= _PROGRAMS:
        steps *= 2
    with torch.cuda.device(qkv.device):
        _attend_kernel[(triton.cdiv(blocks, steps), batch * heads)](
            qkv,
            qkv.view(torch.int32),
            cos,
            sin,
            out,
            tokens,
            len(cos),
            heads,
            factor,
            ROWS=_ROWS,
            KEYS=keys,
            HEAD=head,
            STEPS=steps,
            WHOLE=tokens == keys and tokens % (_ROWS * steps) == 0,
            EARLY=early,
            num_warps=4,
            **_launch(early),
        )
    return out


@attend_pairs.register_fake
def _(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, early: bool = False) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def attention_fits(config: DiTConfig, dtype: torch.dtype) -> bool:
    """Whether `attend_pairs` supports a network's sizes and dtype."""
    return dtype != torch.float32 and config.tokens <= MOST_KEYS and config.width // config.heads in _HEADS
