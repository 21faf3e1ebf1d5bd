"""Quantised weights: their forms, how weights become them, and linears and embeddings that hold them.

| kind | values | scale |
| --- | --- | --- |
| int8, int8-products | int8 [N, K] | float32 [N, 1], per output row |
| fp8, fp8-storage | float8 e4m3 [N, K] | float32 [N, 1], per output row |
| nf4 | two 4-bit codes a byte, uint8 [N, K/2] | bfloat16 [N, K/64], per 64 weights of a row |

A weight is value * scale; nf4's values are the 16 quantiles of NF4 (QLoRA, arXiv 2305.14314). int8, fp8-storage and nf4 multiply in
the activations' dtype. int8-products and fp8 quantise activations per token too and multiply in int8 or float8.

The plain forms run on any device. On CUDA, kernels compute the products where `own_kernels` says that there are some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae import float8
from scale_rae.checkpoint import RowSink
from scale_rae.codes import BLOCK, INT8_LARGEST, NF4, PLAIN_AT_ONCE
from scale_rae.errors import DeviceError, InputError
from scale_rae.float8 import FLOAT8, LEAST, Quantized
from scale_rae.toolchain import runs_own_kernels

_NF4_FACTORS = (1.0, 0.92, 0.84)  # of a block's largest value, tried as its scale
_AT_ONCE = 1 << 22  # weights quantised at once, since that takes several float32 copies of them
_AT_ONCE_CPU = 1 << 16  # the same on a CPU, whose caches hold so many
_MULTIPLES = {"int8-products": 8, "fp8": 16}  # of rows and columns, which the products need
_LEAST_TOKENS = 32  # torch's int8 product takes more than 16 rows

_FLOAT8_VALUES = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()  # of every byte

_nf4_tables: dict[torch.device, Tensor] = {}
_kernels = torch.ops.scale_rae  # has the operators of products.py after that is imported


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in one of the forms above; `own` chooses our kernels for its products.

    nf4: byte j of a block of 64 columns has the code of column j in its low half and that of column j + 32 in its high half.
    """

    kind: str
    values: Tensor
    scale: Tensor
    own: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(N, K): outputs and inputs of the linear."""
        return len(self.values), self.values.shape[1] * (2 if self.kind == "nf4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def rows(self, index: slice | Tensor) -> QuantizedWeight:
        """The weight's rows `index`: a view for a slice, a copy [..., K] for a tensor of row numbers."""
        return QuantizedWeight(self.kind, self.values[index], self.scale[index], self.own)

    def alone(self) -> QuantizedWeight:
        """The weight in the same memory, but no view of another tensor, which would keep that memory when the weight moves."""
        return self._replace(values=self.values.detach(), scale=self.scale.detach())

    def to(self, device: torch.device) -> QuantizedWeight:
        """The weight on a device."""
        return QuantizedWeight(self.kind, self.values.to(device), self.scale.to(device), self.own)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [..., K], computed in float32 and rounded to `dtype`."""
        if self.kind != "nf4":
            return (_float32(self.values) * self.scale).to(dtype)
        pairs = _in_pairs(self.values)
        blocks = pairs.view(*self.scale.shape, BLOCK // 2, 2).transpose(-1, -2)  # [..., K/64, 2, 32]
        return (blocks * self.scale.float()[..., None, None]).flatten(-3).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the weight, plus bias [N], in x's dtype: [..., N]."""
        if self.own:
            return _own_linear(x, self, bias)
        if self.kind in ("fp8", "int8-products"):
            return product(quantize_tokens(self.kind, x), self, bias, x.dtype)
        rows, columns = self.size
        at_once = max(1, PLAIN_AT_ONCE // columns)
        if rows <= at_once:
            return F.linear(x, self.dequantize(x.dtype), bias)
        parts = [F.linear(x, self.rows(slice(i, i + at_once)).dequantize(x.dtype)) for i in range(0, rows, at_once)]
        out = torch.cat(parts, dim=-1)
        return out if bias is None else out + bias


def _own_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`QuantizedWeight.linear` by our kernels, one operator per kind."""
    operators = {
        "int8": "int8_linear",
        "int8-products": "int8_products",
        "fp8-storage": "float8_linear",
        "nf4": "nf4_linear",
    }
    operator = getattr(_kernels, operators[weight.kind])
    return operator(x, weight.values, weight.scale, bias)


def own_kernels(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels compute a kind's products on this device.

    Products with float8 need compute capability 8.9. int8 products are for Hopper alone, where they were measured.
    """
    if kind == "fp8" or dtype == torch.float32 or not runs_own_kernels(device):
        return False
    from scale_rae import products

    return products.supports(kind, device)


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a weight [N, K], quantised or not, plus bias [N]: [..., N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return weight.linear(x, bias)


# --- products of quantised activations -------------------------------------------------------------------------------


def quantize_tokens(kind: str, x: Tensor) -> Quantized:
    """x [..., K] for `product` with weights of a kind: quantised with a scale per token [..., 1]."""
    if kind == "fp8":
        return float8.quantize(x)
    return _int8_rows(x)


def product(
    x: Quantized, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Quantised tokens x [..., K] times a weight of kind fp8 or int8-products, plus bias [N]: [..., N] in `dtype`."""
    if weight.kind == "fp8":
        return float8.product(x, Quantized(weight.values, weight.scale), bias)
    if weight.own:
        return _kernels.int8_product(x.values, x.scale, weight.values, weight.scale, bias, dtype)
    values = x.values.flatten(0, -2)
    count = len(values)
    if count < _LEAST_TOKENS:
        values = torch.cat([values, values.new_zeros(_LEAST_TOKENS - count, values.shape[1])])
    sums = torch._int_mm(values, weight.values.t())[:count].view(*x.values.shape[:-1], -1)  # exact, int32
    out = sums.float() * x.scale * weight.scale.t()[0]
    return (out if bias is None else out + bias.float()).to(dtype)


# --- quantising ------------------------------------------------------------------------------------------------------


def quantize_weight(kind: str, weight: Tensor) -> QuantizedWeight:
    """A weight [N, K] of any float dtype in a quantised form, on its device.

    Raises:
        InputError: for a number of rows or columns that the form cannot have.
    """
    check_widths(kind, *weight.shape)
    (made,) = room(kind, [len(weight)], weight.shape[1], weight.device)
    store(made, weight)
    return made


def room(kind: str, rows: Sequence[int], columns: int, device: torch.device) -> list[QuantizedWeight]:
    """Weights of zeros with these numbers of rows, consecutive in memory, so that `joined` need not copy them."""
    counts, total = list(rows), sum(rows)
    if kind == "nf4":
        values = torch.full((total, columns // 2), 0x77, dtype=torch.uint8, device=device)  # two codes of 0.0
        scale = torch.zeros(total, columns // BLOCK, dtype=torch.bfloat16, device=device)
    else:
        values = torch.zeros(total, columns, dtype=torch.int8 if "int8" in kind else FLOAT8, device=device)
        scale = torch.zeros(total, 1, device=device)
    return [
        QuantizedWeight(kind, v, s).alone()
        for v, s in zip(torch.split(values, counts), torch.split(scale, counts), strict=True)
    ]


def store(target: QuantizedWeight, weight: Tensor, mean: Tensor | None = None) -> Tensor | None:
    """Quantises a weight [N, K] into `target` [N, K' ≥ K], which may be on another device; missing columns are zeros.

    With the mean [K'] of the linear's inputs, returns what its outputs have lost on average: (weight - target) · mean [N].
    """
    columns, lost = target.size[1], []
    at_once = max(1, (_AT_ONCE_CPU if weight.device.type == "cpu" else _AT_ONCE) // columns)
    for start in range(0, len(weight), at_once):
        part = weight[start : start + at_once]
        made = quantize_rows(target.kind, F.pad(part, (0, columns - part.shape[1])))
        target.values[start : start + at_once].copy_(made.values)
        target.scale[start : start + at_once].copy_(made.scale)
        if mean is not None:
            kept = QuantizedWeight(target.kind, *made).dequantize(torch.float32)
            lost.append((part.float() - kept) @ mean)
    return torch.cat(lost) if lost else None


class Place(NamedTuple):
    """Where a network's quantised weights are kept, and the device and dtype of its computations, which quantises them."""

    storage: torch.device
    device: torch.device
    dtype: torch.dtype

    def room(self, kind: str, rows: Sequence[int], columns: int) -> list[QuantizedWeight]:
        """`room` in the storage, for our kernels where they compute this kind."""
        own = own_kernels(kind, self.device, self.dtype)
        return [weight._replace(own=own) for weight in room(kind, rows, columns, self.storage)]

    def sink(
        self,
        targets: Sequence[QuantizedWeight],
        columns: int,
        mean: Tensor | None = None,
        lose: Callable[[int, Tensor], None] | None = None,
    ) -> RowSink:
        """Takes a stored weight of `columns` columns; its rows are quantised into the targets, one after another.

        With the mean of a single target's inputs, `lose(start, lost)` gets what `store` returns.
        """

        def take(start: int, rows: Tensor) -> None:
            rows = (rows.float() if rows.dtype == torch.float64 else rows).to(self.device)  # MPS has no float64
            if targets[0].kind == "fp8":
                rows = rows.to(self.dtype)
            for target in targets:
                count = target.size[0]
                low, high = max(0, -start), min(len(rows), count - start)  # the rows that are this target's
                if low < high:
                    lost = store(target.rows(slice(start + low, start + high)), rows[low:high], mean)
                    if lost is not None and lose is not None:
                        lose(start + low, lost)
                start -= count

        return RowSink((sum(target.size[0] for target in targets), columns), take)


def quantize_linears(
    linears: Sequence[tuple[str, nn.Module, str]], kind: str, place: Place, mean: Tensor | None = None
) -> dict[str, RowSink]:
    """Puts QuantizedLinears in the place of linears with the same inputs; their weights are consecutive in memory.

    A linear is (name, owner, name in its owner). The sinks take the weights, by the names that checkpoints have for them;
    weights that exist already are quantised. Biases stay as they are or, with the mean [K] of the inputs, on the device and in
    float32, make up for what outputs lose on average.
    """
    replaced: list[Any] = [getattr(owner, leaf) for _, owner, leaf in linears]
    made = place.room(kind, [linear.out_features for linear in replaced], replaced[0].in_features)
    sinks: dict[str, RowSink] = {}
    for (name, owner, leaf), linear, weight in zip(linears, replaced, made, strict=True):
        bias, taken = linear.bias, {}
        if mean is None:
            taken["weight"] = place.sink([weight], linear.in_features)
        else:
            bias = torch.zeros(linear.out_features, dtype=place.dtype, device=place.storage)
            add = _adder(bias, place.device)
            taken["weight"] = place.sink([weight], linear.in_features, mean, add)
            taken["bias"] = RowSink((linear.out_features,), add)
        for part, sink in taken.items():
            sinks[f"{name}.{part}"] = sink
            if not linear.weight.is_meta:
                sink.store(0, getattr(linear, part).detach())
        setattr(owner, leaf, QuantizedLinear(weight, bias))
    return sinks


def _adder(bias: Tensor, device: torch.device) -> Callable[[int, Tensor], None]:
    """Adds values to a bias [N] from a row on; the sum is kept in float32 on a device, and rounded once."""
    total = torch.zeros(len(bias), device=device)

    def add(start: int, values: Tensor) -> None:
        rows = slice(start, start + len(values))
        total[rows] += values.to(device, torch.float32)
        bias[rows].copy_(total[rows])

    return add


def joined(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several weights as one: a view where they are consecutive in memory, else a copy."""
    first = weights[0]
    return QuantizedWeight(
        first.kind, joined_rows([w.values for w in weights]), joined_rows([w.scale for w in weights]), first.own
    ).alone()


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several matrices as one: a view where they are consecutive in memory, else a copy."""
    parts = [part for part in parts if len(part)] or parts  # empty tensors have no address
    end = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.nbytes
    if parts[0].untyped_storage().data_ptr() != parts[-1].untyped_storage().data_ptr():
        return torch.cat(list(parts))  # neighbours by chance
    return parts[0].as_strided((sum(len(p) for p in parts), parts[0].shape[1]), parts[0].stride())


def quantize_rows(kind: str, weight: Tensor) -> Quantized:
    """Values and scales of a weight [N, K]; nf4's as the table above says."""
    if kind == "nf4":
        return _nf4_blocks(weight)
    return _int8_rows(weight) if "int8" in kind else float8.quantize(weight)


def _int8_rows(x: Tensor) -> Quantized:
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=LEAST) / INT8_LARGEST
    return Quantized((x.float() / scale).round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale)


def _nf4_blocks(weight: Tensor) -> Quantized:
    """Each block of a weight with the scale, of a few around its largest value, that leaves the least squared error.

    Scales may be negative, since NF4 is not symmetric. Against the block's largest value alone, errors are 7 % smaller. Such
    scales make rows 1 % too short in the direction of the weights, which adds up from linear to linear; rows are lengthened.
    """
    blocks = weight.float().reshape(len(weight), -1, BLOCK)  # [N, K/64, 64]
    values = torch.tensor(NF4, device=weight.device)
    between = (values[1:] + values[:-1]) / 2
    largest = blocks.abs().amax(dim=-1).clamp(min=LEAST)
    scale, codes, least = largest, blocks, torch.full_like(largest, torch.inf)
    for factor in (f * sign for f in _NF4_FACTORS for sign in (1, -1)):
        tried = (largest * factor).to(torch.bfloat16)
        scaled = blocks / tried.float()[..., None]
        found = torch.bucketize(scaled, between, out_int32=True)
        error = (values[found] - scaled).square_().sum(dim=-1) * tried.float().square()
        better = error < least
        scale, least = torch.where(better, tried, scale), torch.where(better, error, least)
        codes = torch.where(better[..., None], found, codes)
    kept = values[codes.int()] * scale[..., None]
    along, length = ((blocks * other).sum(dim=(1, 2)).clamp(min=LEAST**2) for other in (kept, blocks))
    scale = scale * (length / along)[:, None]
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)  # each [N, K/64, 32]
    return Quantized((low | high << 4).flatten(-2), scale.to(torch.bfloat16))


def _float32(values: Tensor) -> Tensor:
    """int8 or float8 values in float32. A CPU converts float8 one by one; looking up the values takes a quarter of the time."""
    if values.dtype != FLOAT8 or values.device.type != "cpu":
        return values.float()
    return _FLOAT8_VALUES.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def _in_pairs(values: Tensor) -> Tensor:
    """The values [..., K/2, 2] of nf4's bytes [..., K/2] in float32; on a CPU, a pair is looked up as one integer of 64 bits."""
    pairs = _nf4_pairs(values.device)
    if values.device.type != "cpu":
        return F.embedding(values.int(), pairs)
    found = pairs.view(torch.int64).flatten().index_select(0, values.flatten().int())
    return found.view(torch.float32).view(*values.shape, 2)


def _nf4_pairs(device: torch.device) -> Tensor:
    """The two values [256, 2] that a byte stands for; made once per device, since CUDA graphs cannot copy from the host."""
    if device not in _nf4_tables:
        codes = torch.arange(256)
        with torch.inference_mode(False):
            table = torch.tensor(NF4)[torch.stack([codes % 16, codes // 16], dim=-1)]
            _nf4_tables[device] = table.to(device)
    return _nf4_tables[device]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_quantize(kind: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError for a kind of quantisation that a device has no products for, InputError for a wrong dtype."""
    if kind == "fp8":
        float8.check_device(device, dtype)
    if kind == "fp8-storage" and device.type == "mps":
        raise DeviceError(f"quantize fp8-storage: {device} has no float8 numbers; use --quantize int8")
    if kind == "int8-products":
        if device.type not in ("cuda", "cpu"):
            raise DeviceError(f"quantize int8-products: {device} has no int8 matrix products; use --quantize int8")
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
            major, minor = torch.cuda.get_device_capability(device)
            raise DeviceError(
                f"quantize int8-products: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; int8 "
                "products need 7.5 or more; use --quantize int8"
            )


def check_widths(kind: str, rows: int, columns: int) -> None:
    """Raises InputError for a linear whose numbers of rows (outputs) or columns (inputs) a kind cannot have."""
    what = f"quantize {kind}: this network has a linear of {columns} to {rows} channels; "
    if kind == "nf4" and columns % BLOCK:
        raise InputError(f"{what}nf4 needs a multiple of {BLOCK} inputs; use --quantize int8")
    multiple = _MULTIPLES.get(kind, 1)
    if rows % multiple or columns % multiple:
        number = "float8" if kind == "fp8" else "int8"
        raise InputError(f"{what}{number} products need multiples of {multiple}")


# --- modules ---------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A Linear with a quantised weight: buffers `values` and `scale`, and a parameter `bias` or None."""

    values: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.size
        self.kind, self.own = weight.kind, weight.own
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.kind, self.values, self.scale, self.own)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)


class QuantizedEmbedding(nn.Module):
    """An Embedding with a weight quantised by rows; `forward` returns rows in `dtype`."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = weight.kind, dtype
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.kind, self.values, self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids).dequantize(self.dtype)


def rows_in_chunks(linear: nn.Module, at_most: int) -> list[nn.Module]:
    """A linear without bias, quantised or not, as linears for some of its outputs each, of about `at_most` bytes.

    They are views of its weight.
    """
    weight: Any = linear.weight
    rows, size = (weight.size[0] if isinstance(weight, QuantizedWeight) else len(weight)), int(weight.nbytes)
    step = -(-rows // -(-size // max(at_most, 1)) // 64) * 64
    return [_with_rows(weight, slice(start, start + step)) for start in range(0, rows, step)]


def _with_rows(weight: Any, rows: slice) -> nn.Module:
    if isinstance(weight, QuantizedWeight):
        return QuantizedLinear(weight.rows(rows).alone(), None)
    return _Rows(weight.detach()[rows])


class _Rows(nn.Module):
    """A Linear without bias; making nn.Linear's own would initialise its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
