"""Reads and checks the config.json of models, encoders and decoders. Values that no published checkpoint has are refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_rae.errors import ConfigError
from scale_rae.jsonio import MOST_COUNT, Fields, read_json
from scale_rae.student import Student, parse_student

MODEL_TYPE = "cambrian_qwen"
# Limits far beyond any checkpoint: building a network beyond them would take hours before it fails.
_DEEPEST, _MOST_TOKENS = 1 << 10, 1 << 14
_WIDEST_HEAD = 1 << 10  # a rotary table has tokens x width of a head numbers
LARGEST_NUMBER = 1 << 24  # in a config that a library reads


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a velocity network.

    `encoder_depth` None is the plain DiT. Otherwise the first `encoder_depth` blocks read the latent and make a
    per-token condition for the remaining `depth - encoder_depth` blocks (DDT), whose width and heads are
    `decoder_width` and `decoder_heads` (equal to `width` and `heads` except in the wide DDT).
    """

    channels: int  # C
    tokens: int  # L
    condition_width: int  # Z
    width: int  # D
    depth: int
    heads: int
    encoder_depth: int | None = None
    decoder_width: int | None = None
    decoder_heads: int | None = None
    wide: bool = False  # a wide DDT projects s when its widths differ
    null_condition: bool = True

    @property
    def side(self) -> int:
        """S, tokens along one edge of the latent grid."""
        return math.isqrt(self.tokens)


@dataclass(frozen=True)
class ScaleRAEConfig:
    """A checkpoint's sizes and parts. `language` is the Qwen2 part as transformers reads it."""

    language: dict[str, Any]
    hidden_size: int
    vocab_size: int
    tokens: int  # L, image tokens
    channels: int  # C, latent channels
    projector_depth: int  # Linears of an mlpNx_gelu mm_projector; 0 is a single Linear of its own
    image_markers: bool  # <im_start> and <im_end> around an image in a message
    encoder_name: str
    encoder_layer: int  # which hidden state of a SigLIP encoder is the latent
    dit: DiTConfig
    condition_projector: bool  # diff_head_projector is there
    base_dim: int
    tied_embeddings: bool
    max_length: int  # tokens of one conversation
    vae: str | None = None  # the VAE of a FLUX-VAE-aligned checkpoint, which cannot read its own latents
    student: Student | None = None  # how a distilled model is sampled


def check_numbers(raw: dict[str, Any], path: Path, most: int) -> None:
    """Raises ConfigError if any number in a config is larger than `most`, since libraries allocate memory by it."""
    for field, value in raw.items():
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict | list):
                waiting += part.values() if isinstance(part, dict) else part
            elif isinstance(part, int | float) and not -most <= part <= most:
                raise ConfigError(f"{path}: {field} holds {repr(part)[:40]}; at most {most} is supported")


