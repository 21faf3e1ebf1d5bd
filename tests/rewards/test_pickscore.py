"""PickScore: a small made-up CLIP against CLIP's formulas written out, and files that are missing or wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from scale_rae.errors import CheckpointError, ConfigError
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import load_reward
from tests.helpers.made_checkpoints import made
from tests.rewards.test_imagereward import VOCABULARY as BERT_VOCABULARY
from tests.rewards.test_imagereward import write_weights

SIDE, PATCH, WIDTH, TEXT_WIDTH, JOINT, PLACES = 32, 8, 48, 32, 24, 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
START, END = VOCABULARY.index("<|startoftext|>"), VOCABULARY.index("<|endoftext|>")
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tower(width: int, layers: int = 2, heads: int = 4, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "hidden_act": "gelu", "layer_norm_eps": 1e-5, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's files, with a processor's beside them."""
    folder = tmp_path_factory.mktemp("pickscore")
    text = tower(TEXT_WIDTH, vocab_size=len(VOCABULARY), max_position_embeddings=PLACES, eos_token_id=END)
    config = {
        "model_type": "clip",
        "projection_dim": JOINT,
        "logit_scale_init_value": 2.6592,
        "text_config": text | {"bos_token_id": START, "pad_token_id": END},
        "vision_config": tower(WIDTH, image_size=SIDE, patch_size=PATCH),
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, list[int]] = {"logit_scale": []}
    for prefix, width in (("text_model", TEXT_WIDTH), ("vision_model", WIDTH)):
        for i in range(2):
            layer = f"{prefix}.encoder.layers.{i}."
            for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
                shapes |= {f"{layer}{linear}.weight": [width, width], f"{layer}{linear}.bias": [width]}
            shapes |= {f"{layer}mlp.fc1.weight": [2 * width, width], f"{layer}mlp.fc1.bias": [2 * width]}
            shapes |= {f"{layer}mlp.fc2.weight": [width, 2 * width], f"{layer}mlp.fc2.bias": [width]}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{layer}{norm}.weight": [width], f"{layer}{norm}.bias": [width]}
    for norm, width in (
        ("text_model.final_layer_norm", TEXT_WIDTH),
        ("vision_model.pre_layrnorm", WIDTH),
        ("vision_model.post_layernorm", WIDTH),
    ):
        shapes |= {f"{norm}.weight": [width], f"{norm}.bias": [width]}
    shapes |= {
        "text_model.embeddings.token_embedding.weight": [len(VOCABULARY), TEXT_WIDTH],
        "text_model.embeddings.position_embedding.weight": [PLACES, TEXT_WIDTH],
        "vision_model.embeddings.class_embedding": [WIDTH],
        "vision_model.embeddings.patch_embedding.weight": [WIDTH, 3, PATCH, PATCH],
        "vision_model.embeddings.position_embedding.weight": [(SIDE // PATCH) ** 2 + 1, WIDTH],
        "text_projection.weight": [JOINT, TEXT_WIDTH],
        "visual_projection.weight": [JOINT, WIDTH],
    }
    tensors = {name: torch.from_numpy(np.asarray(made(name, shape))) for name, shape in shapes.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(PLACES)[None]  # as older files have it
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_processor(folder)
    return folder


def write_processor(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    settings = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": SIDE,
        "crop_size": SIDE,
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def model(models: dict[str, ScaleRAE]) -> ScaleRAE:
    return models["webssl"]


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class WrittenOut:
    """CLIP's similarity, operation by operation."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.w = load_file(folder / "model.safetensors")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def layers(self, prefix: str, x: Tensor, causal: bool) -> Tensor:
        """x [T, D]"""
        for i in range(2):
            layer = f"{prefix}.encoder.layers.{i}"
            y = self.norm(f"{layer}.layer_norm1", x)
            q, k, v = (self.linear(f"{layer}.self_attn.{n}_proj", y).unflatten(-1, (4, -1)) for n in "qkv")
            weights = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
            if causal:
                weights += torch.full_like(weights, -torch.inf).triu(1)
            mixed = torch.einsum("hij,jhd->ihd", weights.softmax(-1), v).flatten(1)
            x = x + self.linear(f"{layer}.self_attn.out_proj", mixed)
            y = self.linear(f"{layer}.mlp.fc1", self.norm(f"{layer}.layer_norm2", x))
            x = x + self.linear(f"{layer}.mlp.fc2", F.gelu(y))
        return x

    def text(self, ids: list[int]) -> Tensor:
        w = self.w
        x = w["text_model.embeddings.token_embedding.weight"][ids]
        x = x + w["text_model.embeddings.position_embedding.weight"][: len(ids)]
        x = self.norm("text_model.final_layer_norm", self.layers("text_model", x, causal=True))
        return x[ids.index(END)] @ w["text_projection.weight"].T

    def image(self, image: Image.Image) -> Tensor:
        w = self.w
        pixels = (torch.from_numpy(np.array(image)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)  # [32, 32, 3]
        patches = (
            pixels.unflatten(0, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1)
        )
        x = patches @ w["vision_model.embeddings.patch_embedding.weight"].flatten(1).T
        x = torch.cat([w["vision_model.embeddings.class_embedding"][None], x])
        x = self.norm("vision_model.pre_layrnorm", x + w["vision_model.embeddings.position_embedding.weight"])
        x = self.norm("vision_model.post_layernorm", self.layers("vision_model", x, causal=False)[0])
        return x @ w["visual_projection.weight"].T

    def score(self, image: Image.Image, ids: list[int]) -> float:
        a, b = self.image(image), self.text(ids)
        return float(self.w["logit_scale"].exp() * (a / a.norm()) @ (b / b.norm()))


def ids_of(*tokens: str) -> list[int]:
    return [START, *map(VOCABULARY.index, tokens), END]


def test_is_clips_logit(folder: Path, model: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward("pickscore", model, str(folder))
    images = [picture(seed) for seed in range(5)]
    ids = ids_of("a</w>", "cat</w>", "d", "o", "g</w>")
    expected = [WrittenOut(folder).score(image, ids) for image in images]
    assert max(expected) - min(expected) > 0.05
    assert reward.score(images, "A  cat dog") == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr("scale_rae.rewards.parts.BATCH", 2)
    assert reward.score(images, "a cat dog") == pytest.approx(expected, abs=1e-4)
    assert reward.score([], "a") == []


@pytest.mark.parametrize("name", ["pickscore", "siglip", "imagereward"])
def test_computes_in_the_models_dtype(name: str, folder: Path, tmp_path: Path) -> None:
    paths = {"pickscore": folder, "imagereward": tmp_path}
    write_weights(tmp_path, widen=True)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY))
    path = str(paths[name]) if name in paths else None
    images = [picture(0, 128, 128), picture(1, 128, 128)]
    exact, rough = (
        load_reward(name, ScaleRAE.from_pretrained("shapes", device="cpu", dtype=dtype), path).score(
            images, "a red cat"
        )
        for dtype in ("float32", "bfloat16")
    )
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05, abs=0.05)


def test_long_prompts_are_cut_and_keep_their_end(folder: Path, model: ScaleRAE) -> None:
    reward = load_reward("pickscore", model, str(folder))
    expected = WrittenOut(folder).score(picture(0), ids_of(*["cat</w>"] * (PLACES - 2)))
    assert reward.score([picture(0)], "cat " * 40) == pytest.approx([expected], abs=1e-4)


def test_pictures_are_resized_and_cropped(folder: Path, model: ScaleRAE) -> None:
    reward = load_reward("pickscore", model, str(folder))
    wide = picture(1, 100, 64)
    seen = wide.resize((50, SIDE), Image.Resampling.BICUBIC).crop((9, 0, 9 + SIDE, SIDE))
    expected = WrittenOut(folder).score(seen, ids_of("cat</w>"))
    assert reward.score([wide.convert("RGBA")], "cat") == pytest.approx([expected], abs=1e-4)


def test_a_processor_folder_beside_the_weights_serves(folder: Path, model: ScaleRAE, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path / file)
    write_processor(tmp_path / "processor")
    one, other = (load_reward("pickscore", model, str(place)) for place in (folder, tmp_path))
    assert one.score([picture(2)], "a cat") == other.score([picture(2)], "a cat")
    assert set(one.identity()) == {"name", "weights"}
    assert set(other.identity()) == {"name", "weights", "processor"}


def test_bad_files_are_named(folder: Path, model: ScaleRAE, tmp_path: Path) -> None:
    def fails(kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            load_reward("pickscore", model, str(tmp_path))

    fails(CheckpointError, r"no config\.json\. .*yuvalkirstain/PickScore_v1.*--reward siglip or --reward none")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    fails(ConfigError, "model_type 'siglip' is not clip")
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 8}))
    fails(
        CheckpointError, r"wrong shapes: text_projection\.weight is \[24, 32\], should be \[8, 32\], visual_projection"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": 16}))
    fails(ConfigError, "makes images of 16 x 16 pixels, but the model reads 32 x 32")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*VOCABULARY, "more"])}))
    fails(CheckpointError, f"the tokenizer has {len(VOCABULARY) + 1} tokens, the text tower {len(VOCABULARY)}")
    (tmp_path / "model.safetensors").unlink()
    fails(CheckpointError, "no weights")
