"""Quantised weights: their forms and products, networks that hold them, and loading straight into them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_rae import float8, quantization
from scale_rae.config import DiTConfig, load_config
from scale_rae.decoder import PixelDecoder, denormalise
from scale_rae.errors import CheckpointError, DeviceError, InputError
from scale_rae.fast_dit import FastDiT
from scale_rae.fast_weights import mean_read, quantize_blocks
from scale_rae.hub import find
from scale_rae.language import LanguageModel
from scale_rae.loading import load_decoder, load_networks
from scale_rae.options import LANGUAGE_KINDS, QUANTIZE, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.quantization import (
    BLOCK,
    NF4,
    Place,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    check_quantize,
    joined,
    joined_rows,
    linear,
    product,
    quantize_tokens,
    quantize_weight,
    room,
    store,
)
from tests.helpers.made_networks import made_dit

CPU = torch.device("cpu")
HERE = Place(CPU, CPU, torch.float32)
DRAW = "Can you generate a photo of a cat on a windowsill?"
# Error of a row's weights, relative to the row's largest value: half of the widest gap between two values.
WORST = {
    "int8": 0.5 / 127,
    "int8-products": 0.5 / 127,
    "fp8": 16 / 448,
    "fp8-storage": 16 / 448,
    "nf4": (NF4[1] - NF4[0]) / 2 + 0.01,
}
USUAL = {"int8": 0.007, "int8-products": 0.007, "fp8": 0.03, "fp8-storage": 0.03, "nf4": 0.09}  # RMS, normal weights


def weights(rows: int = 48, columns: int = 128, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them of zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-6, 3, rows)[:, None]
    made = torch.randn(rows, columns, generator=generator) * size
    made[rows // 2] = 0
    return made


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype and bits."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def dequantized(module: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
    return module.weight.dequantize(dtype)


class Watch(TorchDispatchMode):
    """Keeps the largest number of float32 elements that one operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32 and not made.is_meta:
            self.largest = max(self.largest, made.numel())
        return made


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZE)
def test_a_weight_comes_back_within_the_error_of_its_form(kind: str) -> None:
    weight = weights()
    made = quantize_weight(kind, weight)
    assert made.size == weight.shape
    back = made.dequantize(torch.float32)
    assert float(((back - weight).abs() / weight.abs().amax(1, keepdim=True).clamp(min=1e-20)).max()) <= WORST[kind]
    assert torch.equal(back[24], torch.zeros(128))
    error = (back - weight).norm(dim=1) / weight.norm(dim=1).clamp(min=1e-20)
    assert float(error.max()) <= 1.5 * USUAL[kind]
    assert 0.8 * USUAL[kind] <= float(error.mean()) <= USUAL[kind]
    assert torch.equal(made.dequantize(torch.bfloat16), back.bfloat16())
    assert made.nbytes == weight.numel() * (0.5 if kind == "nf4" else 1) + made.scale.nbytes


def test_nf4_layout() -> None:
    """Byte j of a block: the code of column j low, that of column j + 32 high; a scale per block."""
    codes = torch.randint(0, 16, (3, 2, BLOCK), generator=torch.Generator().manual_seed(1))
    codes[..., 0] = 15  # so that the largest value of a block is 1 times its scale
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0], [0.25, 8.0]])
    weight = torch.tensor(NF4)[codes] * scale[..., None]
    made = quantize_weight("nf4", weight.flatten(1))
    assert torch.equal(made.dequantize(torch.float32), weight.flatten(1))
    assert made.scale.dtype == torch.bfloat16
    assert torch.equal(made.scale.float(), scale)
    assert torch.equal(made.values.view(3, 2, 32).long(), codes[..., :32] + 16 * codes[..., 32:])