def library_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a network's config that transformers gets: without labels, and with bounded numbers.

    Raises:
        ConfigError: naming the file and the field.
    """
    check_numbers(raw, path, LARGEST_NUMBER)
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 < layers <= _DEEPEST:
        raise ConfigError(f"{path}: num_hidden_layers is {layers}; must be 1 to {_DEEPEST}")
    return {
        key: library_fields(value, path) if isinstance(value, dict) else value  # text_config, vision_config
        for key, value in raw.items()
        if key not in ("num_labels", "id2label", "label2id")
    }


def _is_count(value: object, most: int = MOST_COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def load_config(folder: Path) -> ScaleRAEConfig:
    """Reads and checks `folder`/config.json.

    Raises:
        ConfigError: naming the file and the field that is missing, of the wrong type, or unsupported.
    """
    path = folder / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> ScaleRAEConfig:
    """`load_config` on an object already read; `path` is only for error messages."""
    fields = Fields(raw, path)
    model_type = fields.get("model_type", str)
    if model_type != MODEL_TYPE:
        raise fields.fail("model_type", f"is {model_type!r}: not a Scale-RAE checkpoint, which has {MODEL_TYPE!r}")
    loss = fields.choice("vision_loss", ("diffusion-loss", "ddt-loss"))
    vae = fields.get("generation_alignment_tower", str, None) or None
    fields.choice("vision_loss_mode", ("query",))
    fields.choice("dit_cls", ("DiT",), "DiT")
    fields.choice("mm_vision_select_feature", ("patch",), "patch")

    hidden = fields.count("hidden_size")
    lengths = fields.get("vision_tower_aux_token_len_list", list, [256])
    if len(lengths) != 1 or not _is_count(lengths[0], _MOST_TOKENS):
        raise fields.fail("vision_tower_aux_token_len_list", f"is {lengths}; must hold one whole number of tokens")
    tokens: int = lengths[0]
    if math.isqrt(tokens) ** 2 != tokens:
        raise fields.fail("vision_tower_aux_token_len_list", f"is {lengths}; must be a square number of tokens")
    towers = fields.get("mm_vision_tower_aux_list", list)
    if len(towers) != 1 or not isinstance(towers[0], str) or not towers[0]:
        raise fields.fail("mm_vision_tower_aux_list", f"is {towers}; must name one encoder")
    projector = fields.get("mm_projector_type", str, "linear")
    match = re.fullmatch(r"linear|mlp([1-9]\d?)x_gelu", projector)
    if not match:
        raise fields.fail("mm_projector_type", f"{projector!r} is not supported (supported: linear, mlpNx_gelu)")
    channels = fields.count("diffusion_model_channels", 1152)
    if vae is not None and channels % 4:
        raise fields.fail(
            "diffusion_model_channels",
            f"is {channels}; with a generation_alignment_tower it must be 4 times the channels of its VAE",
        )
    z_channels = fields.count("diffusion_model_z_channels", 0, least=0)
    dropout = fields.get("diffusion_class_dropout_prob", (int, float), 0.1)
    if not 0 <= dropout <= 1:
        raise fields.fail("diffusion_class_dropout_prob", f"is {dropout}; must be 0 to 1")

    return ScaleRAEConfig(
        language=_language_config(fields),
        hidden_size=hidden,
        vocab_size=fields.count("vocab_size", most=1 << 24),
        tokens=tokens,
        channels=channels,
        projector_depth=int(match[1] or 0),
        image_markers=fields.get("mm_use_im_start_end", bool, False),
        encoder_name=towers[0],
        encoder_layer=fields.get("mm_vision_select_layer", int, -1),
        dit=_dit_config(fields, loss, channels, tokens, z_channels or hidden, null_condition=dropout > 0),
        condition_projector=z_channels > 0,
        base_dim=fields.count("diffusion_base_dim", 4096),
        tied_embeddings=fields.get("tie_word_embeddings", bool, False),
        max_length=min(
            fields.count("max_position_embeddings", 32768, most=1 << 30),
            fields.count("tokenizer_model_max_length", 1 << 30, most=1 << 200),  # transformers writes 1e30 for "any"
        ),
        vae=vae,
        student=parse_student(fields),
    )


def _dit_config(
    fields: Fields, loss: str, channels: int, tokens: int, condition_width: int, null_condition: bool
) -> DiTConfig:
    sizes = {}
    names = ("diffusion_model_hidden_size", "diffusion_model_depth", "diffusion_model_heads")
    for name in names:
        value = fields.get(name, (int, list))
        values = value if isinstance(value, list) else [value]
        most = _DEEPEST if name.endswith("depth") else MOST_COUNT
        if len(values) not in (1, 2) or not all(_is_count(v, most) for v in values):
            raise fields.fail(name, f"is {value}; must be a positive whole number (at most {most}) or a list of two")
        sizes[name] = values
    widths, depths, heads = (sizes[name] for name in names)
    wide = len(widths) == 2
    if not len(widths) == len(depths) == len(heads):
        raise fields.fail("diffusion_model_hidden_size, _depth, _heads", "must all be numbers or all lists of two")
    if wide and loss != "ddt-loss":
        raise fields.fail("diffusion_model_hidden_size", f"is a list, which needs vision_loss 'ddt-loss', not {loss!r}")
    for width, head_count in zip(widths, heads, strict=True):
        if width % head_count or (width // head_count) % 4:
            raise fields.fail(
                "diffusion_model_heads", f"is {head_count}: width {width} must divide into heads of a multiple of 4"
            )
        if width // head_count > _WIDEST_HEAD:
            raise fields.fail(
                "diffusion_model_heads",
                f"is {head_count}: width {width} must divide into heads of at most {_WIDEST_HEAD}",
            )
    encoder_depth = None
    if loss == "ddt-loss":
        encoder_depth = depths[0] if wide else fields.count("ddt_encoder_depth")
        if encoder_depth >= sum(depths):
            raise fields.fail("ddt_encoder_depth", f"is {encoder_depth}; must be below the depth {sum(depths)}")
    return DiTConfig(
        channels=channels,
        tokens=tokens,
        condition_width=condition_width,
        width=widths[0],
        depth=sum(depths),
        heads=heads[0],
        encoder_depth=encoder_depth,
        decoder_width=widths[-1],
        decoder_heads=heads[-1],
        wide=wide,
        null_condition=null_condition,
    )


def _language_config(fields: Fields) -> dict[str, Any]:
    """The Qwen2 fields; the published rope_scaling is ignored, as the official code ignores it."""
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    groups = fields.count("num_key_value_heads", heads)
    if hidden % heads or (hidden // heads) % 2:
        raise fields.fail("num_attention_heads", f"is {heads}: hidden_size {hidden} must divide into even heads")
    if hidden // heads > _WIDEST_HEAD:
        raise fields.fail(
            "num_attention_heads", f"is {heads}: hidden_size {hidden} must divide into heads of at most {_WIDEST_HEAD}"
        )
    if heads % groups:
        raise fields.fail("num_key_value_heads", f"is {groups}; must divide num_attention_heads {heads}")
    rope = fields.get("rope_parameters", dict, {})  # where transformers 5 writes rope_theta
    theta = Fields(rope, fields.where).positive("rope_theta", 10000.0)
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": fields.count("intermediate_size"),
        "num_hidden_layers": fields.count("num_hidden_layers", most=_DEEPEST),
        "vocab_size": fields.count("vocab_size", most=1 << 24),
        "max_position_embeddings": fields.count("max_position_embeddings", 32768, most=1 << 30),
        "rope_theta": fields.positive("rope_theta", theta),
        "rms_norm_eps": fields.positive("rms_norm_eps", 1e-6),
        "hidden_act": fields.choice("hidden_act", ("silu",), "silu"),
        "tie_word_embeddings": fields.get("tie_word_embeddings", bool, False),
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


# --- pixel decoders and encoders --------------------------------------------------------------------------------------

_MOST_OF_DECODERS = {"depth": 1 << 10, "image": 1 << 13, "patch": 1 << 13}  # no published decoder comes near


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a pixel decoder; `channels` is C of the latents it decodes."""

    channels: int
    width: int
    depth: int
    heads: int
    inner: int
    patch: int
    image: int
    eps: float

    @property
    def patches(self) -> int:
        """Patches (and so tokens) along one edge of the image."""
        return self.image // self.patch


