"""Names and shapes of a checkpoint's tensors, known from its config, against the networks that load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.made_up import config_json, decoder_json
from scale_rae.config import (
    DecoderConfig,
    ScaleRAEConfig,
    load_config,
    load_decoder_config,
    parse_config,
    parse_decoder_config,
)
from scale_rae.decoder import PixelDecoder
from scale_rae.dit import DiT
from scale_rae.hub import BUNDLED
from scale_rae.language import LanguageModel
from scale_rae.layout import DIT_PREFIX, compare, decoder_layout, dit_layout, language_layout, model_layout
from tests.conftest import GOLDEN_CASES

PUBLISHED = ("1.5b", "7b")


def configs(checkpoints: dict[str, Path]) -> list[ScaleRAEConfig]:
    made = [parse_config(config_json(size), Path("config.json")) for size in PUBLISHED]
    linear = parse_config(
        {**config_json("tiny"), "mm_projector_type": "linear", "diffusion_class_dropout_prob": 0}, Path("c")
    )
    return [load_config(BUNDLED["shapes"]), *(load_config(checkpoints[name]) for name in GOLDEN_CASES), *made, linear]


def test_the_networks_have_these_names_and_shapes(checkpoints: dict[str, Path]) -> None:
    for config in configs(checkpoints):
        with torch.device("meta"):
            language, dit = LanguageModel(config), DiT(config.dit)
        assert language_layout(config) == {n: tuple(p.shape) for n, p in language.named_parameters()}
        assert dit_layout(config.dit) == {DIT_PREFIX + n: tuple(p.shape) for n, p in dit.named_parameters()}


def test_the_decoder_has_these_names_and_shapes(checkpoints: dict[str, Path]) -> None:
    folders = [BUNDLED["shapes"] / "decoder", *(checkpoints[name].parent / "decoder" for name in GOLDEN_CASES)]
    found: list[DecoderConfig] = [load_decoder_config(folder, 24) for folder in folders]
    found.append(parse_decoder_config(decoder_json("1.5b"), Path("config.json"), 1152))
    for config in found:
        with torch.device("meta"):
            decoder = PixelDecoder(config)
        assert decoder_layout(config) == {n: tuple(p.shape) for n, p in decoder.named_parameters()}


def test_a_tied_head_is_no_tensor_of_its_own() -> None:
    tied, untied = (parse_config(config_json(size), Path("config.json")) for size in PUBLISHED)
    assert "lm_head.weight" not in model_layout(tied)
    assert "lm_head.weight" in model_layout(untied)


def test_differences_in_words() -> None:
    expected = {"a": (1, 2), "b": (3,), "c": (4,)}
    assert str(compare(expected, expected)) == ""
    text = str(compare(expected, {"a": (2, 1), "b": (3,), "d": (4,)}))
    assert text == "missing tensors: c; unexpected tensors: d; wrong shapes: a is [2, 1], should be [1, 2]"


@pytest.mark.parametrize(("count", "text"), [(20, "n19"), (23, "n19 and 3 more")])
def test_long_lists_are_cut(count: int, text: str) -> None:
    names = {f"n{i:02}": (1,) for i in range(count)}
    assert str(compare(names, {})).endswith(text)
