"""The checkpoint's own SigLIP as a reward: equal to transformers' SiglipModel, and what it can tell in the world of shapes."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.shapes import common, data
from scale_rae.errors import CheckpointError, ConfigError, InputError
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import load_reward
from scale_rae.rewards.siglip import SiglipReward
from scale_rae.shapes import draw, world

ENCODER = "shapes/siglip-patch16-128"


@pytest.fixture(scope="module")
def shapes() -> ScaleRAE:
    return ScaleRAE.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def reward(shapes: ScaleRAE) -> SiglipReward:
    return SiglipReward(shapes)


def test_is_siglips_logit(shapes: ScaleRAE, reward: SiglipReward, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2Tokenizer, SiglipModel

    folder = shapes.source.folder / ENCODER
    siglip = SiglipModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    images = draw.to_pil(world.sample(np.random.default_rng(0), 5))
    prompt = "A photo of a Red circle and a blue star"
    inputs = tokenizer(prompt.lower(), padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        pixels = shapes.encoder.preprocess(images)
        expected = siglip(input_ids=inputs["input_ids"], pixel_values=pixels).logits_per_image[:, 0].tolist()
    assert reward.score(images, prompt) == pytest.approx(expected, abs=1e-3)
    assert reward.score([], prompt) == []
    monkeypatch.setattr("scale_rae.rewards.parts.BATCH", 2)
    assert load_reward("siglip", shapes).score(images, prompt) == pytest.approx(expected, abs=1e-3)


def test_reads_captions_as_they_were_trained(shapes: ScaleRAE, reward: SiglipReward) -> None:
    scenes = list(world.sample(np.random.default_rng(1), 20, world.SCENE_KINDS))
    tokenizer = reward.tokenizer
    ids = [tokenizer.encode(world.describe(scene)).ids for scene in scenes]
    assert {len(row) for row in ids} == {32}
    assert all(row[-1] == 712 for row in ids)
    encoder = data.WordEncoder(shapes.tokenizer, common.words(), pad=712)
    np.testing.assert_array_equal(np.array(ids), data.captions(encoder, map(world.describe, scenes)))
    assert len(tokenizer.encode("a photo of a red circle, " * 20).ids) == 32  # cut


def test_a_tokenizer_json_serves_and_its_end_token_stays(
    shapes: ScaleRAE, reward: SiglipReward, tmp_path: Path
) -> None:
    """Published SigLIP-2 encoders have a tokenizer.json that ends every text with a token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Qwen2Tokenizer

    shutil.copytree(shapes.source.folder, tmp_path / "shapes")
    encoder = tmp_path / "shapes" / ENCODER
    backend = Qwen2Tokenizer.from_pretrained(encoder).backend_tokenizer
    backend.save(str(encoder / "tokenizer.json"))
    (encoder / "vocab.json").unlink()
    settings = json.loads((encoder / "tokenizer_config.json").read_text())
    pad = {"pad_token": {"content": "<|endoftext|>", "special": True}}
    (encoder / "tokenizer_config.json").write_text(json.dumps(settings | pad))
    model = ScaleRAE.from_pretrained(str(tmp_path / "shapes"), device="cpu")
    images = draw.to_pil(world.sample(np.random.default_rng(4), 2))
    assert load_reward("siglip", model).score(images, "a photo of a star") == reward.score(images, "a photo of a star")

    backend.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 714)])
    backend.save(str(encoder / "tokenizer.json"))
    tokenizer = SiglipReward(model).tokenizer
    assert tokenizer.encode("a star").ids[2:] == [714] + [712] * 29
    assert tokenizer.encode("star " * 40).ids[-1] == 714


def test_tells_full_descriptions_apart(reward: SiglipReward) -> None:
    """The true description of a picture against one with a colour or a shape changed."""
    rng = random.Random(0)
    right: list[bool] = []
    scenes = world.sample(np.random.default_rng(2), 60, world.SCENE_KINDS, "any")
    for scene, image in zip(scenes, draw.to_pil(scenes), strict=True):
        objects = list(scene.objects)
        place = rng.randrange(len(objects))
        thing = objects[place]
        if rng.random() < 0.5:
            objects[place] = thing._replace(color=rng.choice([c for c in world.COLORS if c != thing.color]))
        else:
            objects[place] = thing._replace(shape=rng.choice([s for s in world.SHAPES if s != thing.shape]))
        changed = world.describe(world.Scene(scene.kind, tuple(objects)))
        right.append(reward.score([image], world.describe(scene)) > reward.score([image], changed))
    assert np.mean(right) >= 0.95


