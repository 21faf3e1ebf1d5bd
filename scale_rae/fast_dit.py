"""FastDiT: the velocity network with all speed tricks. Each trick has one place and one switch, and changes only rounding.

- `before`: time embeddings of all steps are computed before the first.
- `null`: under guidance, the null branch's modulations are also computed before the first step, because its condition is the
  same for every token and image.
- `shared`: images of one prompt share their condition, so the condition's modulations are computed once.
- `together`: both branches of guidance run as one batch, so the weights are read once.
- `pad`: SwiGLU's inner width is padded with zeros to a multiple that tensor cores handle well.
- `group`: for few images, the adaLN products of several blocks become one product that fills the GPU.
- `defer`: a block's final residual addition is left to the next block's first norm, which fuses it.
- `graph`: one evaluation is captured as a CUDA graph for each (images, prompts, guided or not) and replayed.
- `compile`: each kind of block is compiled once, which fuses everything between the matrix products.
- `quantize`: the blocks' linears are quantised (quantization.py); "fp8" multiplies in float8 (float8.py).
- `kernels`: Triton kernels (kernels.py) quantise activations and rotate queries and keys; needs `defer`.
- `attention`: a Triton kernel (kernels.py) computes attention and rotates queries and keys as it reads them.
- `few`: for one or two images, on Hopper, Triton kernels (few_images.py) run between a block's products; needs `kernels` and our
  attention.

docs/performance.md lists what each trick gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.checkpoint import RowSink
from scale_rae.codes import attention_kind, mlp_kind
from scale_rae.compiling import attention_kernels, compiled
from scale_rae.cuda_graphs import Captures
from scale_rae.dit import (
    NORM_EPS,
    Attention,
    Block,
    DiT,
    FinalLayer,
    RMSNorm,
    SwiGLU,
    TimeEmbedder,
    attend,
    heads_output,
)
from scale_rae.float8 import Quantized, raw_product
from scale_rae.flow import Velocity
from scale_rae.options import Speed
from scale_rae.quantization import (
    Place,
    QuantizedLinear,
    QuantizedWeight,
    check_quantize,
    check_widths,
    joined,
    own_kernels,
    product,
    quantize_linears,
    quantize_tokens,
)
from scale_rae.residency import Residency
from scale_rae.toolchain import runs_own_kernels

PAD_TO = 64  # elements of SwiGLU's inner width
GROUP_ROWS = 2048  # rows (tokens of a batch's prompts) with which one block's adaLN product fills the GPU
MOST_GRAPHS = 24  # captured graphs that are kept
SPLIT, SPLIT_ROWS = 2, 256  # parts of the inner dimension of products with few outputs, up to so many rows
FEW_ROWS = 512  # rows (tokens of a batch's images, guided ones twice) up to which `few_block` is faster

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


def _per_image(modulation: Tensor, prompt_of: Tensor | None) -> Tensor:
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
    return attention.proj(attend(attention.qkv(x), attention.heads, cos, sin))  # type: ignore[no-any-return]


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
    return linear.weight.kind == "int8-products"  # type: ignore[no-any-return]


def _product(linear: Any, x: Tensor | Quantized) -> Tensor:
    if isinstance(x, Tensor):
        return linear(x)  # type: ignore[no-any-return]
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
    return final.linear(final.norm_final(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


# --- weights ---------------------------------------------------------------------------------------------------------


def pad_swiglu(dit: nn.Module, multiple: int) -> None:
    """Pads the inner width of each SwiGLU with zeros to a multiple of `multiple`.

    Padding is exact: a zero row gives SiLU(0) · 0 = 0. It stays exact in training, because the zeros' gradients are products
    with zeros. Tensor cores lose a quarter of their speed at odd widths (5461 in the published network).
    """
    for module in dit.modules():
        if not isinstance(module, SwiGLU):
            continue
        w12, w3 = module.w12, module.w3
        inner = w3.in_features
        extra = -inner % multiple
        if not extra:
            continue
        gates = w12.weight.detach().view(2, inner, -1)
        w12.weight = nn.Parameter(F.pad(gates, (0, 0, 0, extra)).flatten(0, 1), w12.weight.requires_grad)
        w12.bias = nn.Parameter(F.pad(w12.bias.detach().view(2, inner), (0, extra)).flatten(), w12.bias.requires_grad)
        w3.weight = nn.Parameter(F.pad(w3.weight.detach(), (0, extra)), w3.weight.requires_grad)
        w12.out_features, w3.in_features = 2 * (inner + extra), inner + extra


class StackedModulations:
    """The adaLN linears of blocks that share a condition, fused; the blocks' own weights are views of one matrix."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.width = layers[0].out_features
        self.bias = torch.cat([layer.bias.detach() for layer in layers])  # [blocks · 6D]
        self.weight: Tensor | QuantizedWeight  # [blocks · 6D, Z]
        if isinstance(layers[0].weight, QuantizedWeight):
            self.weight = joined([layer.weight for layer in layers])
        else:
            self.weight = torch.cat([layer.weight.detach() for layer in layers])
        for i, layer in enumerate(layers):
            rows = slice(i * self.width, (i + 1) * self.width)
            layer.bias = nn.Parameter(self.bias[rows], requires_grad=False)
            if isinstance(self.weight, QuantizedWeight):
                layer.values, layer.scale = self.weight.values[rows], self.weight.scale[rows]
            else:
                layer.weight = nn.Parameter(self.weight[rows], requires_grad=False)

    def __call__(self, read: Any, first: int, stop: int) -> Tensor:
        """Modulations [..., (stop - first) · 6D] of blocks `first` to `stop` - 1; `read` is SiLU(c), which `_read` returns."""
        rows = slice(first * self.width, stop * self.width)
        if not isinstance(self.weight, QuantizedWeight):
            return F.linear(read, self.weight[rows], self.bias[rows])
        if isinstance(read, Quantized):
            return product(read, self.weight.rows(rows), self.bias[rows])
        return self.weight.rows(rows).linear(read, self.bias[rows])