@pytest.mark.parametrize("kind", ["fp8-storage", "nf4"])
def test_looking_values_up_gives_what_converting_gives(kind: str) -> None:
    """Every byte, in rows that are not next to each other, and in more dimensions."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    if kind == "nf4":
        values, scale = codes, torch.rand(3, 8).bfloat16()
        halves = torch.stack([codes.view(3, 8, 32) % 16, codes.view(3, 8, 32) // 16], dim=2)
        expected = torch.tensor(NF4)[halves.long()] * scale.float()[..., None, None]
    else:
        codes[codes % 128 == 127] = 0  # not a number
        values, scale = codes.view(float8.FLOAT8), torch.rand(3, 1)
        expected = values.float() * scale
    weight = QuantizedWeight(kind, values, scale)
    assert torch.equal(weight.dequantize(torch.float32), expected.view(3, -1))
    assert torch.equal(weight.rows(slice(0, 3, 2)).dequantize(torch.float32), expected.view(3, -1)[::2])
    ids = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(weight.rows(ids).dequantize(torch.float32), expected.view(3, -1)[ids])


def test_nf4_scales_are_chosen() -> None:
    """The error is smaller than with each block's largest value as its scale, in every block."""
    blocks = torch.randn(200, BLOCK, generator=torch.Generator().manual_seed(2))
    scale = blocks.abs().amax(1, keepdim=True).bfloat16().float()
    values = torch.tensor(NF4)
    nearest = values[((blocks / scale)[..., None] - values).abs().argmin(-1)] * scale
    made = quantize_weight("nf4", blocks)
    error, plain = ((w - blocks).square().sum(1) for w in (made.dequantize(torch.float32), nearest))
    assert float(error.sum() / plain.sum()) < 0.9
    back = made.dequantize(torch.float32)
    torch.testing.assert_close((back * blocks).sum(1), blocks.square().sum(1), rtol=5e-3, atol=0)  # no shorter rows
    assert bool((made.scale < 0).any())


def test_rows_are_quantised_some_at_a_time() -> None:
    """A weight of more than one chunk has the rows that it has in parts."""
    weight = weights(1600, 64)
    for kind in QUANTIZE:
        whole = quantize_weight(kind, weight)
        parts = joined([quantize_weight(kind, part) for part in torch.split(weight, 720)])
        assert same(whole.values, parts.values)
        assert same(whole.scale, parts.scale)


def test_room_is_joined_without_copying() -> None:
    one, two, three = room("nf4", [16, 8, 24], 128, CPU)
    whole = joined([one, two, three])
    assert whole.size == (48, 128)
    assert (whole.values.data_ptr(), whole.scale.data_ptr()) == (one.values.data_ptr(), one.scale.data_ptr())
    assert whole.values[16:24].data_ptr() == two.values.data_ptr()
    assert torch.equal(whole.dequantize(torch.float32), torch.zeros(48, 128))
    assert joined([one, *room("nf4", [0], 128, CPU), two]).values.data_ptr() == one.values.data_ptr()
    for parts in ([two, one], [one, three], [one, quantize_weight("nf4", weights())]):
        copy = joined(parts)
        assert copy.values.data_ptr() not in {p.values.data_ptr() for p in parts}
        assert torch.equal(copy.values, torch.cat([p.values for p in parts]))


def test_columns_that_are_missing_are_zeros() -> None:
    weight = weights(16, 100)
    for kind in QUANTIZE:
        (target,) = room(kind, [16], 128, CPU)
        store(target, weight)
        padded = quantize_weight(kind, F.pad(weight, (0, 28)))
        assert same(target.values, padded.values)
        assert same(target.scale, padded.scale)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "fp8-storage", "nf4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_products_of_stored_weights(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Against the product in float64 with the dequantised weight."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 128, generator=generator) / 10
    bias = torch.randn(40, generator=generator).to(dtype)
    made = quantize_weight(kind, weight)
    for shape in ((1,), (2, 5), (1, 1, 3)):
        x = torch.randn(*shape, 128, generator=generator).to(dtype)
        for b in (bias, None):
            expected = F.linear(x.double(), made.dequantize(torch.float64), None if b is None else b.double())
            got = linear(x, made, b)
            assert (got.dtype, got.shape) == (dtype, (*shape, 40))
            assert float((got - expected).norm() / expected.norm()) <= tolerance
    assert torch.equal(linear(x, weight.to(dtype), bias), F.linear(x, weight.to(dtype), bias))


