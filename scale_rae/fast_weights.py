"""The weights of the DiT as it runs fast: padded, stacked, quantised, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.checkpoint import RowSink
from scale_rae.codes import PAD_TO, attention_kind, mlp_kind
from scale_rae.dit import Block, DiT, SwiGLU, TimeEmbedder
from scale_rae.float8 import Quantized
from scale_rae.layout import swiglu_inner
from scale_rae.options import Speed
from scale_rae.quantization import (
    Place,
    QuantizedLinear,
    QuantizedWeight,
    check_widths,
    joined,
    joined_rows,
    product,
    quantize_linears,
)


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


def crop_swiglu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name with `pad_swiglu` undone."""
    cropped = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("mlp.w12.weight", "mlp.w12.bias")):
            width = tensors[f"{name.rpartition('.')[0]}.weight"].shape[1]
            cropped[name] = tensor.reshape(2, -1, *tensor.shape[1:])[:, : swiglu_inner(width)].flatten(0, 1)
        elif name.endswith("mlp.w3.weight"):
            cropped[name] = tensor[:, : swiglu_inner(len(tensor))]
    return cropped


def grown_swiglu(tensor: Tensor, like: Tensor) -> Tensor:
    """A parameter as published, with zeros added to the shape of its padded counterpart `like` (`pad_swiglu`)."""
    if tensor.shape == like.shape:
        return tensor
    if tensor.shape[0] == like.shape[0]:  # w3 [D, M]
        return F.pad(tensor, (0, like.shape[1] - tensor.shape[1]))
    halves = tensor.reshape(2, -1, *tensor.shape[1:])  # w12 [2 M, D] or its bias [2 M]
    extra = like.shape[0] // 2 - halves.shape[1]
    return F.pad(halves, (0, 0, 0, extra) if tensor.dim() == 2 else (0, extra)).flatten(0, 1)


class StackedModulations:
    """The adaLN linears of blocks that share a condition, fused; the blocks' own weights are views of one matrix."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.width = layers[0].out_features
        self.bias = torch.cat([layer.bias.detach() for layer in layers])  # [blocks · 6D]
        self.weight: Tensor | QuantizedWeight  # [blocks · 6D, Z]
        if isinstance(layers[0].weight, QuantizedWeight):
            self.weight = joined([layer.weight for layer in layers])
        else:
            self.weight = joined_rows([layer.weight.detach() for layer in layers]).detach()
        for i, layer in enumerate(layers):
            rows = slice(i * self.width, (i + 1) * self.width)
            layer.bias = nn.Parameter(self.bias[rows], requires_grad=False)
            if isinstance(self.weight, QuantizedWeight):
                _, layer.values, layer.scale, _ = self.weight.rows(rows).alone()
            else:
                layer.weight = nn.Parameter(self.weight[rows], requires_grad=False)

    def __call__(self, read: Any, first: int, stop: int) -> Tensor:
        """Modulations [..., (stop - first) · 6D] of blocks `first` to `stop` - 1; `read` is SiLU(c), as the blocks read it."""
        rows = slice(first * self.width, stop * self.width)
        if not isinstance(self.weight, QuantizedWeight):
            return F.linear(read, self.weight[rows], self.bias[rows])
        if isinstance(read, Quantized):
            return product(read, self.weight.rows(rows), self.bias[rows])
        return self.weight.rows(rows).linear(read, self.bias[rows])


def stacks_modulations(speed: Speed, device: torch.device) -> bool:
    """Whether a network on a device has `StackedModulations`; not where its blocks are streamed, which switches `group` off."""
    return (speed.group and device.type == "cuda") or speed.quantize is not None


def stack_modulations(dit: DiT, place: Place) -> dict[str, RowSink]:
    """Sinks for the adaLN weights that `StackedModulations` fuses: they fill one matrix, so that fusing need not copy them.

    The names are those below `dit`, which has no weights yet.
    """
    sinks: dict[str, RowSink] = {}
    blocks: list[Any] = list(dit.dit_blocks)
    layers = [block.adaLN_modulation[1] for block in blocks[: dit.encoder_depth]]
    counts = [layer.out_features for layer in layers]
    whole = torch.empty(sum(counts), layers[0].in_features, dtype=place.dtype, device=place.storage)
    for i, (layer, rows) in enumerate(zip(layers, torch.split(whole, counts), strict=True)):
        layer.weight = nn.Parameter(rows, requires_grad=False)
        sinks[f"dit_blocks.{i}.adaLN_modulation.1.weight"] = RowSink(tuple(rows.shape), _copier(rows))
    return sinks


def _copier(target: Tensor) -> Callable[[int, Tensor], None]:
    def copy(start: int, rows: Tensor) -> None:
        target[start : start + len(rows)].copy_(rows)

    return copy


def modulation_of(block: Block, read: Any) -> Tensor:
    """A block's modulations [..., 6D]; `read` is SiLU(c), as the blocks read it."""
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