def _modulation(block: Block, read: Any) -> Tensor:
    """A block's modulations [..., 6D]; `read` is SiLU(c), which `_read` returns."""
    linear: Any = block.adaLN_modulation[1]
    return product(read, linear.weight, linear.bias) if isinstance(read, Quantized) else linear(read)


def mean_read(embedder: TimeEmbedder, null: Tensor | None) -> Tensor:
    """The mean [Z] over all times of what adaLN reads without a prompt, float32: SiLU(SiLU(t + null)).

    adaLN's inputs differ little from their mean: in the bundled model, all but 4 % of their mean square is that of the mean. So
    biases that make up for it leave a twentieth of the squared error that nf4 makes there.
    """
    times = torch.linspace(0.02, 1.0, 50, device=embedder.frequencies.device)
    embedded = embedder(times) if null is None else embedder(times) + null.float()
    return F.silu(F.silu(embedded)).mean(dim=0)


def quantize_blocks(dit: DiT, kind: str, place: Place, read: Tensor | None = None) -> dict[str, RowSink]:
    """Quantises the linears of the blocks, in place; embedders, final layer and DDT projector stay as they are.

    Without weights (on "meta"), the sinks take those of a checkpoint, by their names below `dit`. SwiGLU's inner width becomes a
    multiple of PAD_TO. The adaLN linears that `StackedModulations` fuses are consecutive in memory. With nf4, their biases make
    up for what `mean_read` loses: `read`, which is computed where weights exist.

    Raises:
        InputError: for a linear whose numbers of inputs or outputs the kind cannot have.
    """
    sinks: dict[str, RowSink] = {}
    blocks: list[Any] = list(dit.dit_blocks)
    stacked = [(f"dit_blocks.{i}.adaLN_modulation.1", b.adaLN_modulation, "1") for i, b in enumerate(blocks)]
    for _, owner, name in stacked:
        check_widths(kind, *getattr(owner, name).weight.shape)
    if kind == "nf4" and read is None and not dit.pos_embed.is_meta:
        read = mean_read(dit.t_embedder, dit.null_condition)
    mean = read.to(place.device) if kind == "nf4" and read is not None else None
    sinks |= quantize_linears(stacked[: dit.encoder_depth], kind, place, mean)
    if kind != "fp8":  # as float8 was measured
        for linear in stacked[dit.encoder_depth :]:
            sinks |= quantize_linears([linear], kind, place)
    for i, block in enumerate(blocks):
        for name in ("qkv", "proj"):
            check_widths(attention_kind(kind), *getattr(block.attn, name).weight.shape)
            linear = (f"dit_blocks.{i}.attn.{name}", block.attn, name)
            sinks |= quantize_linears([linear], attention_kind(kind), place)
        sinks |= _quantize_swiglu(f"dit_blocks.{i}.mlp", block.mlp, mlp_kind(kind, i, len(blocks)), place)
    return sinks