@pytest.mark.parametrize("kind", ["int8-products", "fp8"])
@pytest.mark.parametrize("shape", [(2, 5), (1,), (40,)])
def test_products_of_quantised_tokens(kind: str, shape: tuple[int, ...]) -> None:
    """Against the definition: tokens and weight quantised by rows, then multiplied exactly."""
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator).bfloat16()
    x = (torch.randn(*shape, 64, generator=generator) * torch.logspace(-3, 2, shape[-1])[:, None]).bfloat16()
    made = quantize_weight(kind, weight)
    tokens = quantize_tokens(kind, x)
    assert tokens.scale.shape == (*shape, 1)
    exact = (tokens.values.double() * tokens.scale) @ made.dequantize(torch.float64).t()
    for expected, b in ((exact, None), (exact + bias.double(), bias)):
        got = made.linear(x, b)
        assert (got.dtype, got.shape) == (torch.bfloat16, (*shape, 48))
        torch.testing.assert_close(got.double(), expected, rtol=8e-3, atol=1e-4)
        assert torch.equal(got, product(tokens, made, b))
    part = product(tokens, made.rows(slice(16, 32)), bias[16:32])
    assert torch.equal(part, made.linear(x, bias)[..., 16:32])
    plain = F.linear(x.double(), weight.double())
    assert float((exact - plain).norm() / plain.norm()) <= (0.02 if kind == "int8-products" else 0.06)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_large_weights_are_dequantised_some_rows_at_a_time(kind: str) -> None:
    """So that a head of 150,000 rows needs little memory beside itself."""
    made = quantize_weight(kind, weights(2**17 + 40, 64))
    x, bias = torch.randn(2, 64, generator=torch.Generator().manual_seed(6)), torch.ones(len(made.values))
    with Watch() as watch:
        got = made.linear(x, bias)
    assert watch.largest <= 1 << 23
    expected = F.linear(x.double(), made.dequantize(torch.float64), bias.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-2)  # rows are up to 1000 large


def test_a_quantised_embedding_looks_up_dequantised_rows() -> None:
    table = quantize_weight("int8", weights(50, 64))
    embedding = QuantizedEmbedding(table, torch.bfloat16)
    for ids in (torch.tensor([3, 49, 3]), torch.tensor([[0, 1], [2, 24]])):
        assert torch.equal(embedding(ids), F.embedding(ids, table.dequantize(torch.bfloat16)))


