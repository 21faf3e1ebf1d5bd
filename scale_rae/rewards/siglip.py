"""The reward SigLIP (Zhai et al. 2023, arXiv:2303.15343): similarity of picture and prompt in the checkpoint's own encoder.

The vision tower is the model's own encoder; the text tower is in the same folder or hub repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader, fill
from scale_rae.config import library_fields
from scale_rae.errors import CheckpointError, ConfigError, ScaleRAEError, counted
from scale_rae.hub import weight_files
from scale_rae.images import Picture
from scale_rae.jsonio import read_json
from scale_rae.provenance import file_record
from scale_rae.rewards import parts


def why_unusable(model: parts.Host) -> ScaleRAEError | None:
    """Why the model's encoder cannot rank pictures; None when it is a SigLIP with its text tower."""
    encoder, source = model.encoder, model.encoder_source
    assert source is not None
    folder = source.folder
    no_text = f"{folder}: the reward siglip needs an encoder with a text tower, and this"
    instead = "use --reward imagereward, pickscore or none"
    if encoder.kind != "siglip" or not isinstance(read_json(folder / "config.json").get("text_config"), dict):
        kind = "DINOv2" if encoder.kind == "dinov2" else f"{encoder.kind} (config.json)"
        return ConfigError(f"{no_text} is a {kind} without one; {instead}")
    if not any(name.startswith("text_model.") for name in TensorReader(weight_files(folder)).tensors):
        return CheckpointError(f"{no_text} one's weights hold none (text_model.*); {instead}")
    if not getattr(encoder.model.config, "vision_use_head", True):
        return ConfigError(f"{no_text} one has no pooled image embedding (vision_use_head false); {instead}")
    return None


class SiglipReward:
    """SigLIP's logit of a picture and a text: cosine · exp(logit_scale) + logit_bias."""

    name = "siglip"

    def __init__(self, model: parts.Host) -> None:
        """Loads the text tower beside the model's encoder.

        Raises:
            ConfigError: when the encoder is a DINOv2, or a SigLIP without its text tower.
            CheckpointError: naming the file and what is wrong with it.
        """
        from transformers import SiglipTextConfig, SiglipTextModel

        self._encoder = encoder = model.encoder
        assert model.encoder_source is not None
        self.source = model.encoder_source
        if (problem := why_unusable(model)) is not None:
            raise problem
        folder = self.source.folder
        fields = library_fields(read_json(folder / "config.json")["text_config"], folder / "config.json")
        reader = TensorReader(weight_files(folder))
        parts.check_depth(reader, fields, folder / "config.json")
        self._text: Any = parts.build(lambda: SiglipTextModel(SiglipTextConfig(**fields)), folder / "config.json")
        self._logit = parts.build(_Logit, folder)
        config = self._text.config
        if config.projection_size != encoder.channels:
            raise ConfigError(
                f"{folder / 'config.json'}: text embeddings are {config.projection_size} wide (text_config.projection_size),"
                f" image embeddings {encoder.channels}"
            )
        fill(
            {"text_model.": self._text, "": self._logit},
            reader,
            model.dtype,
            model.residency.home,
            keep_float32=lambda name: name.startswith("logit_"),
            ignore=lambda name: name.startswith("vision_model.") or name.endswith("position_ids"),
        )
        self._residency = model.residency
        self._part = self._residency.keep(self.name, [self._text, self._logit], [self._text])
        self.tokenizer: Any = parts.read_tokenizer(folder, "qwen2")
        if self.tokenizer.get_vocab_size() > config.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {self.tokenizer.get_vocab_size()} tokens, the text tower {config.vocab_size}"
            )
        length = config.max_position_embeddings
        self.tokenizer.enable_truncation(length)
        # SigLIP reads the last place, padding or not, and was trained on texts of full length.
        self.tokenizer.enable_padding(length=length, pad_id=parts.pad_id(folder, self.tokenizer))
        self._memory_errors = model.memory_errors

    @property
    def range(self) -> tuple[float, float]:
        """The scores of opposite and of equal embeddings."""
        scale, bias = float(self._logit.logit_scale.exp()), float(self._logit.logit_bias)
        return bias - scale, bias + scale

    @property
    def operations(self) -> float:
        """Those of the vision tower for one picture."""
        return parts.operations(self._encoder.model, self._encoder.model.config)

    def identity(self) -> dict[str, Any]:
        """The reward's name, and the files or commit of the encoder."""
        return {"name": self.name, "weights": file_record(self.source)}

    def text_embeds(self, text: str) -> Tensor:
        """[1, D] of a text, lower-cased as SigLIP's training texts were."""
        ids = torch.tensor([self.tokenizer.encode(text.lower()).ids], device=self._encoder.device)  # [1, T]
        with self._residency.use(self._part):
            return self._text(input_ids=ids).pooler_output

    @torch.inference_mode()
    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        """Logits: above 0 SigLIP finds that picture and prompt belong together."""
        encoder, text = self._encoder, self.text_embeds(prompt)
        scores: list[float] = []
        for batch in parts.batches(images):
            pixels = encoder.preprocess(batch).to(encoder.device, encoder.dtype)
            with self._memory_errors(f"scoring {counted(len(batch), 'image')} at once"), self._residency.use("encoder"):
                pictures = encoder.model(pixels).pooler_output  # [N, D]
            logits = parts.similarity(pictures, text) * self._logit.logit_scale.exp() + self._logit.logit_bias
            scores += logits.tolist()
        return parts.checked(scores, self.name)


class _Logit(nn.Module):
    """SigLIP's scale (its logarithm) and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))
