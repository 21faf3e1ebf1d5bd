"""Products in float8 (e4m3): weights with a scale per output row, activations with one per token.

Activations are quantised where they are computed; in compiled code, the cast is fused with the norm or gate kernel before it. The
product is torch's scaled matrix product, which multiplies by the scales and needs a GPU of compute capability 8.9 or more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from scale_rae.errors import DeviceError, InputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-12  # lower bound for the largest value of a row, so that a row of zeros has a scale
_MULTIPLE = 16  # of the rows of a product


class Quantized(NamedTuple):
    """float8 values [..., K] with a float32 scale [..., 1] for each row: x = values * scale."""

    values: Tensor
    scale: Tensor


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError where float8 products are not supported, InputError for another dtype than bfloat16."""
    if device.type != "cuda":
        raise DeviceError(f"quantize fp8: needs a CUDA GPU with float8 (compute capability 8.9 or more), not {device}")
    if torch.version.hip is not None:  # whose "capability" counts otherwise
        raise DeviceError(
            "quantize fp8: uses the float8 products of NVIDIA GPUs, which AMD GPUs do in another format; use --quantize int8"
        )
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


def product(x: Quantized, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """Tokens x [..., K] times a weight [N, K], both quantised by rows, plus bias [N]: bfloat16 [..., N].

    N and K are multiples of 16.
    """
    values, by_token = x.values.flatten(0, -2), x.scale.flatten(0, -2)
    count = len(values)
    if count % _MULTIPLE:
        values = torch.cat([values, values.new_zeros(-count % _MULTIPLE, values.shape[1])])
        by_token = torch.cat([by_token, by_token.new_ones(-count % _MULTIPLE, 1)])
    out: Tensor = torch._scaled_mm(
        values,
        weight.values.t(),
        scale_a=by_token,
        scale_b=weight.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out[:count].view(*x.values.shape[:-1], -1)


def raw_product(x: Tensor, weight: Tensor) -> Tensor:
    """Rows x [..., K] times a weight [N, K], both float8, without scales: bfloat16 [..., N].

    For a few hundred rows, the product with scales by rows takes up to twice as long.
    """
    one = _one(x.device)
    flat = x.flatten(0, -2)
    out: Tensor = torch._scaled_mm(flat, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.view(*x.shape[:-1], -1)


@functools.cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), device=device)
