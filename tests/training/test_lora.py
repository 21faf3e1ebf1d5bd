"""LoRA layers, and adapters in PEFT's file form: what PEFT makes of a file is what we make of it, and the other way round."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scale_rae.adapters import CONFIG, WEIGHTS, read_adapter, write_adapter
from scale_rae.dit import DiT
from scale_rae.errors import CheckpointError, OutputError
from scale_rae.fast_weights import pad_swiglu, quantize_blocks
from scale_rae.hub import Source
from scale_rae.layout import DIT_PREFIX
from scale_rae.pipeline import ScaleRAE
from scale_rae.quantization import Place
from scale_rae.training.lora import LoraLinear, adapter_changes, add_to_networks, pass_gradients

CPU = torch.device("cpu")


def learnt(dit: DiT, rank: int = 4, alpha: float = 6.0) -> dict[str, LoraLinear]:
    """LoRA in a DiT, its B no longer zero; what padding has stays zero."""
    layers = add_to_networks(None, dit, rank, alpha, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, layer in layers.items():
        changed = torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.05
        if name.endswith("mlp.w12"):
            inner = int(2 / 3 * 4 * layer.base.in_features)
            changed.view(2, -1, rank)[:, inner:] = 0
        layer.lora_B.weight.data.copy_(changed)
    return layers


def parameters(layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    return {f"{name}.{leaf}": value for name, layer in layers.items() for leaf, value in layer.named_parameters()}


def velocity(dit: nn.Module, seed: int = 0) -> torch.Tensor:
    config: Any = dit.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, config.channels, config.side, config.side, generator=generator)
    y = torch.randn(2, config.tokens, config.condition_width, generator=generator)
    with torch.no_grad():
        return dit(x, torch.tensor([0.9, 0.3]), y)


@pytest.fixture
def adapter(models: dict[str, ScaleRAE], tmp_path: Path) -> tuple[Source, DiT]:
    """An adapter's files, and the DiT with the LoRA that is in them."""
    dit = copy.deepcopy(models["ddt"].dit)
    pad_swiglu(dit, 8)
    layers = learnt(dit)
    write_adapter(tmp_path, adapter_changes(parameters(layers)), 4, 6.0, "base")
    return Source(str(tmp_path), tmp_path), dit


