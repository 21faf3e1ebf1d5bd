"""LoRA layers for training: y = W x + (alpha / r) B A x, with W frozen, plain or quantised.

Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314. PEFT's own layers do not support this package's quantised linears.
`adapters` reads and writes PEFT's file format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.dit import DiT
from scale_rae.language import LanguageModel
from scale_rae.layout import DIT_PREFIX, swiglu_inner
from scale_rae.quantization import QuantizedLinear, QuantizedWeight

# The linears that are trained: all of the blocks', and those that join the networks.
DIT_LINEARS = r"dit_blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(w12|w3)|adaLN_modulation\.1)"
LANGUAGE_LINEARS = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|model\.mm_projector(\.\d+)?|diff_head_projector"


class LoraLinear(nn.Module):
    """A frozen linear and its LoRA. B starts at zero, so the first step sees the base model."""

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        anchor = base.weight if isinstance(base, nn.Linear) else base.scale
        dtype = anchor.dtype if isinstance(base, nn.Linear) else torch.float32
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=anchor.device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=anchor.device, dtype=dtype)
        self.scale = alpha / rank
        self.on = True
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Any:
        """The base's weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, QuantizedLinear):
            out = _frozen_linear(x, self.base.weight, self.base.bias)
        else:
            out = self.base(x)
        if not self.on:
            return out
        return out + F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight) * self.scale


@contextmanager
def switched_off(layers: Iterable[LoraLinear]) -> Iterator[None]:
    """A context in which the layers compute without their LoRA."""
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


class FrozenLinear(nn.Module):
    """A quantised linear that does not learn; gradients pass through it."""

    def __init__(self, base: QuantizedLinear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return _frozen_linear(x, self.base.weight, self.base.bias)


def pass_gradients(module: nn.Module) -> None:
    """Replaces quantised linears without LoRA by FrozenLinears, in place."""
    for owner in list(module.modules()):
        if isinstance(owner, LoraLinear | FrozenLinear):
            continue
        for leaf, part in list(owner.named_children()):
            if isinstance(part, QuantizedLinear):
                setattr(owner, leaf, FrozenLinear(part))


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ of a quantised weight, which is dequantised anew for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, values: Tensor, scale: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(values, scale)
        return F.linear(x, QuantizedWeight(kind, values, scale).dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        values, scale = ctx.saved_tensors
        weight = QuantizedWeight(ctx.kind, values, scale).dequantize(gradients[0].dtype)
        return gradients[0] @ weight, None, None, None


def _frozen_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    out: Tensor = _FrozenProduct.apply(x, weight.kind, weight.values, weight.scale)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def add_lora(
    module: nn.Module, linears: str, rank: int, alpha: float, generator: torch.Generator
) -> dict[str, LoraLinear]:
    """Puts LoraLinears in the place of the linears whose names match; returns them by those names.

    A is drawn by the generator as nn.Linear draws its weights. Inputs that SwiGLU was padded with (`pad_swiglu`) get zeros, so
    padding stays exact.
    """
    added: dict[str, LoraLinear] = {}
    for name, linear in list(module.named_modules()):
        if not re.fullmatch(linears, name) or not isinstance(linear, nn.Linear | QuantizedLinear):
            continue
        owner, _, leaf = name.rpartition(".")
        made = LoraLinear(linear, rank, alpha)
        shape = made.lora_A.weight.shape
        bound = 1 / math.sqrt(shape[1])
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name.endswith("mlp.w3"):
            drawn[:, swiglu_inner(linear.out_features) :] = 0
        with torch.no_grad():
            made.lora_A.weight.copy_(drawn)
        setattr(module.get_submodule(owner), leaf, made)
        added[name] = made
    return added


def adapter_changes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the names of modules in a checkpoint, without padding.

    `tensors` are parameters by name (`….lora_A.weight`).
    """
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[f"{module}.lora_B.weight"]
        if module.endswith("mlp.w3"):
            a = a[:, : swiglu_inner(len(b))]
        elif module.endswith("mlp.w12"):
            b = b.reshape(2, -1, b.shape[1])[:, : swiglu_inner(a.shape[1])].flatten(0, 1)
        changes[module] = a, b
    return changes


def add_to_networks(
    language: LanguageModel | None, dit: DiT | None, rank: int, alpha: float, seed: int
) -> dict[str, LoraLinear]:
    """Adds LoRA to the networks that are given, and returns the layers by the names of their linears.

    The names are those that checkpoints have.
    """
    generator = torch.Generator().manual_seed(seed)
    added: dict[str, LoraLinear] = {}
    if language is not None:
        added |= add_lora(language, LANGUAGE_LINEARS, rank, alpha, generator)
    if dit is not None:
        layers = add_lora(dit, DIT_LINEARS, rank, alpha, generator)
        added |= {DIT_PREFIX + name: layer for name, layer in layers.items()}
    return added
