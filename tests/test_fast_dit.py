"""The tricks that make sampling fast change nothing but rounding. What needs a GPU is in test_gpu.py."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import scale_rae
from scale_rae import cuda_graphs, fast_blocks, fast_dit, fast_weights
from scale_rae.codes import PAD_TO
from scale_rae.compiling import CompilePolicy, compiled
from scale_rae.config import DiTConfig
from scale_rae.cuda_graphs import Captures, graph_memory
from scale_rae.dit import DiT, SwiGLU, attend
from scale_rae.errors import DeviceError, InputError
from scale_rae.fast_blocks import deferred_block, summed_block
from scale_rae.fast_dit import FastDiT
from scale_rae.fast_weights import pad_swiglu
from scale_rae.float8 import check_device, quantize
from scale_rae.footprint import flops
from scale_rae.options import SamplingOptions, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.quantization import Place, QuantizedLinear, product, quantize_weight
from scale_rae.sampling import LatentSampler, Trajectory
from tests.helpers.made_networks import made_dit
from tests.test_goldens import DRAW

CONFIG = DiTConfig(channels=24, tokens=16, condition_width=32, width=80, depth=4, heads=2)
KINDS = {
    "plain": CONFIG,
    "ddt": dataclasses.replace(CONFIG, encoder_depth=2),
    "wide": dataclasses.replace(CONFIG, encoder_depth=2, decoder_width=160, decoder_heads=4, wide=True),
}
TIMES = [0.9, 0.35, 0.35]


def made(kind: str = "plain") -> DiT:
    """A network of one of KINDS."""
    return made_dit(KINDS[kind])


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, CONFIG.channels, CONFIG.side, CONFIG.side, generator=generator)
    return x, torch.randn(batch, CONFIG.tokens, CONFIG.condition_width, generator=generator)


def reference(dit: DiT, x: Tensor, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional and null velocities by the plain network."""
    time = torch.full((len(x),), t)
    assert dit.null_condition is not None
    return dit(x, time, y), dit(x, time, dit.null_condition.expand_as(y))


def check(fast: FastDiT, exact: DiT, tolerance: float, compile: bool = False) -> None:
    x, y = inputs()
    with torch.inference_mode():
        conditional, null, both = fast.velocities(y, TIMES, guided=True, compile=compile)
        for t in TIMES[:2]:
            expected = reference(exact, x, t, y)
            for value, wanted in zip((conditional(x, t), null(x, t), *both(x, t)), (*expected, *expected), strict=True):
                assert value.shape == x.shape
                assert value.dtype == torch.float32
                assert float((value - wanted).norm() / wanted.norm()) <= tolerance


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tricks that are for CUDA alone, but work anywhere, run here."""
    monkeypatch.setattr(fast_dit, "check_quantize", lambda kind, device, dtype: None)


def with_cuda_weights(dit: DiT, **options: Any) -> FastDiT:
    """Padded, stacked and grouped, as a CUDA device would have it."""
    pad_swiglu(dit, PAD_TO)
    fast = FastDiT(dit, Speed("off", **options))
    fast.stacked = fast.stacked or fast_weights.StackedModulations(fast.layers)
    return fast


@pytest.mark.parametrize("kind", KINDS)
def test_precomputed_parts(kind: str) -> None:
    """Time embeddings and the null branch's modulations from before the steps; both branches in one batch."""
    check(FastDiT(made(kind), Speed("off")), made(kind), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", ["before", "null", "together"])
def test_switched_off(kind: str, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same velocities without each of what `test_precomputed_parts` has."""
    fast = FastDiT(made(kind), Speed("off", **{off: False}))
    check(fast, made(kind), 1e-5)
    calls: list[tuple[int, int]] = []
    evaluate = fast.evaluate

    def counted(parts: Any, *inputs: Any, **options: Any) -> torch.Tensor:
        calls.append((len(inputs[0]), len(inputs) + len(options)))
        return evaluate(parts, *inputs, **options)

    fast.evaluate = counted
    x, y = inputs()
    with torch.inference_mode():
        _, _, both = fast.velocities(y, TIMES, guided=True, compile=False)
        both(x, TIMES[0])
    expected = {"before": [(2, 4)], "null": [(4, 3)], "together": [(2, 3), (2, 3)]}
    assert calls == expected[off]  # (images, inputs; the fourth is the null branch's modulations)

    monkeypatch.setattr(fast_dit, "compiled", lambda function: function)
    with torch.inference_mode():
        fast.velocities(y, TIMES, guided=True, compile=True)[2](x, TIMES[0])
    assert fast.is_compiled(2, guided=True, prompts=2)
    assert not fast.is_compiled(3, guided=True, prompts=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"defer": False}, {"null": False}, {"together": False}, {"group": False}], ids=str
)
def test_images_name_their_prompts(kind: str, options: dict[str, Any]) -> None:
    """Images of prompts in any order, with a prompt that none of them is of; each prompt's modulations are computed once."""
    fast = with_cuda_weights(made(kind), **options)
    x, _ = inputs(5)
    y = inputs(3)[1]
    prompt_of = torch.tensor([1, 0, 1, 1, 0])
    read: list[int] = []
    for layer in fast.layers:
        layer.register_forward_hook(lambda layer, args, out: read.append(len(args[0])))
    fast.stacked = None  # so that the layers are called
    with torch.inference_mode():
        conditional, null, both = fast.velocities(y, TIMES, guided=True, compile=False, prompt_of=prompt_of)
        expected = reference(made(kind), x, 0.9, y[prompt_of])
        read.clear()
        values = [conditional(x, 0.9)]
        assert set(read) == {3}
        values += [null(x, 0.9), *both(x, 0.9)]
    for value, wanted in zip(values, (*expected, *expected), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"defer": False}, {"null": False}, {"together": False}], ids=str)