def is_quantized(dit: DiT) -> bool:
    """Whether `quantize_blocks` was called."""
    return isinstance(dit.dit_blocks[0].attn.qkv, QuantizedLinear)  # type: ignore[union-attr]


def _quantize_swiglu(path: str, mlp: SwiGLU, kind: str, place: Place) -> dict[str, RowSink]:
    """As `quantize_linears`, for both linears of a SwiGLU, whose inner width is padded with zeros."""
    w12, w3 = mlp.w12, mlp.w3
    width, inner = w12.in_features, w3.in_features
    extra = -inner % PAD_TO
    check_widths(kind, 2 * (inner + extra), width)
    check_widths(kind, width, inner + extra)
    (rows,) = place.room(kind, [2 * (inner + extra)], width)
    gates, values = (rows.rows(slice(start, start + inner)) for start in (0, inner + extra))
    (columns,) = place.room(kind, [width], inner + extra)
    bias = torch.zeros(2, inner + extra, dtype=place.dtype, device=place.storage)

    def store_bias(start: int, values: Tensor) -> None:
        first = values[: max(0, inner - start)]  # values for the gates; the rest are for the values
        bias[0, start : start + len(first)] = first
        after = max(0, start - inner)
        bias[1, after : after + len(values) - len(first)] = values[len(first) :]

    sinks = {
        f"{path}.w12.weight": place.sink([gates, values], width),
        f"{path}.w12.bias": RowSink((2 * inner,), store_bias),
        f"{path}.w3.weight": place.sink([columns], inner),
    }
    for name, linear in (("w12", w12), ("w3", w3)):
        for leaf in ("weight", "bias"):
            value, sink = getattr(linear, leaf).detach(), sinks.get(f"{path}.{name}.{leaf}")
            if sink is not None and not value.is_meta:
                sink.store(0, value)
    mlp.w12 = QuantizedLinear(rows, bias.flatten())  # type: ignore[assignment]
    mlp.w3 = QuantizedLinear(columns, w3.bias)  # type: ignore[assignment]
    return sinks


# --- which functions run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Functions:
    """The functions that compute the network's parts, compiled or not, and the rotary tables that `block` takes."""

    read: Callable[..., Any]
    block: Callable[..., Deferred]
    plain_block: Callable[..., Tensor]
    final: Callable[..., Tensor]
    plain_final: Callable[..., Tensor]
    few_block: (
        Callable[..., Deferred] | None
    )  # for up to FEW_ROWS rows; never compiled, since its kernels leave nothing to fuse
    cos: Tensor
    sin: Tensor

    def block_for(self, rows: int) -> Callable[..., Deferred]:
        """The block function for so many tokens of a batch."""
        return self.block if self.few_block is None or rows > FEW_ROWS else self.few_block


