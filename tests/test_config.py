"""config.json: what is read, and how everything else is refused by file and field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_rae.config import ScaleRAEConfig, load_config, parse_config
from scale_rae.dit import DiT
from scale_rae.errors import ConfigError
from scale_rae.jsonio import read_json
from scale_rae.language import LanguageModel
from tests.helpers.made_checkpoints import golden_case

PATH = Path("some/folder/config.json")
BASE: dict[str, dict[str, Any]] = {name: golden_case(name)["model"]["config"] for name in ("siglip", "ddt", "wide")}


def parse(case: str = "siglip", **changes: Any) -> ScaleRAEConfig:
    return parse_config(BASE[case] | changes, PATH)


def test_golden_configs() -> None:
    plain, ddt, wide = parse("siglip"), parse("ddt"), parse("wide")
    assert (plain.tokens, plain.channels, plain.projector_depth, plain.image_markers) == (256, 768, 2, True)
    assert plain.dit.encoder_depth is None
    assert ddt.dit.encoder_depth == BASE["ddt"]["ddt_encoder_depth"]
    assert wide.dit.wide
    assert wide.dit.depth == sum(BASE["wide"]["diffusion_model_depth"])
    assert not wide.condition_projector
    assert wide.dit.condition_width == wide.hidden_size


def test_optional_fields_have_the_official_defaults() -> None:
    optional = ["diffusion_model_channels", "diffusion_base_dim", "dit_cls", "vision_tower_aux_token_len_list"]
    optional += ["diffusion_class_dropout_prob", "mm_use_im_start_end", "mm_vision_select_layer", "rms_norm_eps"]
    config = parse_config({k: v for k, v in BASE["siglip"].items() if k not in optional}, PATH)
    assert (config.channels, config.base_dim, config.tokens, config.encoder_layer) == (1152, 4096, 256, -1)
    assert config.dit.null_condition
    assert not config.image_markers


def test_rope_theta_is_found_in_both_layouts() -> None:
    assert parse(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0}).language["rope_theta"] == 5e5
    moved = {k: v for k, v in BASE["siglip"].items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 7e5}}
    assert parse_config(moved, PATH).language["rope_theta"] == 7e5


def test_length_of_a_conversation() -> None:
    assert parse(tokenizer_model_max_length=700).max_length == 700
    assert parse(tokenizer_model_max_length=10**30).max_length == BASE["siglip"]["max_position_embeddings"]


BAD: list[tuple[str, Any]] = [
    ("model_type", "llama"),
    ("model_type", None),
    ("vision_loss", "regression-loss"),
    ("vision_loss", None),
    ("vision_loss_mode", "block"),
    ("dit_cls", "LightningDiT"),
    ("mm_vision_select_feature", "cls_patch"),
    ("hidden_size", None),
    ("hidden_size", "64"),
    ("hidden_size", 64.0),
    ("hidden_size", True),
    ("hidden_size", 0),
    ("hidden_size", 10**9),
    ("vocab_size", -1),
    ("num_hidden_layers", 10**7),
    ("num_hidden_layers", [3]),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 3),
    ("intermediate_size", None),
    ("hidden_act", "relu"),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", float("nan")),
    ("rope_theta", -1.0),
    ("rope_theta", 10**400),
    ("tie_word_embeddings", 1),
    ("max_position_embeddings", 0),
    ("tokenizer_model_max_length", 0),
    ("mm_use_im_start_end", "true"),
    ("mm_projector_type", "mlp0x_gelu"),
    ("mm_projector_type", "mlp2x_silu"),
    ("mm_projector_type", "resampler"),
    ("mm_vision_tower_aux_list", []),
    ("mm_vision_tower_aux_list", ["a/b", "c/d"]),
    ("mm_vision_tower_aux_list", "a/b"),
    ("mm_vision_tower_aux_list", [""]),
    ("mm_vision_select_layer", [-1]),
    ("vision_tower_aux_token_len_list", [250]),
    ("vision_tower_aux_token_len_list", [True]),
    ("vision_tower_aux_token_len_list", [256, 256]),
    ("vision_tower_aux_token_len_list", [10**12]),
    ("diffusion_model_channels", 0),
    ("diffusion_model_z_channels", -1),
    ("diffusion_base_dim", 0),
    ("diffusion_class_dropout_prob", -0.1),
    ("diffusion_class_dropout_prob", float("nan")),
    ("diffusion_class_dropout_prob", True),
    ("diffusion_model_hidden_size", [64, 96]),
    ("diffusion_model_hidden_size", None),
    ("diffusion_model_heads", 5),
    ("diffusion_model_heads", 32),
    ("diffusion_model_heads", [True, 4]),
    ("diffusion_model_depth", 10**6),
    ("diffusion_model_depth", [1, 2, 3]),
    ("generation_alignment_tower", 3),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_field_is_named_with_its_file(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE["siglip"] | {field: value}, PATH)
    assert str(caught.value).startswith(f"{PATH}: {field}")
    assert "\n" not in str(caught.value)


def test_fields_of_a_ddt_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="ddt_encoder_depth is 99; must be below the depth"):
        parse("ddt", ddt_encoder_depth=99)
    with pytest.raises(ConfigError, match="diffusion_model_hidden_size is a list, which needs vision_loss 'ddt-loss'"):
        parse("wide", vision_loss="diffusion-loss")


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["ddt-loss", "diffusion-loss", "mlp1x_gelu", "linear", "silu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=st.sampled_from(sorted(BASE)), data=st.data())
def test_any_config_is_read_or_refused(case: str, data: st.DataObject) -> None:
    raw = copy.deepcopy(BASE[case])
    for field in data.draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=3, unique=True)):
        if data.draw(st.booleans()):
            raw[field] = data.draw(_values)
        else:
            del raw[field]
    try:
        config = parse_config(raw, PATH)
    except ConfigError as e:
        assert str(e).startswith(f"{PATH}: ")  # noqa: PT017 - refusing is as good as reading
        return
    small = (
        max(config.dit.depth, config.language["num_hidden_layers"]) < 20 and config.tokens * config.dit.width < 10**6
    )
    if small and config.projector_depth < 5:
        with torch.device("meta"):  # what was accepted can be built
            LanguageModel(config)
            DiT(config.dit)


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | _values.map(lambda v: json.dumps(v).encode())
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        assert isinstance(read_json(file), dict)
    except ConfigError as e:
        assert str(file) in str(e)  # noqa: PT017


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 10_000, "[]", "", "{", '{"a": 1} x'])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: is a folder"):
        load_config(tmp_path)
