"""What only a GPU can show of quantised products and of the kernels for few images: the plain forms' results, up to rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scale_rae.dit import NORM_EPS
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


def few_images():  # type: ignore[no-untyped-def]
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels for few images are for Hopper")
    from scale_rae import few_images

    return few_images


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(256, 6144, 2048), (512, 2048, 5504), (48, 352, 176), (300, 96, 64)]
)
def test_product_for_few_rows(rows: int, outputs: int, inputs: int, float8: bool) -> None:
    few = few_images()
    x, w, bias = random(2, rows // 2, inputs), random(outputs, inputs) / inputs**0.5, random(outputs)
    q, qw = quantize(x), quantize(w)
    if float8:
        exact = F.linear(q.values.double() * q.scale, qw.values.double() * qw.scale, bias.double())
    else:
        exact = F.linear(x.double(), w.double(), bias.double())
    arguments = (q.values, q.scale, qw.values, qw.scale, bias) if float8 else (x, None, w, None, bias)
    gate, value = exact.chunk(2, dim=-1)
    for end, wanted in (("store", exact), ("parts", exact), ("swiglu", F.silu(gate) * value)):
        got = few.few_product(*arguments, end)
        got = got.sum(dim=0) if end == "parts" else got
        assert got.shape == wanted.shape
        assert off_by(got, wanted) <= 5e-3, end


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("float8", [False, True])
def test_norm_of_a_sum_in_parts(float8: bool, guided: bool, each: int) -> None:
    few = few_images()
    width, images = 176, (2 if guided else 1) * each
    x, parts = random(images, 5, width), random(4, images, 5, width, dtype=torch.float32)
    modulation, null, weight = random(1, 5, 6 * width), random(6 * width), random(width, dtype=torch.float32)
    v, n = modulation.chunk(6, dim=-1), null.chunk(6)
    nulls = n if guided else (None,) * 6
    got, values, scale = few.few_normed(
        x, parts, v[2], nulls[2], v[0], v[1], nulls[0], nulls[1], weight, NORM_EPS, float8
    )
    own_modulation = modulation.double().expand(images, -1, -1).clone()
    if guided:
        own_modulation[images // 2 :] = null.double()
    shift, factor, gate, *_ = own_modulation.chunk(6, dim=-1)
    summed = x.double() + gate * parts.sum(dim=0).double()
    assert off_by(got, summed) <= 3e-3
    exact = F.rms_norm(got.double(), (width,), weight.double(), NORM_EPS) * (1 + factor) + shift
    best = quantize(exact.float())
    if float8:
        assert off_by(values.float() * scale, exact) <= 1.05 * off_by(best.values.float() * best.scale, exact)
    else:
        assert off_by(values, exact) <= 3e-3


def test_kernels_that_start_early_keep_their_order() -> None:
    """A chain of kernels, each launched before the last ends, replayed often: always the same bits."""
    few = few_images()
    from scale_rae.cuda_graphs import graph_memory

    widths = (2048, 6144, 2048, 11008)
    weights = [random(n, k) / k**0.5 for k, n in pairwise(widths)]
    biases = [random(len(w)) for w in weights]
    x = random(1, 256, 2048)

    def chain() -> Tensor:
        h = x
        for w, bias in zip(weights, biases, strict=True):
            h = few.few_product(h, None, w, None, bias, "store")
            h = few.few_rows(h)[0].to(torch.bfloat16) / 448
        return h

    graph, out = graph_memory(x.device).capture(chain)
    graph.replay()
    first = out.clone()
    assert first.isfinite().all()
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, first)
