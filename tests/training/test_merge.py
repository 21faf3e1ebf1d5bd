"""Adapters in commands, manifests and experiments; merged and fully trained models as checkpoints of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scale_rae.adapters import write_adapter
from scale_rae.cli.app import run
from scale_rae.errors import OptionError
from scale_rae.options import ModelChoice, lora_parts
from scale_rae.pipeline import ScaleRAE
from scale_rae.provenance import differences
from scale_rae.scaling.experiment import experiment_record, setting_differences
from scale_rae.scaling.settings import Settings

QKV = "diff_head.model.dit_blocks.0.attn.qkv"
HEAD = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def adapter(models: dict[str, ScaleRAE], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small adapter for both networks of the siglip checkpoint."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    model = models["siglip"]
    shapes = {QKV: model.dit.dit_blocks[0].attn.qkv.weight.shape}
    shapes[HEAD] = model.language.model.layers[0].mlp.up_proj.weight.shape
    changes = {
        name: (torch.randn(2, k, generator=generator) * 0.2, torch.randn(n, 2, generator=generator) * 0.2)
        for name, (n, k) in shapes.items()
    }
    write_adapter(folder, changes, 2, 2.0, "base")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_a_merged_checkpoint_is_the_model_with_its_adapter(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, target = checkpoints["siglip"], tmp_path / "merged"
    command = ["merge", "--model", str(base), "--lora", f"{adapter}:0.5", "--out", str(target)]
    assert run(command) == 0
    assert capsys.readouterr().out.strip() == str(target)
    before, after = weights(base), weights(target)
    assert before.keys() == after.keys()
    changed = {f"{name}.weight" for name in (QKV, HEAD)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    merged = ScaleRAE.from_pretrained(str(target), device="cpu")
    loaded = ScaleRAE.from_pretrained(str(base), device="cpu", lora=[f"{adapter}:0.5"])
    pairs = zip(merged.dit.parameters(), loaded.dit.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    _ = merged.encoder, merged.decoder  # found inside
    assert run(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_drawing_records_its_adapters_and_is_drawn_again_with_them(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model-path", str(checkpoints["siglip"]), "--device", "cpu", "--steps", "2"]
    prompt = ["--prompt", "Can you generate a photo of a cat on a windowsill?", "--skip-decoder", "--json"]

    def drawn(*arguments: str, out: str) -> dict[str, Any]:
        assert run(["t2i", *arguments, "--output-dir", str(tmp_path / out)]) == 0
        return json.loads(capsys.readouterr().out)

    def latent(manifest: dict[str, Any]) -> torch.Tensor:
        return torch.load(manifest["latent_paths"][0], weights_only=True)

    plain = drawn(*model, *prompt, out="plain")
    changed = drawn(*model, *prompt, "--lora", f"{adapter}:0.25", out="changed")
    assert "lora" not in plain
    (recorded,) = changed["lora"]
    assert (recorded["name"], recorded["weight"]) == (str(adapter), 0.25)
    assert recorded["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert not torch.equal(latent(plain), latent(changed))
    path = next((tmp_path / "changed").glob("*_manifest.json"))
    again = drawn("--from-manifest", str(path), "--skip-decoder", "--json", out="again")
    assert torch.equal(latent(again), latent(changed))
    assert differences(changed, plain) == ["lora: other adapters or weights (0 here, 1 then)"]
    assert differences(changed, again) == []


def test_experiments_record_adapters_only_where_there_are_some() -> None:
    plain = experiment_record(Settings("p.jsonl", "shapes"), [])
    adapted = experiment_record(Settings("p.jsonl", "shapes").with_model(ModelChoice("shapes", lora=("a:0.5",))), [])
    assert "lora" not in plain["settings"]
    assert adapted["settings"]["lora"] == ["a:0.5"]
    assert setting_differences(plain, adapted) == ['lora ["a:0.5"] here, [] there']
    assert setting_differences(json.loads(json.dumps(adapted)), adapted) == []


@pytest.mark.parametrize("command", [["t2i", "--prompt", "x", "--model-path"], ["inspect"]])
def test_what_a_training_wrote_in_the_place_of_a_model(
    command: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder, remedy in (
        (adapter, "is a LoRA adapter, not a model: give its model, and this adapter as --lora"),
        (tmp_path, f"is the folder of a training; its model is {tmp_path / 'model'}"),
    ):
        assert run([*command, str(folder)]) == 1
        assert f"error: {folder}: {remedy}\n" in capsys.readouterr().err


def test_adapters_are_named_with_a_weight() -> None:
    assert lora_parts("a/b") == ("a/b", 1.0)
    assert lora_parts("a:0.5") == ("a", 0.5)
    assert lora_parts("a:-1") == ("a", -1.0)
    assert lora_parts("c:/a/b") == ("c:/a/b", 1.0)
    for text in ("a:", "a:x", "a:nan", ":1", ""):
        with pytest.raises(OptionError, match="must be DIR or DIR:WEIGHT"):
            lora_parts(text)
    with pytest.raises(OptionError):
        ModelChoice(lora=("a:x",)).check()