def _read(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    """SiLU(c) twice, for the final layer and for the blocks. time [1, Z], condition [P, L, Z]."""
    read = F.silu(F.silu(time[:, None] + condition))
    return read, read


def _read_float8(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    """`_read` with a float8 SiLU(c) for the blocks."""
    read, _ = _read(time, condition)
    return read, quantize_tokens("fp8", read)


def _read_int8(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    """`_read` with an int8 SiLU(c) for the blocks."""
    read, _ = _read(time, condition)
    return read, quantize_tokens("int8-products", read)


def choose_functions(speed: Speed, dit: DiT, compile: bool) -> Functions:
    """The functions for a network on its device. With `compile`, the functions that are to be compiled."""
    block: Callable[..., Deferred] = deferred_block if speed.defer else summed_block
    few: Callable[..., Deferred] | None = None
    cos, sin = dit.rope_cos, dit.rope_sin
    device, kind = dit.pos_embed.device, speed.quantize
    quantizes = kind == "fp8" or (kind == "int8-products" and own_kernels(kind, device, dit.dtype))
    if speed.defer and speed.kernels and runs_own_kernels(device):
        from scale_rae import kernels

        attend = _choose_attention(speed, dit)
        # A compiled block in bfloat16 is as fast with PyTorch's rotation as with ours.
        if not compile or quantizes or attend is not attend_rotating:
            block = with_attention(quantized_block if quantizes else deferred_block, attend)
            cos, sin = kernels.of_axis(cos), kernels.of_axis(sin)
        if speed.few and attend is kernels.attend_pairs and kind in (None, "fp8") and _few_block_fits(dit):
            few = few_block
    read = {"fp8": _read_float8, "int8-products": _read_int8}[kind] if quantizes and kind is not None else _read
    return Functions(read, block, Block.forward, final_layer, FinalLayer.forward, few, cos, sin)


def _few_block_fits(dit: DiT) -> bool:
    """Whether `few_block` supports a network, which must be on Hopper, where it was measured, in bfloat16."""
    if not _is_hopper(dit.pos_embed.device) or dit.dtype != torch.bfloat16:
        return False
    from scale_rae import few_images

    inner = dit.dit_blocks[0].mlp.w3.in_features  # type: ignore[union-attr]
    return dit.config.tokens % 16 == 0 and few_images.fits(dit.config.width, inner)  # type: ignore[arg-type]


def _choose_attention(speed: Speed, dit: DiT) -> Attend:
    """The attention on CUDA of the blocks that read the condition. (A DDT's remaining blocks use PyTorch's attention.)

    For float32, and for head widths that our kernel does not support, PyTorch's attention is returned. "auto" chooses our kernel
    only on Hopper, where it was measured.
    """
    from scale_rae import kernels

    own = speed.attention == "own" or (speed.attention == "auto" and _is_hopper(dit.pos_embed.device))
    own = own and kernels.attention_fits(dit.config, dit.dtype)
    return kernels.attend_pairs if own else attend_rotating


def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9


class FastDiT:
    """A velocity network with the tricks of `speed`. It computes `DiT.forward`, up to rounding.

    Padding, stacking and quantising change the weights of `dit` in place. Afterwards `dit` itself can still be used.

    Raises:
        InputError, DeviceError: an option does not exist, or this device does not support it.
    """

    def __init__(self, dit: DiT, speed: Speed, residency: Residency | None = None) -> None:
        speed.check()
        self.dit, self.speed = dit, speed
        self.device = dit.pos_embed.device
        residency = residency or Residency("none", self.device)
        on_cuda = self.device.type == "cuda"
        if speed.quantize is not None:
            check_quantize(speed.quantize, self.device, dit.dtype)
            if not is_quantized(dit):
                with torch.inference_mode(False), torch.no_grad():
                    quantize_blocks(dit, speed.quantize, Place(self.device, self.device, dit.dtype))
        self.final_shared = dit.config.encoder_depth is None
        if speed.pad and on_cuda and speed.quantize is None:
            pad_swiglu(dit, PAD_TO)
        blocks: Sequence[Any] = list(dit.dit_blocks)
        self.layers: list[Any] = [block.adaLN_modulation[1] for block in blocks[: dit.encoder_depth]]
        self.stacked: StackedModulations | None = None
        if ((speed.group and on_cuda) or speed.quantize is not None) and not residency.streams:
            self.stacked = StackedModulations(self.layers)
        stacked = () if self.stacked is None else (self.stacked.weight, self.stacked.bias)
        blocks = residency.keep_blocks("dit", blocks, stacked, [dit.t_embedder])
        self.shared = blocks[: dit.encoder_depth]  # blocks whose condition does not depend on x
        self.own_condition = blocks[dit.encoder_depth :]
        self._eager, self._to_compile = (choose_functions(speed, dit, compile) for compile in (False, True))
        self._compiled: Functions | None = None
        self._compiled_sizes: set[tuple[int, int, bool]] = set()
        self._captures = Captures(speed.graph and on_cuda, MOST_GRAPHS)

    def velocities(
        self,
        condition: Tensor,
        times: Sequence[float],
        guided: bool,
        compile: bool,
        prompt_of: Tensor | None = None,
    ) -> tuple[Velocity, Velocity, Callable[[Tensor, float], tuple[Tensor, Tensor]]]:
        """(conditional, null, both) velocity functions of a batch, for `flow.guided`.

        condition [P, L, Z] has P prompts, with B / P consecutive images per prompt or, in any order, those that `prompt_of`
        [B] names by the numbers of their prompts. `times` are the times at which the solver will evaluate. The null branch is
        only available if `guided`.
        """
        null = self.dit.null_condition
        condition = condition.to(self.device, self.dit.dtype)
        prompt_of = None if prompt_of is None else prompt_of.to(self.device)
        speed = self.speed
        modulated = guided and speed.together and speed.null
        rows = self._before_the_steps(tuple(dict.fromkeys(times)), modulated) if speed.before else {}

        def at(t: float) -> tuple[Tensor, Tensor | None]:
            if not speed.before:
                return self._before_the_steps((t,), modulated)[t]
            if t not in rows:  # a solver that chooses its times while it runs
                rows.update(self._before_the_steps((t,), modulated))
            return rows[t]

        def conditional(x: Tensor, t: float) -> Tensor:
            return self._run(compile, x, at(t)[0], condition, prompt_of=prompt_of)

        def unconditional(x: Tensor, t: float) -> Tensor:
            assert null is not None
            return self._run(compile, x, at(t)[0], null.expand_as(condition).contiguous(), prompt_of=prompt_of)

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            if not speed.together:
                return conditional(x, t), unconditional(x, t)
            time, modulations = at(t)
            if modulations is None:
                assert null is not None
                conditions = torch.cat([condition, null.expand_as(condition)])
                twice = None if prompt_of is None else torch.cat([prompt_of, prompt_of + len(condition)])
                velocities = self._run(compile, torch.cat([x, x]), time, conditions, prompt_of=twice)
            else:
                velocities = self._run(compile, x, time, condition, modulations, prompt_of)
            v_cond, v_null = velocities.chunk(2)
            return v_cond, v_null

        return conditional, unconditional, both

    def is_compiled(self, batch: int, guided: bool, prompts: int) -> bool:
        """Whether code is compiled for batches of `batch` images of `prompts` prompts, with or without guidance."""
        if guided and self.speed.together:
            size = (batch, prompts, True) if self.speed.null else (2 * batch, 2 * prompts, False)
            return size in self._compiled_sizes
        return (batch, prompts, False) in self._compiled_sizes

    def forget(self) -> None:
        """Frees captured graphs and their memory."""
        self._captures.forget()

    def _before_the_steps(self, times: Sequence[float], modulated: bool) -> dict[float, tuple[Tensor, Tensor | None]]:
        """Time -> (embedding [1, Z], the null branch's modulations [W] if `modulated`, else None).

        The modulations are concatenated over the blocks that read the condition and, without a DDT, the final layer.
        """
        dit, null = self.dit, self.dit.null_condition
        embedded = dit.t_embedder(torch.tensor(times, device=self.device)).to(dit.dtype)  # [K, Z]
        if not modulated:
            return {t: (row, None) for t, row in zip(times, embedded.split(1), strict=True)}
        assert null is not None
        plain, read = self._eager.read(embedded, null.expand(1, 1, -1))  # [K, 1, Z]
        if self.stacked is not None:
            parts = [self.stacked(read, 0, len(self.layers))]
        else:
            parts = [_modulation(block, read) for block in self.shared]
        if self.final_shared:
            parts.append(dit.final_layer.adaLN_modulation[1](plain))
        modulations = torch.cat(parts, dim=-1).flatten(0, 1)  # [K, W]
        return {t: (row, m) for t, row, m in zip(times, embedded.split(1), modulations, strict=True)}

    def _run(
        self,
        compile: bool,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        null_modulations: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        size = (len(x), len(condition), null_modulations is not None)
        if compile:
            self._compiled_sizes.add(size)
        options = {"null_modulations": null_modulations, "prompt_of": prompt_of}
        given = {name: value for name, value in options.items() if value is not None}

        def function(x: Tensor, time: Tensor, condition: Tensor, *values: Tensor) -> Tensor:
            functions = self._compiled_functions() if compile else self._eager
            return self.evaluate(functions, x, time, condition, **dict(zip(given, values, strict=True)))

        key = (*size, prompt_of is not None, compile)
        with attention_kernels(self.device):
            return self._captures.run(key, function, x, time, condition, *given.values(), when_it_comes_again=False)

    def _compiled_functions(self) -> Functions:
        if self._compiled is None:
            own = self._to_compile
            functions: dict[str, Any] = {
                f.name: compiled(value)
                for f in fields(own)
                if f.name != "few_block" and callable(value := getattr(own, f.name))
            }
            self._compiled = replace(own, **functions)
        return self._compiled

    def evaluate(
        self,
        functions: Functions,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        null_modulations: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        """Velocities [B, C, S, S] float32 of x [B, C, S, S]; time [1, Z] is embedded, condition [P, L, Z].

        With the null branch's modulations [W] at this time: [2B, C, S, S], first the conditional branch, then the null branch.
        `prompt_of` [B] has the number of each image's prompt; without it, each prompt has B / P consecutive images.
        """
        dit = self.dit
        widths = [layer.out_features for layer in self.layers] + [2 * dit.config.width] * self.final_shared
        null: Sequence[Tensor | None] = [None] * len(widths)
        if null_modulations is not None:
            null = torch.split(null_modulations, widths)
        copies = 1 if null_modulations is None else 2
        tokens = x.to(dit.dtype)
        plain, read = functions.read(time, condition)
        h = dit.x_embedder(tokens) + dit.pos_embed  # [B, L, D]
        h = h.repeat(copies, 1, 1) if copies > 1 else h
        state: Deferred | None = None
        block_of = functions.block_for(h.shape[0] * h.shape[1])
        modulated = self._modulated_blocks(read, len(condition), prompt_of)
        for (block, modulation), null_modulation in zip(modulated, null, strict=False):
            if state is None:  # a sum like all later states, so that one compiled block serves all
                no_more = None if null_modulation is None else null_modulation[:]
                state = Deferred(h, torch.zeros_like(h), modulation[:], no_more) if self.speed.defer else Deferred(h)
            state = block_of(block, state, modulation, functions.cos, functions.sin, null_modulation)
        assert state is not None
        if self.final_shared:
            modulation = _per_image(dit.final_layer.adaLN_modulation[1](plain), prompt_of)
            v = functions.final(dit.final_layer, state, modulation, null[-1])
        else:  # DDT: the output of the first blocks is the condition of the remaining blocks
            s = F.silu(summed(state))
            if hasattr(dit, "s_projector"):
                s = dit.s_projector(s)
            h = torch.cat([dit.s_embedder(tokens)] * copies)
            for block in self.own_condition:
                h = functions.plain_block(block, h, s, dit.decoder_rope_cos, dit.decoder_rope_sin)
            v = functions.plain_final(dit.final_layer, h, s)
        return v.transpose(1, 2).reshape(copies * x.shape[0], *x.shape[1:]).float()  # [B or 2B, C, S, S]

    def _modulated_blocks(self, read: Any, prompts: int, prompt_of: Tensor | None) -> Iterator[tuple[Block, Tensor]]:
        """The blocks that read the condition, each with its modulations [P, L, 6D], or [B, L, 6D] with `prompt_of` [B]."""
        if self.stacked is None:
            for block in self.shared:
                yield block, _per_image(_modulation(block, read), prompt_of)
            return
        yield from zip(self.shared, self._modulations(self.stacked, read, prompts, prompt_of), strict=True)

    def _modulations(
        self, stacked: StackedModulations, read: Any, prompts: int, prompt_of: Tensor | None
    ) -> Iterator[Tensor]:
        depth = len(self.layers)
        # Weights that are converted for each product are converted a block at a time: those of eight blocks would take 0.4 GB.
        group = self.speed.group and self.speed.quantize not in ("int8", "fp8-storage", "nf4")
        most = max(1, GROUP_ROWS // (prompts * self.dit.config.tokens)) if group else 1
        at_once = max(n for n in range(1, most + 1) if depth % n == 0)  # equal groups: other strides compile other code
        for first in range(0, depth, at_once):
            for modulation in stacked(read, first, first + at_once).chunk(at_once, dim=-1):
                yield _per_image(modulation, prompt_of)
