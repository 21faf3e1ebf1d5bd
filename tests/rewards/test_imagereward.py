"""ImageReward: the golden, the original's preprocessing, its tokens, and files that are missing or wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from scale_rae import options
from scale_rae.errors import CheckpointError, ConfigError, InputError
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import REWARDS, imagereward, load_reward
from scale_rae.rewards.imagereward import load_network
from scale_rae.rewards.parts import clip_pixels
from tests.helpers.made_checkpoints import GOLDENS, golden_case, made

WORDS = ["[PAD]", "[unused0]", "a", "photo", "of", "cat", "##s", "red", ".", "e"]
VOCABULARY = [*WORDS, *(f"[unused{i}]" for i in range(1, 85)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # 98, and two more


def write_weights(folder: Path, widen: bool = False) -> dict[str, torch.Tensor]:
    """The golden's ImageReward.pt and med_config.json; with a vision tower of heads as wide as ViT-L's if `widen`."""
    case = golden_case("imagereward")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "med_config.json").write_text(json.dumps(case["text_config"]))
    wider = {96: 128, 288: 384, 384: 512} if widen else {}
    tensors = {
        name: torch.from_numpy(made("reward/" + name, [wider.get(n, n) for n in shape]))
        for name, shape in case["tensors"].items()
    }
    unused = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": torch.zeros(4, 96),
        "blip.text_proj.bias": torch.zeros(4),
    }
    torch.save(tensors | unused, folder / "ImageReward.pt")
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    write_weights(folder, widen=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(models: dict[str, ScaleRAE]) -> ScaleRAE:
    return models["siglip"]


def photograph(width: int, height: int) -> Image.Image:
    """Smooth light, edges and noise, as a photograph has them."""
    rng = np.random.default_rng(width * 1000 + height)
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    light = np.stack([np.sin(x * 1.3 + y), np.cos(y * 2.1 - x), np.sin(x * y * 0.7)], axis=-1) * 70 + 128
    light[(np.floor(x * 2) + np.floor(y * 2)) % 2 == 0] += 40
    return Image.fromarray((light + rng.normal(0, 12, light.shape)).clip(0, 255).astype(np.uint8))


# The network ------------------------------------------------------------------------------------------------------------------


def test_meets_the_golden(tmp_path: Path) -> None:
    write_weights(tmp_path)
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / "imagereward.npz").items()}
    network = load_network(tmp_path, torch.float32, torch.device("cpu"), heads=4)
    pixels = torch.from_numpy(made("golden.pixels", [2, 3, 224, 224]))
    with torch.inference_mode():
        embeds = network.image_embeds(pixels)
        features = network.text_features(embeds, golden["input_ids"], golden["attention_mask"])
        rewards = network(pixels, golden["input_ids"], golden["attention_mask"])
    torch.testing.assert_close(embeds[:, ::16], golden["image_embeds"], rtol=0, atol=1e-4)
    torch.testing.assert_close(features, golden["text_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(rewards, golden["rewards"], rtol=0, atol=1e-4)
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_each_weight_is_kept_once(tmp_path: Path) -> None:
    stored = write_weights(tmp_path)
    network = load_network(tmp_path, torch.bfloat16, torch.device("cpu"), heads=4)
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in stored.values())
    assert network.vision.post_layernorm.weight.dtype == torch.bfloat16
    assert network.mlp[0].weight.dtype == torch.float32


def test_scores_pictures_of_any_size_in_batches(folder: Path, model: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward("imagereward", model, str(folder))
    images = [photograph(240, 300), photograph(500, 224), photograph(64, 48).convert("L"), photograph(240, 300)]
    scores = reward.score(images, "a photo of cats")
    assert all(isinstance(s, float) and math.isfinite(s) for s in scores)
    assert scores[0] == pytest.approx(scores[3], abs=1e-5)
    assert len({round(s, 5) for s in scores}) == 3
    assert reward.score(images[:1], "red")[0] != pytest.approx(scores[0], abs=1e-5)
    assert reward.score([], "red") == []
    monkeypatch.setattr("scale_rae.rewards.parts.BATCH", 3)
    assert reward.score(images, "a photo of cats") == pytest.approx(scores, abs=1e-5)


def test_tokens_are_berts_padded_or_cut_to_35(folder: Path, model: ScaleRAE) -> None:
    tokenizer = imagereward.ImageReward(model, str(folder)).tokenizer
    index = VOCABULARY.index
    text = tokenizer.encode("A photo of Cats, é.")
    words = [index(w) for w in ("[CLS]", "a", "photo", "of", "cat", "##s", "[UNK]", "e", ".", "[SEP]")]
    assert text.ids == words + [0] * (35 - len(words))
    assert text.attention_mask == [1] * len(words) + [0] * (35 - len(words))
    long = tokenizer.encode("cat " * 50)
    assert long.ids == [index("[CLS]"), *[index("cat")] * 33, index("[SEP]")]
    assert tokenizer.token_to_id("[DEC]") == 98
    assert tokenizer.token_to_id("[ENC]") == 99


def test_a_tokenizer_json_in_a_folder_beside_the_weights_serves(folder: Path, model: ScaleRAE, tmp_path: Path) -> None:
    from tokenizers.implementations import BertWordPieceTokenizer

    write_weights(tmp_path, widen=True)
    (tmp_path / "tokenizer").mkdir()
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    one, other = (load_reward("imagereward", model, str(place)) for place in (folder, tmp_path))
    picture = [photograph(224, 224)]
    assert one.score(picture, "a red cat.") == other.score(picture, "a red cat.")
    assert set(other.identity()) == {"name", "weights", "tokenizer"}
    assert set(one.identity()["weights"]["files"]) == {"ImageReward.pt", "med_config.json", "vocab.txt"}


# Preprocessing ----------------------------------------------------------------------------------------------------------------


def bicubic(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pillow's bicubic resize of the first axis, from its description: antialiased, 22-bit fixed point, rounded once a pass."""
    count = len(pixels)
    scale = count / size
    stretch = max(scale, 1.0)
    result = np.empty((size, *pixels.shape[1:]), dtype=np.uint8)
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), count)
        d = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * (d**3 - 5 * d**2 + 8 * d - 4)
        weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
        fixed = weights / weights.sum() * 2**22
        whole = np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64)
        total = np.tensordot(whole, pixels[first:last].astype(np.int64), axes=1) + 2**21
        result[i] = (total >> 22).clip(0, 255)
    return result