def test_tells_some_prompts_apart(reward: SiglipReward) -> None:
    """Prompts that name what is there and in which colour. Number and place, which captions did not name as prompts do,
    are near chance with the bundled encoder (docs say so), and nothing is asked of them here."""
    rng = random.Random(0)
    right: defaultdict[str, list[bool]] = defaultdict(list)
    scenes = world.sample(np.random.default_rng(3), 100, ("single_object", "two_object", "colors", "color_attr"), "any")
    for scene, image in zip(scenes, draw.to_pil(scenes), strict=True):
        prompt = next(p for p in world.true_prompts(scene) if p.tag == scene.kind)
        changed = world.changed(rng, prompt, "any")
        right[prompt.tag].append(reward.score([image], prompt.text) > reward.score([image], changed.text))
    shares = {tag: np.mean(told) for tag, told in right.items()}
    assert shares["single_object"] >= 0.9
    assert shares["colors"] >= 0.9
    assert shares["two_object"] >= 0.6
    assert shares["color_attr"] >= 0.6


def test_is_pinned_by_the_encoders_files(reward: SiglipReward) -> None:
    identity = reward.identity()
    assert identity["name"] == "siglip"
    assert identity["weights"]["name"] == ENCODER
    assert {"model.safetensors", "config.json", "vocab.json"} <= set(identity["weights"]["files"])


def test_says_when_there_is_no_text_tower(models: dict[str, ScaleRAE], shapes: ScaleRAE) -> None:
    with pytest.raises(ConfigError, match=r"this is a DINOv2 without one; use --reward imagereward, pickscore or none"):
        load_reward("siglip", models["webssl"])
    with pytest.raises(ConfigError, match=r"text embeddings are 32 wide .*, image embeddings 768"):
        load_reward("siglip", models["siglip"])
    with pytest.raises(InputError, match="takes no path"):
        load_reward("siglip", shapes, "folder")


def test_names_what_is_wrong_with_the_text_tower(shapes: ScaleRAE, tmp_path: Path) -> None:
    shutil.copytree(shapes.source.folder, tmp_path / "shapes")
    encoder = tmp_path / "shapes" / ENCODER
    model = ScaleRAE.from_pretrained(str(tmp_path / "shapes"), device="cpu")
    weights, config = load_file(encoder / "model.safetensors"), json.loads((encoder / "config.json").read_text())

    def fails(kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            load_reward("siglip", model)

    changed = weights | {"text_model.head.bias": torch.zeros(3), "text_model.more": torch.zeros(1)}
    del changed["logit_bias"]
    save_file(changed, encoder / "model.safetensors", {"format": "pt"})
    model = ScaleRAE.from_pretrained(str(tmp_path / "shapes"), device="cpu")
    text = r"missing tensors: logit_bias; unexpected tensors: text_model\.more; wrong shapes: text_model\.head\.bias is \[3\]"
    fails(CheckpointError, text)
    vision = {name: tensor for name, tensor in weights.items() if not name.startswith("text_model.")}
    save_file(vision, encoder / "model.safetensors", {"format": "pt"})
    fails(CheckpointError, r"this one's weights hold none \(text_model\.\*\)")
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    (encoder / "config.json").write_text(
        json.dumps(config | {"text_config": config["text_config"] | {"num_attention_heads": 5}})
    )
    fails(ConfigError, r"config\.json: not a usable config")
    (encoder / "config.json").write_text(json.dumps(config))
    settings = json.loads((encoder / "tokenizer_config.json").read_text())
    (encoder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    fails(CheckpointError, r"tokenizer_config\.json: pad_token is None")
    (encoder / "tokenizer_config.json").write_text(json.dumps(settings))
    (encoder / "vocab.json").unlink()
    fails(CheckpointError, r"no tokenizer \(tokenizer\.json, or vocab\.json and merges\.txt\)")
