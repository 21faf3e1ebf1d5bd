"""What only a GPU can show of quantised products and of the kernels for few images: the plain forms' results, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_rae.dit import NORM_EPS
from scale_rae.fast_blocks import Parts
from scale_rae.float8 import quantize
from scale_rae.quantization import QuantizedWeight, linear, own_kernels, quantize_tokens, quantize_weight

pytestmark = pytest.mark.gpu

# Outputs and inputs: whole tiles and not, few and many.
SIZES = [(2048, 1536), (72, 192), (176, 64), (9216, 448)]
KINDS = ["int8", "fp8-storage", "nf4", "int8-products"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + len(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def off_by(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def own(kind: str, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    if not own_kernels(kind, weight.device, dtype):
        pytest.skip(f"no kernels for {kind} on this GPU")
    return quantize_weight(kind, weight)._replace(own=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_is_that_of_the_plain_form(kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = own(kind, random(*size) / size[1] ** 0.5, dtype)
    plain = weight._replace(own=False)
    for rows in (1, 5, 33, 64, 80, 700):
        x = 2 * random(rows, size[1], dtype=dtype, seed=rows)
        exact = F.linear(x.double(), plain.dequantize(torch.float32).double())
        if kind == "int8-products":
            tokens = quantize_tokens(kind, x)
            exact = F.linear(tokens.values.double() * tokens.scale, plain.dequantize(torch.float32).double())
        for bias in (None, random(size[0], dtype=dtype, seed=7)):
            wanted = exact if bias is None else exact + bias.double()
            value = linear(x[None], weight, bias)
            assert value.shape == (1, rows, size[0])
            assert value.dtype == dtype
            assert off_by(value[0], wanted) <= (4e-3 if dtype == torch.bfloat16 else 2e-3), (rows, bias is None)


@pytest.mark.parametrize("kind", ["int8", "fp8-storage", "nf4"])
def test_dequantised_weights_are_those_of_the_plain_form(kind: str) -> None:
    from scale_rae import products

    weight = own(kind, random(72, 448), torch.bfloat16)
    value = products.dequantized(weight.values, weight.scale, torch.bfloat16)
    torch.testing.assert_close(value, weight.dequantize(torch.bfloat16), rtol=1 / 128, atol=0)


@pytest.mark.parametrize("width", [160, 2048, 5504])
def test_kernels_quantise_to_int8(width: int) -> None:
    from scale_rae import kernels

    x = 3 * random(2, 5, width)
    pairs = random(2, 5, 2 * width)
    gate, value = pairs.float().chunk(2, dim=-1)
    for (values, scale), exact in (
        (kernels.quantize_rows(x, True), x.float()),
        (kernels.quantize_swiglu(pairs, True), F.silu(gate) * value),
    ):
        best = quantize_tokens("int8-products", exact)
        assert values.dtype == torch.int8
        torch.testing.assert_close(scale, best.scale, rtol=1e-5, atol=0)
        assert off_by(values.float() * scale, exact) <= 1.01 * off_by(best.values.float() * best.scale, exact)
    x[0, 1, 7] = torch.nan
    for values, scale in (kernels.quantize_rows(x, True), kernels.quantize_swiglu(torch.cat([x, x], dim=-1), True)):
        assert (values.float() * scale).isnan().any(dim=-1).sum() == 1, "a row with NaN stays one"


# --- few images ------------------------------------------------------------------------------------------------------


def few_images():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels for few images are for Hopper")
    from scale_rae import few_images

    return few_images


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("float8", [False, True])
def test_norm_of_a_sum_in_parts(float8: bool, guided: bool, each: int) -> None:
    few = few_images()
    width, images = 176, (2 if guided else 1) * each
    x, bias = random(images, 5, width), random(width)
    unfinished = Parts(random(3, images, 5, width), bias)
    if float8:
        by_token, by_channel = random(images, 5, 1, dtype=torch.float32) / 99, random(width, 1, dtype=torch.float32)
        unfinished = Parts(100 * random(1, images, 5, width), bias, by_token, by_channel)
    modulation, null, weight = random(1, 5, 6 * width), random(6 * width), random(width, dtype=torch.float32)
    v, n = modulation.chunk(6, dim=-1), null.chunk(6)
    nulls = n if guided else (None,) * 6
    parts = (unfinished.values, unfinished.x_scale, unfinished.scale, bias)
    vectors = (v[2], nulls[2], v[0], v[1], nulls[0], nulls[1])
    got, values, scale = few.few_normed(x, *parts, *vectors, weight, NORM_EPS, float8)
    own_modulation = modulation.double().expand(images, -1, -1).clone()
    if guided:
        own_modulation[images // 2 :] = null.double()
    shift, factor, gate, *_ = own_modulation.chunk(6, dim=-1)
    assert off_by(got, x.double() + gate * unfinished.finished(torch.float64)) <= 3e-3
    exact = F.rms_norm(got.double(), (width,), weight.double(), NORM_EPS) * (1 + factor) + shift
    best = quantize(exact.float())
    if float8:
        assert off_by(values.float() * scale, exact) <= 1.05 * off_by(best.values.float() * best.scale, exact)
    else:
        assert off_by(values, exact) <= 3e-3


@pytest.mark.parametrize("width", [160, 5504, 8192])
def test_swiglu_of_few_rows(width: int) -> None:
    few = few_images()
    pairs = random(2, 5, 2 * width)
    gate, value = pairs.double().chunk(2, dim=-1)
    assert off_by(few.few_gated(pairs), F.silu(gate) * value) <= 3e-3
    by_token, by_channel = random(2, 5, 1, dtype=torch.float32) / 50, random(2 * width, 1, dtype=torch.float32)
    unfinished = Parts(50 * pairs[None], random(2 * width), by_token, by_channel)
    gate, value = unfinished.finished(torch.float64).chunk(2, dim=-1)
    exact = F.silu(gate) * value
    best = quantize(exact.float())
    values, scale = few.few_gated_float8(unfinished.values[0], by_token, by_channel, unfinished.bias)
    assert off_by(values.float() * scale, exact) <= 1.05 * off_by(best.values.float() * best.scale, exact)


def test_kernels_that_start_early_keep_their_order() -> None:
    """A chain of products and kernels that are launched before these end, replayed often: always the same bits."""
    few = few_images()
    from scale_rae import kernels
    from scale_rae.cuda_graphs import graph_memory

    weights = [random(6144, 2048) / 45, random(2048, 3072) / 55]
    x = random(1, 256, 2048)

    def chain() -> Tensor:
        h = x
        for _ in range(8):
            h = few.few_gated(F.linear(h, weights[0]))
            h = F.linear(h, weights[1])
            h = kernels.quantize_rows(h, False, True)[0].to(torch.bfloat16) / 448
        return h

    plain = chain()
    graph, out = graph_memory(x.device).capture(chain)
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, plain)