@pytest.mark.parametrize(
    ("size", "resized", "corner"),  # (width, height), the same after the resize, left and top of the crop
    [
        ((224, 224), (224, 224), (0, 0)),
        ((500, 333), (336, 224), (56, 0)),
        ((333, 500), (224, 336), (0, 56)),
        ((225, 224), (225, 224), (0, 0)),  # round(0.5) is 0
        ((224, 227), (224, 227), (0, 2)),  # round(1.5) is 2
        ((301, 229), (294, 224), (35, 0)),  # 294.4 is cut, not rounded
        ((341, 256), (298, 224), (37, 0)),
        ((100, 37), (605, 224), (190, 0)),  # enlarged; round(190.5) is 190
        ((640, 427), (335, 224), (56, 0)),  # round(55.5) is 56
    ],
)
def test_preprocesses_as_the_original(size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]) -> None:
    image = photograph(*size)
    across = bicubic(np.asarray(image).swapaxes(0, 1), resized[0]).swapaxes(0, 1)
    both = bicubic(across, resized[1]) if resized != size else across
    left, top = corner
    crop = both[top : top + 224, left : left + 224].astype(np.float64) / 255
    expected = (crop - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels = clip_pixels(image, 224)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), rtol=0, atol=1e-3)


# Errors -----------------------------------------------------------------------------------------------------------------------


def test_names_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path)
    del tensors["blip.visual_encoder.blocks.1.attn.qkv.bias"], tensors["blip.visual_encoder.pos_embed"]
    tensors["mlp.layers.7.bias"] = torch.zeros(2)
    tensors["blip.text_encoder.pooler.dense.bias"] = torch.zeros(64)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(CheckpointError) as caught:
        load_network(tmp_path, torch.float32, torch.device("cpu"), heads=4)
    assert str(caught.value) == (
        f"{tmp_path / 'ImageReward.pt'}: missing tensors: blip.visual_encoder.blocks.1.attn.qkv.bias, "
        "blip.visual_encoder.pos_embed; unexpected tensors: blip.text_encoder.pooler.dense.bias; "
        "wrong shapes: mlp.layers.7.bias is [2], should be [1]"
    )


def test_bad_files_are_named(folder: Path, model: ScaleRAE, tmp_path: Path) -> None:
    def fails(kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            load_reward("imagereward", model, str(tmp_path))

    fails(CheckpointError, r"no ImageReward\.pt and no med_config\.json.*THUDM/ImageReward.*--reward siglip or")
    write_weights(tmp_path, widen=True)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY[:-5]))
    fails(CheckpointError, r"tokenizer")
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]))
    fails(CheckpointError, r"101 tokens with \[DEC\].*says 100 \(vocab_size\)")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "med_config.json").write_text('{"hidden_size": "64"}')
    fails(ConfigError, r"med_config\.json: hidden_size is '64'")
    config = json.loads((folder / "med_config.json").read_text())
    (tmp_path / "med_config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    fails(ConfigError, r"med_config\.json: not a usable config .*5")
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    torch.save({"x": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    fails(CheckpointError, r"ImageReward\.pt: has no vision tower")
    torch.save({"x": Path("code")}, tmp_path / "ImageReward.pt")
    fails(CheckpointError, r"ImageReward\.pt: refused, since loading it could run code")
    (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes()[:1000])
    fails(CheckpointError, r"ImageReward\.pt: damaged")
    with pytest.raises(CheckpointError, match=r"no such reward folder.*--reward-path FOLDER"):
        load_reward("imagereward", model, str(tmp_path / "nowhere"))


def test_unknown_names_list_the_choices(model: ScaleRAE) -> None:
    assert tuple(REWARDS) == options.REWARDS
    with pytest.raises(InputError, match="'clip': no such reward; use one of imagereward, siglip, pickscore, or none"):
        load_reward("clip", model)
    with pytest.raises(InputError, match="'none': stands for no reward"):
        load_reward("none", model)