def test_images_of_one_prompt_share_its_modulations(kind: str, prompts: int, options: dict[str, Any]) -> None:
    fast = with_cuda_weights(made(kind), **options)
    x, _ = inputs(6)
    y = inputs(prompts)[1]
    read: list[int] = []
    for layer in fast.layers:
        layer.register_forward_hook(lambda layer, args, out: read.append(len(args[0])))
    fast.stacked = None  # so that the layers are called
    with torch.inference_mode():
        conditional, null, both = fast.velocities(y, TIMES, guided=True, compile=False)
        expected = reference(made(kind), x, 0.9, y.repeat_interleave(6 // prompts, dim=0))
        read.clear()
        values = [conditional(x, 0.9)]
        assert set(read) == {prompts}
        values += [null(x, 0.9), *both(x, 0.9)]
    for value, wanted in zip(values, (*expected, *expected), strict=True):
        assert float((value - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most_rows", [1, 40, 10000])
def test_padded_stacked_and_grouped(kind: str, most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_dit, "GROUP_ROWS", most_rows)
    dit = made(kind)
    check(with_cuda_weights(dit), made(kind), 1e-5)
    x, y = inputs()
    with torch.inference_mode():  # the network itself still works
        torch.testing.assert_close(dit(x, torch.tensor([0.5, 0.2]), y), made(kind)(x, torch.tensor([0.5, 0.2]), y))


@pytest.mark.parametrize("kind", KINDS)
def test_float8_is_near(kind: str, as_if_on_cuda: None) -> None:
    dit = made(kind)
    for name, parameter in dit.named_parameters():
        if "t_embedder" not in name and ".norm" not in name:
            parameter.data = parameter.data.bfloat16()
    check(FastDiT(dit, Speed("off", "fp8")), made(kind), 0.08)
    assert {m.kind for m in (dit.dit_blocks[0].attn.qkv, dit.dit_blocks[0].mlp.w3)} == {"fp8"}
    assert dit.final_layer.linear.weight.dtype == torch.bfloat16


def test_compiled_whole_and_once_for_each_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`fullgraph=True`: a part that cannot be compiled whole is an error. Blocks of one kind share their code.

    The graphs run as they are: a C++ compiler takes seconds for each, and tests/test_gpu.py has them compiled for a GPU.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    dit = made()
    with torch.inference_mode():
        fast = with_cuda_weights(dit)
        x, y = inputs()
        conditional, _, both = fast.velocities(y, TIMES, guided=True, compile=True)
        torch._dynamo.utils.counters.clear()
        values = [conditional(x, 0.9), *both(x, 0.9)]
        expected = reference(made(), x, 0.9, y)
    for value, wanted in zip(values, (expected[0], *expected), strict=True):
        assert float((value - wanted).norm() / wanted.norm()) <= 1e-5
    # One reading; block and final layer, guided or not.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    assert fast.is_compiled(2, guided=True, prompts=2)
    assert not fast.is_compiled(3, guided=True, prompts=3)


UNFIT = dataclasses.replace(CONFIG)  # to be told from CONFIG
FLASH, OWN = fast_blocks.attend_rotating, (lambda: "own")
CHOICES: list[tuple[dict[str, Any], bool, Any]] = [
    ({}, False, ("plain", OWN)),
    ({}, True, ("plain", OWN)),
    ({"defer": False}, False, summed_block),
    ({"kernels": False}, False, deferred_block),
    ({"attention": "flash"}, False, ("plain", FLASH)),
    ({"attention": "flash"}, True, deferred_block),  # PyTorch compiles it as well
    ({"attention": "own"}, False, ("plain", OWN)),
    ({"attention": "own"}, True, ("plain", OWN)),
    ({"quantize": "fp8"}, True, ("quantized", OWN)),
    ({"quantize": "fp8", "attention": "flash"}, True, ("quantized", FLASH)),
    ({"quantize": "fp8", "attention": "own"}, False, ("quantized", OWN)),
    ({"quantize": "fp8", "kernels": False}, True, deferred_block),
    ({"quantize": "int8"}, False, ("plain", OWN)),
    ({"quantize": "int8-products"}, True, ("quantized", OWN)),
]


@pytest.mark.parametrize(("options", "compile", "expected"), CHOICES)
@pytest.mark.parametrize("usable", [True, False], ids=["triton", "broken triton"])
def test_which_block_runs_on_cuda(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], compile: bool, expected: Any, usable: bool
) -> None:
    kernels = SimpleNamespace(
        attend_pairs=OWN,
        attention_fits=lambda config, dtype: dtype == torch.bfloat16 and config is not UNFIT,
        of_axis=lambda table: ("axis", table),
    )
    monkeypatch.setitem(sys.modules, "scale_rae.kernels", kernels)
    monkeypatch.setattr(scale_rae, "kernels", kernels, raising=False)
    monkeypatch.setattr(fast_dit, "runs_own_kernels", lambda device: usable and device.type == "cuda")
    monkeypatch.setattr(fast_dit, "own_kernels", lambda kind, device, dtype: usable and device.type == "cuda")
    names = {deferred_block: "plain", fast_blocks.quantized_block: "quantized"}
    monkeypatch.setattr(fast_dit, "with_attention", lambda block, attend: (names[block], attend))
    hopper, others = ("12.8", (9, 0)), (("12.8", (8, 0)), ("12.8", (10, 0)))

    def on(cuda: str | None, capability: tuple[int, int]) -> Any:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return fast_dit.choose_functions(Speed(few=False, **options), dit, compile).block

    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    dit: Any = SimpleNamespace(pos_embed=on_cuda, dtype=torch.bfloat16, config=CONFIG, rope_cos="cos", rope_sin="sin")
    ours = isinstance(expected, tuple)
    expected = expected if usable or not ours else deferred_block
    assert on(*hopper) == expected
    assert fast_dit.choose_functions(Speed(few=False, **options), dit, compile).cos == (
        ("axis", "cos") if ours and usable else "cos"
    )
    # PyTorch's attention: in a block of ours if float8 or the rotation is.
    flash = expected
    if ours and usable:
        flash = deferred_block if compile and expected[0] == "plain" else (expected[0], FLASH)
    for elsewhere in others:
        assert on(*elsewhere) == (expected if "attention" in options else flash)
    dit.config = UNFIT
    assert on(*hopper) == flash
    dit.config, dit.dtype = CONFIG, torch.float32
    assert on(*hopper) == flash
    dit.pos_embed = SimpleNamespace(device=torch.device("cpu"))
    assert not isinstance(fast_dit.choose_functions(Speed(few=False, **options), dit, compile).block, tuple)


@pytest.mark.parametrize("compile", [False, True])
def test_which_block_draws_few_images(monkeypatch: pytest.MonkeyPatch, compile: bool) -> None:
    """Hopper, our attention, bfloat16 or float8, widths that the kernels support, and few rows."""
    kernels = SimpleNamespace(attend_pairs=OWN, attention_fits=lambda config, dtype: True, of_axis=lambda table: table)
    few_images = SimpleNamespace(fits=lambda width, inner: (width, inner) == (CONFIG.width, 176))
    for name, module in (("kernels", kernels), ("few_images", few_images)):
        monkeypatch.setitem(sys.modules, f"scale_rae.{name}", module)
        monkeypatch.setattr(scale_rae, name, module, raising=False)
    monkeypatch.setattr(fast_dit, "runs_own_kernels", lambda device: True)
    monkeypatch.setattr(fast_dit, "own_kernels", lambda kind, device, dtype: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))

    def chosen(
        tokens: int = 16,
        inner: int = 176,
        dtype: torch.dtype = torch.bfloat16,
        rows: int = fast_dit.FEW_ROWS,
        **options: Any,
    ) -> bool:
        block = SimpleNamespace(mlp=SimpleNamespace(w3=SimpleNamespace(in_features=inner)))
        on_cuda = SimpleNamespace(device=torch.device("cuda"))
        dit: Any = SimpleNamespace(
            pos_embed=on_cuda,
            dtype=dtype,
            config=dataclasses.replace(CONFIG, tokens=tokens),
            rope_cos="cos",
            rope_sin="sin",
            dit_blocks=[block],
        )
        functions = fast_dit.choose_functions(Speed(**{"few": True, **options}), dit, compile)
        return functions.block_for(rows) is fast_blocks.few_block

    assert chosen()
    assert chosen(quantize="fp8")
    assert not chosen(rows=fast_dit.FEW_ROWS + 1)
    assert not chosen(inner=175)
    assert not chosen(tokens=9)
    assert not chosen(dtype=torch.float16)
    assert not chosen(few=False)
    assert not chosen(kernels=False)
    assert not chosen(attention="flash")
    for kind in ("int8", "int8-products", "nf4", "fp8-storage"):
        assert not chosen(quantize=kind)
    capability[:] = 8, 0
    assert not chosen(attention="own")


class PlainKernels:
    """few_images.py's operators, and those of kernels.py that `few_block` takes, in PyTorch's operations."""

    @staticmethod
    def few_normed(
        x: Tensor,
        values: Tensor,
        x_scale: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        gate: Tensor,
        null_gate: Tensor | None,
        shift: Tensor,
        factor: Tensor,
        null_shift: Tensor | None,
        null_factor: Tensor | None,
        weight: Tensor,
        eps: float,
        float8: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = fast_blocks.Parts(values, torch.zeros(()) if bias is None else bias, x_scale, scale)
        x = x + fast_blocks.spread(gate, null_gate, len(x)) * parts.finished(x.dtype)
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        normed = normed * (1 + fast_blocks.spread(factor, null_factor, len(x))) + fast_blocks.spread(
            shift, null_shift, len(x)
        )
        return (x, *quantize(normed)) if float8 else (x, normed, x.new_empty(0))

    @staticmethod
    def attend_pairs(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, early: bool) -> Tensor:
        return attend(qkv.float(), heads, cos, sin)

    @staticmethod
    def quantize_rows(x: Tensor, int8: bool, early: bool) -> tuple[Tensor, Tensor]:
        return quantize(x)

    @staticmethod
    def few_gated(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * value

    @staticmethod
    def few_gated_float8(x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(
            PlainKernels.few_gated(fast_blocks.Parts(x[None], bias, x_scale, scale).finished(torch.float32))
        )


@pytest.mark.parametrize("quantized", [None, "fp8"])
@pytest.mark.parametrize("kind", ["plain", "ddt"])
@pytest.mark.usefixtures("as_if_on_cuda")
def test_the_block_for_few_images_is_a_block(monkeypatch: pytest.MonkeyPatch, kind: str, quantized: Any) -> None:
    monkeypatch.setattr(fast_blocks, "_kernels", PlainKernels)
    dit = made(kind)
    pad_swiglu(dit, 64)
    fast = FastDiT(dit, Speed("off", quantized))
    monkeypatch.setattr(fast, "_eager", dataclasses.replace(fast._eager, few_block=fast_blocks.few_block))
    check(fast, made(kind), 0.08 if quantized else 1e-5)


def test_an_update_in_parts_is_their_sum() -> None:
    parts, x, modulation, bias = torch.randn(4, 2, 3, 5), torch.randn(2, 3, 5), torch.randn(1, 3, 30), torch.randn(5)
    by_token, by_channel = torch.rand(2, 3, 1), torch.rand(5, 1)
    whole = parts.sum(dim=0) * by_token * by_channel[:, 0] + bias
    for update, wanted in (
        (fast_blocks.Parts(parts, bias), parts.sum(dim=0) + bias),
        (fast_blocks.Parts(parts, bias, by_token, by_channel), whole),
    ):
        summed = fast_blocks.summed(fast_blocks.Deferred(x, update, modulation))
        torch.testing.assert_close(summed, fast_blocks.summed(fast_blocks.Deferred(x, wanted, modulation)))


@pytest.mark.parametrize("rows", [fast_blocks.SPLIT_ROWS, fast_blocks.SPLIT_ROWS + 2])
def test_a_split_product_is_the_linear(rows: int) -> None:
    x, weight, bias = torch.randn(2, rows // 2, 12), torch.randn(7, 12), torch.randn(7)
    parts = fast_blocks.split_product(x, weight, bias)
    assert len(parts.values) == (fast_blocks.SPLIT if rows <= fast_blocks.SPLIT_ROWS else 1)
    torch.testing.assert_close(parts.finished(torch.float32), torch.nn.functional.linear(x, weight, bias))


def test_a_solver_that_looks_elsewhere() -> None:
    """Times that were not announced are embedded when they are met."""
    x, y = inputs()
    with torch.inference_mode():
        _, _, both = FastDiT(made(), Speed("off")).velocities(y, [0.9], guided=True, compile=False)
        for value, wanted in zip(both(x, 0.123), reference(made(), x, 0.123, y), strict=True):
            assert float((value - wanted).norm() / wanted.norm()) <= 1e-5


def test_padding_adds_zeros_only() -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(40)
    x = torch.randn(3, 40)
    exact = mlp(x)
    pad_swiglu(mlp, 64)
    assert mlp.w3.weight.shape == (40, 128)  # from 106
    assert int((mlp.w3.weight == 0).sum()) == 40 * 22
    torch.testing.assert_close(mlp(x), exact)
    assert mlp.w12.weight.requires_grad
    before = mlp.w12.weight
    pad_swiglu(mlp, 64)
    assert mlp.w12.weight is before


def test_float8_by_rows_keeps_each_rows_largest_value() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 50, 1e4, 0])[:, None]
    values, scale = quantize(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 1)
    back = values.float() * scale
    assert float(((back - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)).max()) < 0.04
    assert torch.equal(back[4], torch.zeros(64))
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1))  # the largest of a row is exact


@pytest.mark.parametrize("rows", [(2, 5), (16,), (1, 1, 3)])
def test_float8_linear(rows: tuple[int, ...]) -> None:
    """Against the definition: both sides quantised by rows, the product exact, scales and bias put back."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(*rows, 64, generator=generator).bfloat16()
    linear = QuantizedLinear(quantize_weight("fp8", weight), bias.bfloat16())
    (xq, xs), (wq, ws) = quantize(x), quantize(weight)
    expected = (xq.float() * xs) @ (wq.float() * ws).t() + bias.bfloat16().float()
    assert linear(x).shape == (*rows, 48)
    torch.testing.assert_close(linear(x).float(), expected, rtol=1e-2, atol=2e-2)
    part = product(quantize(x), linear.weight.rows(slice(16, 32)), bias[16:32].bfloat16())
    torch.testing.assert_close(part, linear(x)[..., 16:32])


def test_float8_needs_its_shapes(as_if_on_cuda: None) -> None:
    with pytest.raises(
        InputError, match=r"quantize fp8: this network has a linear of 32 to 40 channels; .*multiples of 16"
    ):
        quantize_weight("fp8", torch.randn(40, 32))


def test_float8_needs_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"quantize fp8: needs a CUDA GPU .*not cpu"):
        ScaleRAE.from_pretrained("shapes", device="cpu", quantize="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(DeviceError, match=r"NVIDIA A100 has compute capability 8\.0; float8 needs 8\.9"):
        check_device(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(InputError, match=r"not torch.float16; use --dtype bfloat16"):
        check_device(torch.device("cuda"), torch.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "slow"}, "attention 'slow': use one of auto, flash, own"),
        ({"attention": "own", "kernels": False}, "attention 'own': needs kernels and defer"),
        ({"attention": "own", "defer": False}, "attention 'own': needs kernels and defer"),
    ],
)
def test_bad_speed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FastDiT(made(), Speed(**options))


@pytest.mark.parametrize(("name", "value"), [("compile", "maybe"), ("compile", ""), ("quantize", "int3")])
def test_bad_options(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{name} '{value}': use "):
        ScaleRAE.from_pretrained("shapes", device="cpu", **{name: value})


def test_the_graph_that_has_not_run_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Plain:
        def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
            made.append(len(inputs[0]))
            self.function = function

        def __call__(self, *inputs: Tensor) -> Tensor:
            return self.function(*inputs)

    monkeypatch.setattr(cuda_graphs, "Captured", Plain)
    captures = Captures(True, most=2)

    def run(size: int) -> None:
        assert torch.equal(captures.run(size, torch.neg, torch.ones(size)), -torch.ones(size))

    for size in (1, 2, 1, 2, 1, 3, 3, 1, 3, 2, 2):  # each is captured when it comes again
        run(size)
    assert made == [1, 2, 3, 2]  # 2 went for 3, as 1 had run since, and 1 for 2
    assert captures.keys == [3, 2]


def test_graphs_of_a_device_s_stream_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(stream_id=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    one = graph_memory(torch.device("cuda:0"))
    assert graph_memory(torch.device("cuda:0")) is one
    assert graph_memory(torch.device("cuda:1")) is not one
    stream = SimpleNamespace(stream_id=3)  # runs beside the first
    assert graph_memory(torch.device("cuda:0")) is not one


# --- when to compile, and memory --------------------------------------------------------------------------------------


PUBLISHED = DiTConfig(channels=1152, tokens=256, condition_width=2048, width=2048, depth=32, heads=32)


def test_auto_compiles_when_it_pays() -> None:
    policy = CompilePolicy("auto", flops(PUBLISHED), possible=True)

    def compiles(images: int, prompts: int, evaluations: int = 49, is_compiled: bool = False) -> bool:
        return policy.compiles(images, prompts, evaluations, is_compiled)

    policy.expect(1)
    assert not compiles(1, 1)
    policy.expect(553 * 8)
    assert compiles(8, 8)
    assert not compiles(8, 8, evaluations=1)  # too little work
    policy.expect(20)  # the last ones of a run
    assert not compiles(8, 8)
    assert compiles(8, 8, is_compiled=True)
    for _ in range(200):  # one by one, and nobody said how many
        policy.count(5, 5)
    assert compiles(5, 5)
    assert not compiles(5, 1)  # not for as many prompts
    for mode, expected in (("on", True), ("off", False)):
        assert policy.with_choice(mode).compiles(1, 1, 49, is_compiled=False) is expected
    assert compiles(5, 5)
    policy.possible = False
    assert not compiles(5, 5)


def test_small_models_are_not_compiled_for_little() -> None:
    bundled = scale_rae.load("shapes", device="cpu")
    for config, pays in ((PUBLISHED, True), (bundled.config.dit, False)):
        policy = CompilePolicy("auto", flops(config), possible=True)
        policy.expect(1000)
        assert policy.compiles(8, 8, 49, is_compiled=False) is pays
    assert bundled.sampler.policy.operations == flops(bundled.config.dit)
    assert not bundled.sampler.policy.possible


@pytest.fixture
def siglip(models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch) -> ScaleRAE:
    """A model that has drawn nothing yet."""
    model = models["siglip"]
    monkeypatch.setattr(model.sampler, "policy", CompilePolicy("auto", 1.0, possible=False))
    return model


def test_what_is_drawn_is_counted(siglip: ScaleRAE) -> None:
    siglip.expect(10)
    siglip.generate(DRAW, num_images=5, steps=2, batch_size=3, decode=False)
    assert siglip.sampler.policy.expected == 5
    assert siglip.sampler.policy.drawn == {(3, 1): 3, (2, 1): 2}
    assert siglip.with_speed(Speed("on")).sampler.policy.expected == 5


def test_the_policy_hears_of_sizes_that_are_compiled(siglip: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def compiles(*batch: object) -> bool:
        asked.append(batch)
        return False

    def is_compiled(batch: int, guided: bool, prompts: int) -> bool:
        return (batch, guided, prompts) == (2, True, 1)

    monkeypatch.setattr(siglip.sampler.policy, "compiles", compiles)
    monkeypatch.setattr(siglip.sampler.fast_dit, "is_compiled", is_compiled)
    for images, guidance in ((2, 3.0), (2, 1.0), (1, 3.0)):
        siglip.generate(DRAW, num_images=images, steps=3, guidance=guidance, decode=False)
    assert asked == [(2, 1, 3, True), (2, 1, 3, False), (1, 1, 3, False)]


@pytest.mark.parametrize(
    ("prompts", "images", "conditions"),
    [
        ([0] * 4 + [1] * 4, 8, 2),
        ([0, 0, 0, 1, 1], 6, 3),
        ([0, 1, 1, 1, 1, 1, 1, 1], 8, 2),
        ([0, 1, 2, 0], 4, 4),
        ([0], 1, 1),
    ],
)
def test_batches_on_their_way_have_few_sizes(
    siglip: ScaleRAE, monkeypatch: pytest.MonkeyPatch, prompts: list[int], images: int, conditions: int
) -> None:
    """As on CUDA: images and prompts are padded to few numbers, and each image has the latent that it has alone."""
    condition = siglip.reply([DRAW])[0].condition
    assert condition is not None
    made = [condition * factor for factor in (1.0, 0.5, 0.0)]
    options = SamplingOptions(steps=3)
    begun = [Trajectory(made[p], seed) for seed, p in enumerate(prompts)]
    alone = [siglip.sample([t.condition], [t.seed], options)[0] for t in begun]
    ran: list[tuple[int, int]] = []
    velocities = siglip.sampler.fast_dit.velocities

    def counted(condition: Tensor, *args: Any) -> Any:
        functions = velocities(condition, *args)
        return lambda x, t: (ran.append((len(x), len(condition))), functions[0](x, t))[1], *functions[1:]

    monkeypatch.setattr(siglip.sampler.fast_dit, "velocities", counted)
    monkeypatch.setattr(LatentSampler, "has_few_sizes", True)
    done = siglip.advance(begun, 3, options)
    assert set(ran) == {(images, conditions)}
    assert len(done) == len(begun)
    for trajectory, expected in zip(done, alone, strict=True):
        assert trajectory.latent is not None
        torch.testing.assert_close(trajectory.latent, expected, atol=1e-4, rtol=1e-4)


def test_operations_of_the_published_network() -> None:
    """61 TFLOP an image, as measured by others (issue's figure) and as counted here from the shapes of its linears."""
    assert flops(PUBLISHED) * 49 == pytest.approx(61.8e12, rel=1e-2)
    for kind, config in KINDS.items():
        named = [(n, m) for n, m in made(kind).named_modules() if isinstance(m, torch.nn.Linear)]
        products = sum(m.weight.numel() for n, m in named if "t_embedder" not in n and n != "s_projector")
        embedders = sum(m.weight.numel() for m in made(kind).modules() if isinstance(m, torch.nn.Conv2d))
        attention = sum(2 * config.tokens * b.attn.proj.in_features for b in made(kind).dit_blocks)
        assert flops(config) == 2 * config.tokens * (products + embedders + attention)


def test_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiled(lambda x: x)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "scale_rae" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    compiled(lambda x: x)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/else"


@pytest.mark.parametrize("kind", KINDS)
def test_modulations_loaded_into_one_matrix_are_fused_as_they_lie(kind: str) -> None:
    """Else they would be there twice for a moment, which was the peak of loading."""
    plain = made(kind)
    with torch.device("meta"):
        dit = DiT(KINDS[kind])
    cpu = torch.device("cpu")
    sinks = fast_weights.stack_modulations(dit, Place(cpu, cpu, torch.float32))
    for name, sink in sinks.items():
        weight = plain.get_parameter(name)
        assert sink.shape == weight.shape
        for start in range(0, len(weight), 100):
            sink.store(start, weight[start : start + 100])
    dit.load_state_dict({n: v for n, v in plain.state_dict().items() if n not in sinks}, strict=False, assign=True)
    layers: list[Any] = [block.adaLN_modulation[1] for block in list(dit.dit_blocks)[: dit.encoder_depth]]
    place = layers[0].weight.data_ptr()
    stacked = fast_weights.StackedModulations(layers)
    assert isinstance(stacked.weight, Tensor)
    assert stacked.weight.data_ptr() == layers[0].weight.data_ptr() == place
    assert stacked.weight._base is None, "else its memory stays when weights move"
    for name in sinks:
        assert torch.equal(dit.get_parameter(name), plain.get_parameter(name))
    assert fast_weights.stacks_modulations(Speed(), torch.device("cuda"))
    assert not fast_weights.stacks_modulations(Speed(), cpu)


def test_kernels_for_few_images_are_for_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 they gain nothing; whoever wants them there asks."""
    attend = object()
    kernels = SimpleNamespace(attend_pairs=attend, of_axis=lambda table: table)
    monkeypatch.setitem(sys.modules, "scale_rae.kernels", kernels)
    monkeypatch.setattr(scale_rae, "kernels", kernels, raising=False)
    for name in ("runs_own_kernels", "own_kernels", "_few_block_fits"):
        monkeypatch.setattr(fast_dit, name, lambda *_: True)
    monkeypatch.setattr(fast_dit, "_choose_attention", lambda speed, dit: attend)
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    dit: Any = SimpleNamespace(pos_embed=on_cuda, dtype=torch.bfloat16, config=CONFIG, rope_cos=None, rope_sin=None)
    for kind, few, used in (("fp8", None, True), ("fp8", False, False), (None, None, False), (None, True, True)):
        speed = Speed(quantize=kind, few=few)
        assert (fast_dit.choose_functions(speed, dit, False).few_block is not None) == used
