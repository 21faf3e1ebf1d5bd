"""The reward ImageReward-v1.0 (Xu et al. 2023, arXiv:2304.05977; REFERENCE §11): BLIP and an MLP that scores.

Files: ImageReward.pt and med_config.json of THUDM/ImageReward. The tokenizer is that of bert-base-uncased: tokenizer.json or
vocab.txt beside the weights or in a folder `tokenizer` there, else google-bert/bert-base-uncased, looked up like weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader, fill
from scale_rae.config import LARGEST_NUMBER, library_fields
from scale_rae.errors import CheckpointError, counted
from scale_rae.hub import Source
from scale_rae.images import Picture
from scale_rae.jsonio import Fields, read_json
from scale_rae.rewards import parts

REPO, TOKENIZER_REPO = "THUDM/ImageReward", "google-bert/bert-base-uncased"
WEIGHTS, CONFIG = "ImageReward.pt", "med_config.json"
TEXT_TOKENS = 35
SIDE, PATCH = 224, 16
HEAD_WIDTH = 64  # of ViT-L
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the MLP's output over the training set
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Stored parts that take no part in the score: BLIP's contrastive projections, and a counter."""


class ImageReward:
    """The loaded model. Computes in the checkpoint's dtype, the MLP always in float32."""

    name = "imagereward"

    def __init__(self, model: parts.Host, path: str | None = None) -> None:
        """Finds and loads the weights.

        Raises:
            ConfigError, CheckpointError, HubError: as `load_reward` says.
        """
        self.source = parts.locate(model, self.name, REPO, f"{WEIGHTS} and {CONFIG}", path, (WEIGHTS, CONFIG))
        folder = self.source.folder
        parts.require(folder, (WEIGHTS, CONFIG), self.name, REPO)
        self.tokenizer_source = _find_tokenizer(model, folder)
        if self.tokenizer_source.folder == folder:
            self.source = replace(self.source, files=(WEIGHTS, CONFIG, *self.tokenizer_source.files))
        self.tokenizer: Any = parts.read_tokenizer(self.tokenizer_source.folder, "bert")
        self.tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
        pad = self.tokenizer.token_to_id("[PAD]")
        if pad is None:
            raise CheckpointError(f"{self.tokenizer_source.folder}: the tokenizer has no token [PAD]")
        self.tokenizer.enable_truncation(TEXT_TOKENS)
        self.tokenizer.enable_padding(length=TEXT_TOKENS, pad_id=pad, pad_token="[PAD]")
        self._residency = model.residency
        self.network = load_network(folder, model.dtype, self._residency.home)
        self._part = self._residency.keep(self.name, self.network, [self.network])
        if self.tokenizer.get_vocab_size() != self.network.vocabulary:
            raise CheckpointError(
                f"{self.tokenizer_source.folder}: the tokenizer has {self.tokenizer.get_vocab_size()} tokens with [DEC] "
                f"and [ENC], but {folder / CONFIG} says {self.network.vocabulary} (vocab_size); use bert-base-uncased's"
            )
        self._device = model.device
        self._memory_errors = model.memory_errors

    @property
    def range(self) -> tuple[float, float]:
        """Unbounded: an MLP's output."""
        return -math.inf, math.inf

    @property
    def operations(self) -> float:
        """Those of the vision tower for one picture."""
        return parts.operations(self.network.vision, self.network.vision.config)

    def identity(self) -> dict[str, Any]:
        """The reward's name, and the files or commits of weights and tokenizer."""
        return parts.identity(self.name, self.source, "tokenizer", self.tokenizer_source)

    @torch.inference_mode()
    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        """Rewards, of mean 0 and deviation 1 over ImageReward's training set; the prompt is cut after 35 tokens."""
        text = self.tokenizer.encode(prompt)
        ids, mask = (torch.tensor([row], device=self._device) for row in (text.ids, text.attention_mask))  # [1, 35]
        scores: list[float] = []
        for batch in parts.batches(images):
            pixels = torch.from_numpy(np.stack([parts.clip_pixels(image, SIDE) for image in batch])).to(self._device)
            with (
                self._memory_errors(f"scoring {counted(len(batch), 'image')} at once"),
                self._residency.use(self._part),
            ):
                scores += self.network(pixels, ids.expand(len(batch), -1), mask.expand(len(batch), -1)).tolist()
        return parts.checked(scores, self.name)