def load_decoder_config(folder: Path, channels: int) -> DecoderConfig:
    """Reads and checks a decoder's config.json. `channels` comes from its weights: published configs misstate it.

    Raises:
        ConfigError: naming the file and the field that is missing or not usable.
    """
    path = folder / "config.json"
    return parse_decoder_config(read_json(path), path, channels)


def parse_decoder_config(raw: dict[str, Any], path: Path, channels: int) -> DecoderConfig:
    """`load_decoder_config` on an object already read; `path` is only for error messages."""
    fields = Fields(raw, path)
    names = {
        "width": "decoder_hidden_size",
        "depth": "decoder_num_hidden_layers",
        "heads": "decoder_num_attention_heads",
        "inner": "decoder_intermediate_size",
        "patch": "patch_size",
        "image": "image_size",
    }
    sizes = {ours: fields.count(name, most=_MOST_OF_DECODERS.get(ours, MOST_COUNT)) for ours, name in names.items()}
    fields.choice("hidden_act", ("gelu",), "gelu")
    eps = fields.positive("layer_norm_eps") if "layer_norm_eps" in fields.raw else 1e-12
    if eps >= 1:
        raise fields.fail("layer_norm_eps", f"is {eps}; must be a small positive number")
    config = DecoderConfig(channels=channels, **sizes, eps=eps)
    if config.image % config.patch:
        raise fields.fail("image_size", f"{config.image} is not a multiple of patch_size {config.patch}")
    if config.width % config.heads:
        raise fields.fail("decoder_hidden_size", f"{config.width} does not divide into {config.heads} heads")
    return config


ENCODERS = ("siglip", "siglip_vision_model", "dinov2")
NOT_VISION = ("text_model.", "logit_scale", "logit_bias", "classifier.")  # parts of an encoder's file that are not used
_MOST_PATCHES = 256  # along an edge of an image
_SIZES = {  # transformers' defaults, and the most there may be
    "hidden_size": (768, 1 << 20),
    "num_hidden_layers": (12, 1 << 10),
    "num_attention_heads": (12, 1 << 10),
    "num_channels": (3, 3),
    "image_size": (224, 1 << 13),
}
_SIGLIP = _SIZES | {"patch_size": (16, 1 << 13), "intermediate_size": (3072, 1 << 20)}
_DINO = _SIZES | {"patch_size": (14, 1 << 13)}


@dataclass(frozen=True)
class VisionConfig:
    """Kind (one of ENCODERS) and sizes of a vision model, and all fields of its config for transformers."""

    kind: str
    width: int
    layers: int
    image: int
    patch: int
    fields: dict[str, Any]


def encoder_kind(raw: dict[str, Any], path: Path) -> str:
    """The `model_type` of an encoder's config.json. Raises ConfigError, naming the file, for one that is not in ENCODERS."""
    kind = raw.get("model_type")
    if kind not in ENCODERS:
        raise ConfigError(f"{path}: model_type {kind!r} is not a supported encoder (supported: {', '.join(ENCODERS)})")
    return str(kind)


def parse_vision_config(raw: dict[str, Any], path: Path) -> VisionConfig:
    """The vision model that an encoder's config.json describes, with transformers' defaults.

    Raises:
        ConfigError: naming the file, for a model that is no supported encoder, and for sizes that no encoder has.
    """
    kind = encoder_kind(raw, path)
    vision = Fields(raw, path).get("vision_config", dict) if kind == "siglip" else raw
    fields = Fields(vision, f"{path}: not a usable encoder config")
    limits = _DINO if kind == "dinov2" else _SIGLIP
    sizes = {field: fields.count(field, default, most=most) for field, (default, most) in limits.items()}
    if sizes["image_size"] // sizes["patch_size"] > _MOST_PATCHES:
        problem = f"{sizes['image_size']} has more than {_MOST_PATCHES} patches of {sizes['patch_size']} per edge"
        raise fields.fail("image_size", problem)
    return VisionConfig(
        kind=kind,
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        image=sizes["image_size"],
        patch=sizes["patch_size"],
        fields=library_fields(vision, path),
    )
