"""The language part in transformers, for reading: importing this module registers it with AutoConfig and AutoModelForCausalLM.

    import scale_rae.transformers
    language = AutoModelForCausalLM.from_pretrained("nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B")  # no remote code

It answers about latents that it is shown. It draws nothing: the DiT's weights are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from scale_rae.config import MODEL_TYPE, parse_config
from scale_rae.errors import ConfigError, InputError, counted
from scale_rae.language import projector
from scale_rae.prompt import IMAGE


class ReadingConfig(Qwen2Config):
    """The config.json of a checkpoint: a Qwen2 config, and the fields of the other parts."""

    model_type = MODEL_TYPE

    def __post_init__(self, **fields: Any) -> None:
        fields.pop("rope_scaling", None)  # not used by these checkpoints (REFERENCE §2)
        super().__post_init__(**fields)


class ReadingModel(Qwen2ForCausalLM):
    """transformers' Qwen2 with the projector of latents, `model.mm_projector`."""

    config_class = ReadingConfig
    _keys_to_ignore_on_load_unexpected = (r"^diff_head", r"^model\.latent_queries$", r"rotary_emb\.inv_freq$")

    def __init__(self, config: ReadingConfig) -> None:
        """Raises ConfigError for a config that is no Scale-RAE checkpoint's, or a student's, whose base model has the weights."""
        super().__init__(config)
        path = Path(config._name_or_path or ".") / "config.json"
        sizes = parse_config(config.to_dict(), path)
        if sizes.student is not None and sizes.student.base is not None:
            raise ConfigError(
                f"{path}: is a student, which has no language model of its own; load {sizes.student.base}"
            )
        self._latent_shape = sizes.tokens, sizes.channels
        self.model.mm_projector = projector(sizes.channels, sizes.hidden_size, sizes.projector_depth)
        self.post_init()

    @torch.no_grad()
    def inputs(self, ids: Sequence[int], latents: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """The arguments of `generate` for a conversation: ids with `prompt.IMAGE` in the place of each latent [L, C].

        `ChatTokenizer.chat(message, image=True)` gives such ids. A single latent needs no list.

        Raises:
            InputError: when the numbers of places and latents differ, or for a latent of another shape.
        """
        latents = [latents] if isinstance(latents, Tensor) and latents.dim() == 2 else list(latents)
        if list(ids).count(IMAGE) != len(latents):
            raise InputError(
                f"{counted(list(ids).count(IMAGE), 'place')} for images, but {counted(len(latents), 'latent')}: give one each"
            )
        for latent in latents:
            if tuple(latent.shape) != self._latent_shape:
                raise InputError(f"latent {list(latent.shape)}: this model reads {list(self._latent_shape)}")
        embed = self.get_input_embeddings()
        shown = iter(latents)
        parts = []
        for number in ids:
            if number == IMAGE:
                parts.append(self.model.mm_projector(next(shown).to(self.device, self.dtype)))
            else:
                parts.append(embed(torch.tensor([number], device=self.device)))
        embedded = torch.cat(parts)[None]  # [1, T, H]
        mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        return {"inputs_embeds": embedded, "attention_mask": mask}


AutoConfig.register(MODEL_TYPE, ReadingConfig)
AutoModelForCausalLM.register(ReadingConfig, ReadingModel)