def test_our_kernels_take_over_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights remember it from when they were made; their rows and their whole do, too."""
    monkeypatch.setattr(quantization, "own_kernels", lambda kind, device, dtype: True)
    one, two = HERE.room("nf4", [8, 8], 64)
    assert joined([one, two]).rows(slice(4)).own
    assert QuantizedLinear(one, None).weight.own


# --- networks --------------------------------------------------------------------------------------------------------

CONFIG = DiTConfig(channels=24, tokens=16, condition_width=64, width=64, depth=4, heads=2)
KINDS = {
    "plain": CONFIG,
    "unpadded": dataclasses.replace(CONFIG, width=192),
    "ddt": dataclasses.replace(CONFIG, encoder_depth=2),
    "wide": dataclasses.replace(CONFIG, encoder_depth=2, decoder_width=128, decoder_heads=4, wide=True),
}


@pytest.mark.parametrize("network", KINDS)
@pytest.mark.parametrize("kind", [k for k in QUANTIZE if k != "fp8"])
def test_dit(network: str, kind: str) -> None:
    """A quantised network equals the plain one with its dequantised weights, padding apart, and is near the exact one."""
    exact, same, dit = (made_dit(KINDS[network]) for _ in range(3))
    fast = FastDiT(dit, Speed("off", kind))
    inner = same.dit_blocks[0].mlp.w3.in_features
    padded = dit.dit_blocks[0].mlp.w3.in_features
    assert (inner, padded) == ((512, 512) if network == "unpadded" else (170, 192))
    for mine, theirs in zip(dit.dit_blocks, same.dit_blocks, strict=True):
        for name, plain in theirs.named_modules():
            if isinstance(plain, nn.Linear):
                module = mine.get_submodule(name)
                value, bias = dequantized(module, torch.float32), module.bias
                if name == "mlp.w12":
                    half = plain.out_features // 2
                    value, bias = (t.view(2, -1, *t.shape[1:])[:, :half].flatten(0, 1) for t in (value, bias))
                if kind == "nf4" and name == "adaLN_modulation.1" and mine in list(dit.dit_blocks[: dit.encoder_depth]):
                    lost = (plain.weight - value) @ mean_read(same.t_embedder, same.null_condition)
                    torch.testing.assert_close(bias - plain.bias, lost, atol=1e-6, rtol=1e-4)
                    assert float(lost.norm()) > 0.005 * float(plain.bias.norm())
                    plain.bias.copy_(bias)
                assert torch.equal(bias, plain.bias)
                plain.weight.copy_(value[:, : plain.in_features])
    blocks: list[Any] = list(dit.dit_blocks)
    int8 = "int8" if kind == "nf4" else kind
    assert {block.adaLN_modulation[1].kind for block in blocks} == {kind}
    assert {linear.kind for block in blocks for linear in (block.attn.qkv, block.attn.proj)} == {int8}
    assert [(block.mlp.w12.kind, block.mlp.w3.kind) for block in blocks] == [(k, k) for k in (int8, kind, int8, int8)]
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 24, 4, 4, generator=generator), torch.randn(2, 16, 64, generator=generator)
    tolerance = 2e-2 if kind == "int8-products" else 1e-5
    near = {"int8": 0.02, "int8-products": 0.03, "fp8-storage": 0.06, "nf4": 0.15}[kind]
    with torch.inference_mode():
        conditional, null, both = fast.velocities(y, [0.9], guided=True, compile=False)
        time = torch.full((2,), 0.9)
        assert dit.null_condition is not None
        for condition, values in ((y, (conditional(x, 0.9), both(x, 0.9)[0])), (None, (null(x, 0.9), both(x, 0.9)[1]))):
            condition = dit.null_condition.expand_as(y) if condition is None else condition
            expected, unquantised = same(x, time, condition), exact(x, time, condition)
            for value in (*values, dit(x, time, condition)):
                assert float((value - expected).norm() / expected.norm()) <= tolerance
                assert 1e-4 < float((value - unquantised).norm() / unquantised.norm()) <= near


@pytest.mark.parametrize("kind", ["int8", "fp8-storage", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model(kind: str, tied: bool, bundled: ScaleRAE) -> None:
    """Hidden states and tokens' scores equal those of the plain network with the dequantised weights."""
    config = dataclasses.replace(bundled.config, tied_embeddings=tied)

    def made() -> LanguageModel:
        language = LanguageModel(config)
        language.load_state_dict(bundled.language.state_dict(), strict=True)
        if tied:
            language.lm_head.weight = language.model.embed_tokens.weight
        else:
            language.lm_head.weight = nn.Parameter(language.lm_head.weight.flip(0))
        return language.requires_grad_(False).eval()

    language, same = made(), made()
    language.quantize(kind, HERE)
    language.fuse()
    for name, plain in same.named_modules():
        if isinstance(plain, nn.Linear | nn.Embedding) and "projector" not in name:
            plain.weight.copy_(dequantized(language.get_submodule(name), torch.float32))
    rows, layer = "int8" if kind == "nf4" else kind, language.model.layers[0]
    assert {language.lm_head.kind, language.model.embed_tokens.kind, layer.self_attn.q_proj.kind} == {rows}
    assert {layer.mlp.gate_proj.kind, layer.mlp.down_proj.kind} == {kind}
    assert (language.lm_head.values.data_ptr() == language.model.embed_tokens.values.data_ptr()) == tied
    ids = bundled.tokenizer.chat(DRAW)
    with torch.inference_mode():
        hidden, scores = [], []
        for network in (language, same, bundled.language):
            with network.cache(1, 64) as cache:
                hidden.append(cache.extend([network.tokens(ids)])[0])
            scores.append(network.confidence_and_loss(hidden[-1], ids)[1])
    assert language.network() is language.network()  # nothing is copied
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    difference = float((hidden[0] - hidden[2]).norm() / hidden[2].norm())
    assert 1e-3 < difference <= {"int8": 0.03, "fp8-storage": 0.08, "nf4": 0.2}[kind]


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> ScaleRAE:
    return ScaleRAE.from_pretrained("shapes", device="cpu", dtype="float32")


