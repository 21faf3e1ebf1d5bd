"""What a damaged, foreign or hostile checkpoint gets: one line that says what is wrong, where, and what would be right."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scale_rae.checkpoint import TensorReader
from scale_rae.errors import CheckpointError, ConfigError, DeviceError, HubError, InputError, ScaleRAEError
from scale_rae.hub import find, weight_files
from scale_rae.pipeline import ScaleRAE
from tests.test_checkpoint import change_config, change_weights, load, shard

ENCODER = "google/siglip2-base-patch14-224"


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The siglip checkpoint, to be damaged; returns the model's folder."""
    shutil.copytree(checkpoints["siglip"].parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def refusal(action: Callable[[], object], kind: type[ScaleRAEError] = CheckpointError) -> str:
    """The error's text, which is one line and not a novel."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2000
    return text


class Bomb:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


# --- names ------------------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (
        str(tmp_path / "nothing"),
        "nothing",
        "a/b/c",
        "./a",
        "~who is that/x",
        "",
        "../no such folder",
        "a" * 300,
        "a\0b",
    ):
        text = refusal(partial(ScaleRAE.from_pretrained, name, device="cpu"))
        assert text.startswith(f"{name}: no such model folder")
        assert "shapes" in text


def test_a_file_is_no_checkpoint(copy: Path) -> None:
    assert "is a file; the model must be a folder" in refusal(lambda: load(copy / "config.json"))


def test_folder_without_config(tmp_path: Path) -> None:
    assert f"{tmp_path / 'config.json'}: no such file" in refusal(lambda: load(tmp_path), ConfigError)


def test_config_of_another_model(copy: Path) -> None:
    change_config(copy, model_type="llama")
    text = refusal(lambda: load(copy), ConfigError)
    assert "model_type is 'llama': not a Scale-RAE checkpoint" in text
    assert str(copy / "config.json") in text


@pytest.mark.parametrize(
    ("field", "value"), [("vision_loss", "mse-loss"), ("vision_loss_mode", "block"), ("dit_cls", "UNet")]
)
def test_unsupported_parts_are_named(copy: Path, field: str, value: str) -> None:
    change_config(copy, **{field: value})
    text = refusal(lambda: load(copy), ConfigError)
    assert f"{field} {value!r} is not supported (supported: " in text


# --- weights ----------------------------------------------------------------------------------------------------------


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refusal(lambda: load(copy)) == f"{copy}: no weights (model*.safetensors or pytorch_model*.bin)"


@pytest.mark.parametrize("index", [True, False], ids=["by index", "by name"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_missing_shard(copy: Path, suffix: str, index: bool) -> None:
    shard(copy, 3, suffix, index)
    lost = next(copy.glob(f"*-00002-of-00003{suffix}"))
    lost.unlink()
    text = refusal(lambda: load(copy))
    assert f"missing shards {lost.name};" in text
    assert str(copy) in text


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_safetensors(copy: Path, keep: float) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    text = refusal(lambda: load(copy))
    assert f"{file}: damaged or cut short" in text
    assert "again" in text


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_decoder(copy: Path, keep: float) -> None:
    file = copy.parent / "decoder" / "model.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert f"{file}: damaged or not a torch file" in refusal(lambda: load(copy).decoder)


def test_every_wrong_tensor_is_listed(copy: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"], weights["diff_head.model.pos_embed"]
        weights |= {"model.extra": torch.zeros(1), "more.extra": torch.zeros(1)}
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
        weights["model.latent_queries"] = weights["model.latent_queries"].T.contiguous()

    change_weights(copy, damage)
    text = refusal(lambda: load(copy))
    assert text == (
        f"{copy / 'model.safetensors'}: missing tensors: diff_head.model.pos_embed, model.norm.weight; "
        "unexpected tensors: model.extra, more.extra; "
        "wrong shapes: lm_head.weight is [287, 64], should be [288, 64], "
        "model.latent_queries is [64, 256], should be [256, 64]"
    )


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../../x.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/x.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": "config.json"},
        {"a": "..\\x.safetensors"},
        {"a": 3},
        {"a": None},
        {},
        ["a"],
        "a",
        None,
    ],
)
def test_malicious_index(copy: Path, weight_map: object) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "x.safetensors")
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    text = refusal(lambda: load(copy))
    assert text.startswith(f"{index}: weight_map ")


def test_index_that_is_no_object(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text("[]")
    assert "must hold a JSON object" in refusal(lambda: load(copy), ConfigError)


def test_a_tensor_in_two_shards(copy: Path) -> None:
    shard(copy, 2, ".safetensors", index=False)
    shutil.copy(copy / "model-00001-of-00002.safetensors", copy / "model-00002-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors has too" in refusal(lambda: load(copy))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_pickled_code_does_not_run(copy: Path, tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "the code ran"
    for file, action in (
        (copy / "pytorch_model.bin", lambda: load(copy)),
        (copy.parent / "decoder" / "model.pt", lambda: load(copy).decoder),
        (copy.parent / ENCODER / "pytorch_model.bin", lambda: load(copy).encoder.model),
    ):
        safe = file.with_name("model.safetensors")
        safe.rename(safe.with_suffix(".aside")) if safe.exists() else None
        torch.save({"w": torch.zeros(2), "x": Bomb(proof)}, file, _use_new_zipfile_serialization=zipped)
        text = refusal(action)
        assert f"{file}: refused, since loading it could run code" in text
        assert "mkdir" in text
        assert not proof.exists()
        safe.with_suffix(".aside").rename(safe) if safe.with_suffix(".aside").exists() else None


def test_plain_pickle_does_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert str(copy / "pytorch_model.bin") in refusal(lambda: load(copy))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [[1, 2], {"a": 1}, {"a": torch.zeros(2), "b": "text"}, {3: torch.zeros(2)}, torch.zeros(3), None]
)
def test_torch_file_of_other_things(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pt")
    assert "must hold a dict of tensors" in refusal(lambda: TensorReader([tmp_path / "x.pt"]))


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.zeros(3, device="meta")])
def test_tensors_without_plain_data(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "x.pt")
    refusal(lambda: TensorReader([tmp_path / "x.pt"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere in the part of a file that says where the tensors are."""
    from safetensors.torch import save

    name = data.draw(st.sampled_from(["model.safetensors", "new.bin", "old.bin"]))
    file = tmp_path / name
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    if name == "model.safetensors":
        file.write_bytes(save(tensors))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name == "new.bin")
    content = bytearray(file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    try:
        reader = TensorReader([file])
        for key in reader.tensors:
            reader.read(key)
    except CheckpointError as e:
        assert str(file) in str(e)  # noqa: PT017 - refusing is as good as reading


def test_only_one_norm_stat(copy: Path) -> None:
    change_weights(copy, lambda w: w.update({"diff_head.data_mean": torch.zeros(768)}))
    assert "has only one of diff_head.data_mean and diff_head.data_std" in refusal(lambda: load(copy))


def test_norm_stats_of_the_wrong_shape(copy: Path) -> None:
    stats = {"diff_head.data_mean": torch.zeros(768), "diff_head.data_std": torch.ones(5)}
    change_weights(copy, lambda w: w.update(stats))
    text = refusal(lambda: load(copy))
    assert "diff_head.data_std is [5], which does not broadcast to [256, 768]" in text


# --- parts ------------------------------------------------------------------------------------------------------------


def test_decoder_for_another_encoder(copy: Path, checkpoints: dict[str, Path]) -> None:
    other = checkpoints["webssl"].parent / "decoder"
    text = refusal(lambda: load(copy, decoder=str(other)).decoder)
    assert "this decoder is for another encoder: it takes latents of 96 channels" in text
    assert "the model's have 768" in text


@pytest.mark.parametrize("eps", [None, "small", 0, -1.0, True])
def test_bad_decoder_eps(copy: Path, eps: object) -> None:
    config = copy.parent / "decoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": eps}))
    model = load(copy)
    assert "layer_norm_eps" in refusal(lambda: model.decoder, ConfigError)