class Network(nn.Module):
    """transformers' BLIP towers and the MLP. `text` is med_config.json; the vision tower is a ViT with patches of 16."""

    def __init__(self, text: dict[str, Any], width: int, depth: int, heads: int) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        sizes = {key: value for key, value in text.items() if key not in ("architectures", "model_type")}
        # The published model's text tower reads pictures of the vision tower's width, whatever encoder_width says.
        sizes |= {"encoder_hidden_size": width, "is_decoder": True, "use_cache": False}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes |= {"bos_token_id": None, "sep_token_id": None}  # for generating text, which this tower doesn't
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(BlipTextConfig(**sizes), add_pooling_layer=False)
        hidden = self.text.config.hidden_size
        self.mlp = nn.Sequential(  # dropout, which does nothing here, keeps the places 1, 3 and 5
            *(nn.Linear(hidden, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity()),
            *(nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    @property
    def vocabulary(self) -> int:
        """Tokens that the text tower knows."""
        return int(self.text.config.vocab_size)

    def image_embeds(self, pixels: Tensor) -> Tensor:
        """[N, 1 + 196, width] of normalised pixels [N, 3, 224, 224]."""
        return self.vision(pixels.to(self.vision.embeddings.patch_embedding.weight.dtype)).last_hidden_state

    def text_features(self, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The first token's hidden state [N, hidden] of prompts [N, T] that have seen the pictures."""
        output = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=embeds)
        return output.last_hidden_state[:, 0]

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards [N] float32."""
        features = self.text_features(self.image_embeds(pixels), ids, mask)
        return (self.mlp(features.float())[:, 0] - MEAN) / STD


def load_network(folder: Path, dtype: torch.dtype, device: torch.device, heads: int | None = None) -> Network:
    """The network of a folder with ImageReward.pt and med_config.json; `heads` of the vision tower if not 64 wide.

    Raises:
        ConfigError, CheckpointError: naming the file and what is wrong with it.
    """
    text = read_json(folder / CONFIG)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        Fields(text, folder / CONFIG).count(field, most=LARGEST_NUMBER)
    text = library_fields(text, folder / CONFIG)
    reader = TensorReader([folder / WEIGHTS])
    blocks, cls = "blip.visual_encoder.blocks.", reader.tensors.get("blip.visual_encoder.cls_token")
    depth = len({name.removeprefix(blocks).split(".")[0] for name in reader.tensors if name.startswith(blocks)})
    if cls is None or len(cls.shape) != 3 or not depth:
        raise CheckpointError(
            f"{folder / WEIGHTS}: has no vision tower (blip.visual_encoder.*); this is not ImageReward"
        )
    parts.check_depth(reader, text, folder / CONFIG)
    width = cls.shape[-1]
    network = parts.build(lambda: Network(text, width, depth, heads or width // HEAD_WIDTH), folder / CONFIG)
    # A parameter that stands under two names is stored under the first: the published ones come first.
    published: dict[str, nn.Module] = {
        "blip.visual_encoder.": _published(network.vision),
        "blip.text_encoder.": network.text,
        "mlp.layers.": network.mlp,
    }
    fill(
        published | {"network.": network},
        reader,
        dtype,
        device,
        keep_float32=lambda name: name.startswith("mlp."),
        ignore=lambda name: name.startswith(_UNUSED),
    )
    return network


def _published(vision: Any) -> nn.Module:
    """The vision tower's parts under the names of timm's ViT, as they are published."""
    blocks = [
        _named(
            norm1=layer.layer_norm1,
            attn=_named(qkv=layer.self_attn.qkv, proj=layer.self_attn.projection),
            norm2=layer.layer_norm2,
            mlp=layer.mlp,
        )
        for layer in vision.encoder.layers
    ]
    return _named(
        cls_token=vision.embeddings.class_embedding,
        pos_embed=vision.embeddings.position_embedding,
        patch_embed=_named(proj=vision.embeddings.patch_embedding),
        blocks=nn.ModuleList(blocks),
        norm=vision.post_layernorm,
    )


def _named(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _find_tokenizer(model: parts.Host, folder: Path) -> Source:
    for place in (folder, folder / "tokenizer"):
        for file in ("tokenizer.json", "vocab.txt"):
            if (place / file).is_file():
                return Source(place.name, place, files=(file,))
    return parts.locate_part(model, ImageReward.name, TOKENIZER_REPO, "tokenizer", "tokenizer.json")