def tensors(*networks: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": value
        for i, network in enumerate(networks)
        for values in (network.named_parameters(), network.named_buffers())
        for name, value in values
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model with one layer and two blocks, in three safetensors files and in three torch files."""
    bundled = find("shapes", "model").folder
    weights = {name: value for file in bundled.glob("*.safetensors") for name, value in load_file(file).items()}
    deep = re.compile(r"layers\.[1-9]|dit_blocks\.[2-9]")
    names = sorted(name for name in weights if not deep.search(name))
    folders = {}
    for kind, stem in (("safetensors", "model"), ("bin", "pytorch_model")):
        folders[kind] = folder = tmp_path_factory.mktemp(kind) / "model"
        shutil.copytree(bundled, folder, ignore=lambda _, files: [f for f in files if "safetensors" in f])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "diffusion_model_depth": 2}))
        for i in range(3):
            part, file = {name: weights[name] for name in names[i::3]}, folder / f"{stem}-{i + 1:05}-of-00003.{kind}"
            save_file(part, file) if kind == "safetensors" else torch.save(part, file)
    return folders


def test_pictures_of_a_decoder_that_nf4_quantises(bundled: ScaleRAE) -> None:
    """They are hardly further from the exact decoder's than from their 8 bits; the first and the last linear stay."""
    exact = bundled.decoder
    source = bundled.decoder_source
    assert isinstance(exact, PixelDecoder)
    assert source is not None
    decoder = load_decoder(source, bundled.config, HERE, "nf4")
    assert isinstance(decoder, PixelDecoder)
    linears = [m for m in exact.decoder_layers.modules() if isinstance(m, nn.Linear)]
    assert sum(isinstance(m, QuantizedLinear) for m in decoder.modules()) == len(linears) == 6 * exact.config.depth
    assert isinstance(decoder.decoder_embed, nn.Linear)
    (drawn,) = bundled.generate("Can you generate a photo of a red circle?", steps=6, solver="ab2", seed=3).images
    mean, std = bundled.encoder.image_mean, bundled.encoder.image_std
    with torch.inference_mode():
        first, second = (denormalise(network(drawn.latent[None]), mean, std) for network in (exact, decoder))
    error = (first.clamp(0, 1) - second.clamp(0, 1)).square().mean()
    assert -10 * error.log10() > 50  # dB
    unchanged = load_decoder(source, bundled.config, HERE, "int8")
    assert not any(isinstance(m, QuantizedLinear) for m in unchanged.modules())


@pytest.mark.parametrize("kind", QUANTIZE)
def test_loaded_as_quantised_afterwards(kind: str, small: dict[str, Path]) -> None:
    """Bit by bit, from shards of either kind; no weight is ever whole in float32, and the chosen dtype does not matter."""
    source, config = find(str(small["safetensors"]), "model"), load_config(small["safetensors"])
    language, dit, _ = load_networks(source, config, torch.float32, CPU, Speed("off"))
    quantize_blocks(dit, kind, HERE)
    if kind in LANGUAGE_KINDS:
        language.quantize(LANGUAGE_KINDS[kind], HERE)
    expected = tensors(language, dit)
    for files in (source, find(str(small["bin"]), "model")):
        with Watch() as watch:
            loaded = tensors(*load_networks(files, config, torch.float32, CPU, Speed("off", kind))[:2])
        assert loaded.keys() == expected.keys()
        assert [name for name, value in expected.items() if not same(value, loaded[name])] == []
        if kind in LANGUAGE_KINDS:
            assert watch.largest <= 1 << 17 < config.vocab_size * config.hidden_size
    if kind == "int8":
        loaded = tensors(*load_networks(source, config, torch.bfloat16, CPU, Speed("off", kind))[:2])
        weights = [name for name in expected if name.endswith((".values", ".scale"))]
        assert len(weights) == 2 * (7 + 1 + 2 * 5)  # a layer, head and embedding in one, two blocks
        assert all(same(loaded[name], expected[name]) for name in weights)
        assert loaded["1.dit_blocks.0.mlp.w12.bias"].dtype == torch.bfloat16


def test_loaded_into_the_matrix_that_fuses_them(small: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: adaLN weights lie one after another, bit by bit those that are loaded one by one."""
    source, config = find(str(small["bin"]), "model"), load_config(small["bin"])
    _, expected, _ = load_networks(source, config, torch.bfloat16, CPU, Speed("off"))
    monkeypatch.setattr("scale_rae.loading.stacks_modulations", lambda speed, device: True)
    _, dit, _ = load_networks(source, config, torch.bfloat16, CPU, Speed("off"))
    state = dit.state_dict()
    assert all(same(value, state[name]) for name, value in expected.state_dict().items())
    blocks: list[Any] = list(dit.dit_blocks)
    weights = [block.adaLN_modulation[1].weight.detach() for block in blocks]
    assert joined_rows(weights).data_ptr() == weights[0].data_ptr()
    assert not any(weight.requires_grad for weight in dit.parameters())


def test_weights_stay_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`storage` gets all weights; rows are quantised on the device."""
    source = find("shapes", "model")
    made_on: set[str] = set()
    quantized = quantization.quantize_rows

    def watched(kind: str, weight: Tensor) -> float8.Quantized:
        made_on.add(weight.device.type)
        return quantized(kind, weight)

    monkeypatch.setattr(quantization, "quantize_rows", watched)
    config = load_config(source.folder)
    place = torch.device("meta")
    loaded = tensors(*load_networks(source, config, torch.float32, CPU, Speed("off", "int8"), storage=place)[:2])
    assert made_on == {"cpu"}
    assert {value.device.type for name, value in loaded.items()} == {"meta"}


def test_stored_shapes_are_checked(small: dict[str, Path], tmp_path: Path) -> None:
    """A weight of another shape, and one that is missing, are named as they are without quantising."""
    folder = tmp_path / "model"
    shutil.copytree(small["bin"], folder)
    file = sorted(folder.glob("*.bin"))[0]
    weights = torch.load(file, weights_only=True)
    missing, *wrong = [
        name for name in weights if name.endswith(("proj.weight", "w12.weight", "w12.bias", "w3.weight"))
    ]
    del weights[missing]
    for name in wrong:
        weights[name] = weights[name][1:].clone()
    torch.save(weights, file)
    assert len(wrong) > 1
    for kind in (None, "nf4"):
        with pytest.raises(CheckpointError) as error:
            load_networks(find(str(folder), "model"), load_config(folder), torch.float32, CPU, Speed("off", kind))
        assert f"missing tensors: {missing}; wrong shapes: " in str(error.value)
        assert all(f"{name} is [" in str(error.value) for name in wrong)


# --- choices ---------------------------------------------------------------------------------------------------------


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    mps, cuda = torch.device("mps"), torch.device("cuda")
    for kind in ("int8", "nf4", None):
        for device in (CPU, mps, cuda):
            check_quantize(kind, device, torch.float16)
    with pytest.raises(DeviceError, match=r"quantize fp8-storage: mps has no float8 numbers; use --quantize int8"):
        check_quantize("fp8-storage", mps, torch.bfloat16)
    with pytest.raises(
        DeviceError, match=r"quantize int8-products: mps has no int8 matrix products; use --quantize int8"
    ):
        check_quantize("int8-products", mps, torch.bfloat16)
    check_quantize("int8-products", CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(
        DeviceError, match=r"int8-products: NVIDIA V100 has compute capability 7\.0; int8 products need 7\.5"
    ):
        check_quantize("int8-products", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check_quantize("int8-products", cuda, torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "message"),
    [
        ("nf4", 16, 96, r"nf4: this network has a linear of 96 to 16 channels; nf4 needs a multiple of 64 inputs"),
        ("int8-products", 20, 64, r"int8-products: .*linear of 64 to 20 channels; int8 products need multiples of 8"),
        ("int8-products", 16, 60, r"linear of 60 to 16 channels; int8 products need multiples of 8"),
        ("fp8", 40, 64, r"fp8: .*linear of 64 to 40 channels; float8 products need multiples of 16"),
    ],
)
def test_widths_that_do_not_fit(kind: str, rows: int, columns: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_weight(kind, torch.zeros(rows, columns))
    for fits in {"int8", "fp8-storage"}:
        quantize_weight(fits, torch.zeros(rows, columns))


def test_a_network_whose_widths_do_not_fit(checkpoints: dict[str, Path]) -> None:
    """Said before any weight is read."""
    with pytest.raises(
        InputError, match=r"quantize nf4: this network has a linear of \d+ to \d+ channels; .*use --quantize int8"
    ):
        ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cpu", quantize="nf4")


def test_with_speed(bundled: ScaleRAE) -> None:
    for kind in LANGUAGE_KINDS:
        with pytest.raises(InputError, match=rf"quantize {kind} quantises the language model too; load the model anew"):
            bundled.with_speed(Speed("off", kind))
    model = ScaleRAE.from_pretrained("shapes", device="cpu", quantize="int8")
    assert model.with_speed(Speed("on", "int8")).sampler.fast_dit is model.sampler.fast_dit
    for other in (Speed("off"), Speed("off", "nf4"), Speed("off", "int8", defer=False)):
        with pytest.raises(InputError, match=r"quantised \(int8\) already; load it anew"):
            model.with_speed(other)