def test_decoder_folder_without_weights(copy: Path) -> None:
    (copy.parent / "decoder" / "model.pt").unlink()
    assert "not a pixel decoder, which is config.json and model.pt" in refusal(lambda: load(copy).decoder)


def test_no_such_decoder(copy: Path) -> None:
    assert "nothing here: no such decoder folder" in refusal(lambda: load(copy, decoder="nothing here").decoder)


def test_encoder_of_the_wrong_width(copy: Path) -> None:
    change_config(copy, diffusion_model_channels=96)

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        cut = {
            "model.mm_projector.0.weight": 1,
            "diff_head.model.x_embedder.proj.weight": 1,
            "diff_head.model.final_layer.linear.weight": 0,
            "diff_head.model.final_layer.linear.bias": 0,
        }
        for name, axis in cut.items():
            weights[name] = weights[name].narrow(axis, 0, 96).contiguous()

    change_weights(copy, narrow)
    text = refusal(lambda: load(copy).encoder, ConfigError)
    assert "the encoder's hidden_size is 768, but the model's latents have 96 channels" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "clip"}, "model_type 'clip' is not a supported encoder (supported: siglip"),
        ({"model_type": None}, "model_type None is not a supported encoder"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"vision_config": {"hidden_size": "wide"}}, "not a usable encoder config"),
    ],
)
def test_bad_encoder_config(copy: Path, changes: dict[str, Any], problem: str) -> None:
    folder = copy.parent / ENCODER
    change_config(folder, **changes)
    text = refusal(lambda: load(copy).encoder, ConfigError)
    assert problem in text
    assert str(folder / "config.json") in text


def test_encoder_image_size_must_fit(copy: Path) -> None:
    vision = json.loads((copy.parent / ENCODER / "config.json").read_text())["vision_config"]
    change_config(copy.parent / ENCODER, vision_config=vision | {"image_size": 210})
    text = refusal(lambda: load(copy).encoder, ConfigError)
    assert "image_size is 210, but preprocessor_config.json makes 224" in text


