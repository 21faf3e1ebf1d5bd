"""Linears in float8 (e4m3): weights with a scale per output row, activations with one per token.

Activations are quantised where they are computed; in compiled code, the cast is fused with the norm or gate kernel before it. The
product is torch's scaled matrix product, which multiplies by the scales and needs a GPU of compute capability 8.9 or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scale_rae.errors import DeviceError, InputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-12  # lower bound for the largest value of a row, so that a row of zeros has a scale
_MULTIPLE = 16  # rows and channels of a product must be multiples of this


class Quantized(NamedTuple):
    """float8 values [..., K] with a float32 scale [..., 1] for each row: x = values * scale."""

    values: Tensor
    scale: Tensor


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError where float8 products are not supported, InputError for another dtype than bfloat16."""
    if device.type != "cuda":
        raise DeviceError(f"quantize fp8: needs a CUDA GPU with float8 (compute capability 8.9 or more), not {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise DeviceError(
            f"quantize fp8: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            "float8 needs 8.9 or more"
        )
    if dtype != torch.bfloat16:
        raise InputError(f"quantize fp8: computes in bfloat16 beside float8, not {dtype}; use --dtype bfloat16")


def quantize(x: Tensor) -> Quantized:
    """Rows [..., K] scaled so that the largest value is float8's largest."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return Quantized((x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale)


class Float8Linear(nn.Module):
    """A Linear in float8. `forward` takes tensors, `product` what `quantize` returned; both return bfloat16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            raise InputError(
                f"quantize fp8: this network has a linear of {weight.shape[1]} to {weight.shape[0]} channels; "
                f"float8 products need multiples of {_MULTIPLE}"
            )
        parts = [quantize(rows) for rows in torch.split(weight, 4096)]  # some rows at a time, since it takes float32
        values, scale = torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts])
        self.register_buffer("weight", values)  # [N, K]
        self.register_buffer("scale", scale.t().contiguous())  # [1, N]
        self.register_buffer("bias", bias.to(torch.bfloat16) if bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(quantize(x))

    def product(self, x: Quantized, rows: slice = slice(None)) -> Tensor:
        """The outputs `rows` of the linear, bfloat16 [..., N]."""
        weight, scale = self.weight[rows], self.scale[:, rows].contiguous()
        bias = self.bias[rows] if self.bias is not None else None
        values, by_token = x.values.flatten(0, -2), x.scale.flatten(0, -2)
        count = len(values)
        if count % _MULTIPLE:
            values = torch.cat([values, values.new_zeros(-count % _MULTIPLE, values.shape[1])])
            by_token = torch.cat([by_token, by_token.new_ones(-count % _MULTIPLE, 1)])
        out: Tensor = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=by_token,
            scale_b=scale,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out[:count].view(*x.values.shape[:-1], -1)