def test_merged_weights_draw_what_the_lora_draws(
    checkpoints: dict[str, Path], models: dict[str, ScaleRAE], adapter: tuple[Source, DiT]
) -> None:
    source, dit = adapter
    expected = velocity(dit)
    folder = str(checkpoints["ddt"])
    merged = ScaleRAE.from_pretrained(folder, device="cpu", lora=str(source.folder))
    torch.testing.assert_close(velocity(merged.dit), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(velocity(models["ddt"].dit), expected, atol=1e-2)
    undone = ScaleRAE.from_pretrained(folder, device="cpu", lora=[str(source.folder), f"{source.folder}:-1"])
    torch.testing.assert_close(velocity(undone.dit), velocity(models["ddt"].dit), rtol=1e-3, atol=1e-4)


def test_peft_reads_our_files_and_we_read_its(
    models: dict[str, ScaleRAE], adapter: tuple[Source, DiT], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    source, dit = adapter
    expected = velocity(dit)
    base = nn.Module()
    base.diff_head = nn.Module()
    base.diff_head.model = copy.deepcopy(models["ddt"].dit)  # as the official model has it
    loaded = peft.PeftModel.from_pretrained(base, str(source.folder))
    torch.testing.assert_close(velocity(base.diff_head.model), expected, rtol=1e-3, atol=1e-4)
    loaded.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)  # no look at the hub
    ours, its = read_adapter(source), read_adapter(Source("again", tmp_path / "again"))
    assert ours.changes.keys() == its.changes.keys()
    for name, change in ours.changes.items():
        assert torch.equal(change.a, its.changes[name].a)
        assert torch.equal(change.b, its.changes[name].b)
        assert change.scale == its.changes[name].scale


def test_padding_stays_exact_in_training(models: dict[str, ScaleRAE]) -> None:
    padded, plain = copy.deepcopy(models["ddt"].dit), copy.deepcopy(models["ddt"].dit)
    pad_swiglu(padded, 16)
    layers = learnt(padded)
    own = add_to_networks(None, plain, 4, 6.0, seed=3)
    for name, (a, b) in adapter_changes(parameters(layers)).items():
        own[name].lora_A.weight.data, own[name].lora_B.weight.data = a, b
    torch.testing.assert_close(velocity(padded), velocity(plain), rtol=1e-3, atol=1e-4)


def test_gradients_pass_through_quantised_weights(models: dict[str, ScaleRAE]) -> None:
    dit = copy.deepcopy(models["ddt"].dit)
    quantize_blocks(dit, "int8", Place(CPU, CPU, torch.float32))
    whole = copy.deepcopy(dit)
    for owner in list(whole.modules()):
        for leaf, part in list(owner.named_children()):
            if type(part).__name__ == "QuantizedLinear":
                linear = nn.Linear(part.in_features, part.out_features)
                linear.weight.data, linear.bias.data = part.weight.dequantize(torch.float32), part.bias.detach()
                setattr(owner, leaf, linear)
    found = []
    for network in (dit, whole):
        layers = learnt(network)
        pass_gradients(network)
        network.requires_grad_(False)
        leaves = [p for layer in layers.values() for p in (layer.lora_A.weight, layer.lora_B.weight)]
        for leaf in leaves:
            leaf.requires_grad_()
        x = torch.randn(1, dit.config.channels, 16, 16, generator=torch.Generator().manual_seed(1))
        y = torch.zeros(1, dit.config.tokens, dit.config.condition_width)
        out = network(x, torch.tensor([0.5]), y)
        found.append(torch.autograd.grad(out.square().mean(), leaves))
    for quantised, plain in zip(*found, strict=True):
        torch.testing.assert_close(quantised, plain, rtol=1e-3, atol=1e-7)


def test_adapters_that_cannot_be_used_are_refused_by_file(
    checkpoints: dict[str, Path], adapter: tuple[Source, DiT]
) -> None:
    folder = adapter[0].folder
    config = json.loads((folder / CONFIG).read_text())

    def refused(problem: str, **changes: Any) -> None:
        (folder / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=problem):
            read_adapter(adapter[0])

    refused("peft_type is 'IA3'; only LORA", peft_type="IA3")
    refused("use_dora is True, which is not supported", use_dora=True)
    refused("alora_invocation_tokens is .5., which is not supported", alora_invocation_tokens=[5])
    refused(
        "init_lora_weights is 'pissa_niter_4': the adapter fits only the base weights",
        init_lora_weights="pissa_niter_4",
    )
    refused("lora_alpha is missing", lora_alpha=None)
    refused(f"{CONFIG}: alpha_pattern: qkv is 'x', not a number", alpha_pattern={"qkv": "x"})
    refused(rf"{CONFIG}: alpha_pattern: \(qkv is no pattern of names", alpha_pattern={"(qkv": 1})
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    a, b, *_ = sorted(tensors)
    none = {a: tensors[a][:0], b: tensors[b][:, :0].contiguous()}
    for problem, changed in (
        (r"has A \[\] and B", tensors | {a: torch.tensor(1.0)}),
        (r"has A \[0, \d+\] and B", tensors | none),
        ("has values that are not finite", tensors | {b: tensors[b] * torch.nan}),
        ("holds no tensors", {}),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: .*{problem}"):
            read_adapter(adapter[0])
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHTS}: made for another model: {DIT_PREFIX}.* the adapter changes"
    ):
        ScaleRAE.from_pretrained(str(checkpoints["siglip"]), device="cpu", lora=[str(folder)])
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: no such file"):
        read_adapter(adapter[0])


def test_an_adapter_that_cannot_be_written_leaves_the_one_that_is_there(
    adapter: tuple[Source, DiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter[0].folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=f"^{folder}: cannot be written .*No space left"):
        write_adapter(folder, {"x": (torch.ones(1, 1), torch.ones(1, 1))}, 1, 1.0, "base")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