def test_select_layer_must_exist(copy: Path) -> None:
    change_config(copy, mm_vision_select_layer=7)
    assert "mm_vision_select_layer 7 of an encoder with 2 layers" in refusal(lambda: load(copy).encoder, ConfigError)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_processor_type": "LaserProcessor"}, "image_processor_type 'LaserProcessor' is not supported"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]; must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is [0.5, 0, 0.5]; must be three numbers"),
        ({"image_std": None}, "image_std is None"),
        ({"size": "large"}, "not a usable image processor config"),
        ({"size": {"shortest_edge": 224}}, "they must be square"),
        ({"size": {"height": 448, "width": 448}}, "image_size is 224, but preprocessor_config.json makes 448"),
    ],
)
def test_bad_preprocessor_config(copy: Path, changes: dict[str, Any], problem: str) -> None:
    path = copy.parent / ENCODER / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert problem in refusal(lambda: load(copy).encoder, ConfigError)


def test_missing_preprocessor_config(copy: Path) -> None:
    path = copy.parent / ENCODER / "preprocessor_config.json"
    path.unlink()
    assert f"{path}: no such file" in refusal(lambda: load(copy).encoder, ConfigError)


def test_every_wrong_tensor_of_an_encoder_is_listed(copy: Path) -> None:
    prefix = "vision_model.encoder.layers.0.layer_norm1"

    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["vision_model.post_layernorm.weight"], weights[f"{prefix}.weight"]
        weights[f"{prefix}.bias"] = torch.zeros(5)
        weights["vision_model.encoder.layers.7.layer_norm1.bias"] = torch.zeros(768)

    change_weights(copy.parent / ENCODER, damage)
    text = refusal(lambda: load(copy).encoder.model)
    assert str(copy.parent / ENCODER) in text
    assert "missing tensors: " in text
    assert "post_layernorm.weight" in text
    assert "layers.0.layer_norm1.weight" in text
    assert "unexpected tensors: " in text
    assert "layers.7.layer_norm1.bias" in text
    assert "layers.0.layer_norm1.bias is [5], should be [768]" in text


def test_drawing_needs_no_encoder_weights(copy: Path) -> None:
    """Only what its processor says of pixels, which the decoder undoes."""
    (copy.parent / ENCODER / "model.safetensors").unlink()
    model = load(copy)
    assert model.decode([torch.zeros(256, 768)])[0].size == (224, 224)
    assert "no weights" in refusal(lambda: model.encode([Image.new("RGB", (8, 8))]))


def test_encoder_truncated(copy: Path) -> None:
    file = copy.parent / ENCODER / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: damaged or cut short" in refusal(lambda: load(copy).encoder.model)


def test_loading_prints_nothing(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(copy)
    model.decode(model.encode([Image.new("RGB", (50, 40))]))
    assert capfd.readouterr() == ("", "")


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_no_tokenizer(copy: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (copy / name).unlink()
    assert f"{copy}: no tokenizer" in refusal(lambda: load(copy))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"a": "b"}', b"null"])
def test_damaged_tokenizer(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    try:
        load(copy)  # merges.txt may hold any pairs, or none
    except ScaleRAEError as e:
        assert str(copy) in str(e)  # noqa: PT017
        assert "\n" not in str(e)  # noqa: PT017
    else:
        assert name == "merges.txt"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_json(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    assert str(copy) in refusal(lambda: load(copy))


@pytest.mark.parametrize("token", ["<im_start>", "<im_end>", "<|im_start|>", "<|im_end|>"])
def test_tokenizer_without_a_control_token(copy: Path, token: str) -> None:
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] = {
        k: v for k, v in settings["added_tokens_decoder"].items() if v["content"] != token
    }
    settings["additional_special_tokens"] = [t for t in settings["additional_special_tokens"] if t != token]
    settings["eos_token"] = settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert f"the tokenizer has no token {token}" in refusal(lambda: load(copy))


def test_tokenizer_of_a_larger_model(copy: Path) -> None:
    change_config(copy, vocab_size=280)
    assert "the tokenizer has 281 tokens, the model 280 (vocab_size)" in refusal(lambda: load(copy))


# --- devices, dtypes --------------------------------------------------------------------------------------------------


def test_devices_and_dtypes(checkpoints: dict[str, Path]) -> None:
    name = str(checkpoints["siglip"])
    for device in ("cuda", "cuda:7", "mps", "gpu", "", "meta"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        assert "cpu" in refusal(partial(ScaleRAE.from_pretrained, name, device=device), DeviceError)
    for dtype in ("int8", "float", ""):
        text = refusal(partial(ScaleRAE.from_pretrained, name, device="cpu", dtype=dtype), InputError)
        assert "use one of float32, bfloat16, float16" in text


def test_hub_errors_are_not_checkpoint_errors() -> None:
    assert not issubclass(HubError, CheckpointError)


def test_lookup_refuses_files(copy: Path) -> None:
    text = refusal(lambda: find(str(copy.parent / "decoder" / "model.pt"), "decoder", copy))
    assert "is a file; the decoder must be a folder" in text


def test_weight_files_of_no_folder(tmp_path: Path) -> None:
    assert "no weights" in refusal(lambda: weight_files(tmp_path / "nothing"))
