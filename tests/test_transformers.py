"""The language part in transformers answers as ScaleRAE does."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scale_rae import ScaleRAE
from scale_rae.errors import ConfigError, InputError
from scale_rae.hub import BUNDLED
from tests.helpers.late import Late

reading = Late("scale_rae.transformers")


@pytest.fixture
def auto() -> Any:
    """The module transformers, to which the package's module has been added."""
    importlib.import_module("scale_rae.transformers")
    return importlib.import_module("transformers")


def test_answers_are_the_models(auto: Any) -> None:
    model = ScaleRAE.from_pretrained("shapes", device="cpu")
    loaded, info = auto.AutoModelForCausalLM.from_pretrained(
        model.source.folder, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(loaded, reading.ReadingModel)
    assert not any(info.values())
    shape = (model.config.tokens, model.config.channels)
    with torch.inference_mode():  # as latents are drawn and encoded
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    chat = model.tokenizer.chat("Describe this image.", image=True)
    end = model.tokenizer.chat_end
    inputs = loaded.inputs(chat, latent)
    made = loaded.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=end)
    ids = [number for number in made[0].tolist() if number != end]
    assert ids == model.answer("Describe this image.", latents=latent, max_new_tokens=8)[0].reply.ids
    with pytest.raises(InputError, match="1 place for images, but 2 latents"):
        loaded.inputs(chat, [latent, latent])
    with pytest.raises(InputError, match=r"latent \[64, 3\]: this model reads \[64, 96\]"):
        loaded.inputs(chat, [latent[:, :3]])


def test_a_student_has_no_language_model_of_its_own(auto: Any) -> None:
    """transformers would fill in what is missing by chance."""
    with pytest.raises(ConfigError, match=r"shapes-4.config.json: is a student, .*; load shapes$"):
        auto.AutoModelForCausalLM.from_pretrained(BUNDLED["shapes-4"])


def test_scaled_rotation_is_passed_over(auto: Any, tmp_path: Path) -> None:
    raw = json.loads((BUNDLED["shapes"] / "config.json").read_text())
    scaled = raw | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    config = auto.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, reading.ReadingConfig)
    assert config.rope_parameters["rope_type"] == "default"
