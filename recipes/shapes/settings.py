"""Sizes of the model and the configs they make; two presets, the bundled model and a tiny one for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scale_rae.config import DecoderConfig

ENCODER_NAME = "shapes/siglip-patch16-128"
CAPTION_TOKENS = 32  # length that SigLIP's text tower reads, padded
BASE_DIM = 768  # leans the times to noise (shift 2.8): where things go and what they are is decided above t = 0.7
CLASS_DROPOUT = 0.1
PIXEL_MEAN = PIXEL_STD = 0.5  # of the encoder's image processor: pixels run from -1 to 1


@dataclass(frozen=True)
class Preset:
    """Sizes. Widths in channels, pictures in pixels."""

    image: int = 128
    patch: int = 16
    channels: int = 96  # C, and the encoder's width
    encoder_depth: int = 8
    encoder_heads: int = 3
    text_depth: int = 2
    decoder_width: int = 160
    decoder_depth: int = 6
    decoder_heads: int = 5
    language_width: int = 256
    language_inner: int = 512
    language_depth: int = 5
    language_heads: int = 4
    language_kv_heads: int = 2
    dit_width: int = 256
    dit_depth: int = 8
    dit_heads: int = 4
    z_channels: int = 192

    @property
    def side(self) -> int:
        """S, tokens along one edge of the latent grid."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """L, image tokens."""
        return self.side**2


FULL = Preset()
TINY = Preset(
    image=64,
    channels=32,
    encoder_depth=2,
    encoder_heads=2,
    text_depth=1,
    decoder_width=48,
    decoder_depth=1,
    decoder_heads=3,
    language_width=48,
    language_inner=96,
    language_depth=2,
    language_heads=4,
    language_kv_heads=2,
    dit_width=48,
    dit_depth=2,
    dit_heads=3,
    z_channels=32,
)


def encoder_config(preset: Preset, vocabulary: int, pad: int, end: int) -> dict[str, Any]:
    """config.json of the encoder: transformers' SiglipModel."""
    shared = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
    width = {"hidden_size": preset.channels, "intermediate_size": 4 * preset.channels}
    heads = {"num_attention_heads": preset.encoder_heads}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            **shared,
            **width,
            **heads,
            "num_hidden_layers": preset.text_depth,
            "vocab_size": vocabulary,
            "max_position_embeddings": CAPTION_TOKENS,
            "projection_size": preset.channels,
            "bos_token_id": pad,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **shared,
            **width,
            **heads,
            "num_hidden_layers": preset.encoder_depth,
            "image_size": preset.image,
            "patch_size": preset.patch,
            "num_channels": 3,
        },
    }


def preprocessor_config(preset: Preset) -> dict[str, Any]:
    """preprocessor_config.json of the encoder."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"height": preset.image, "width": preset.image},
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }


def decoder_config(preset: Preset) -> dict[str, Any]:
    """config.json of the pixel decoder, in vit_mae's layout; `hidden_size` is C."""
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "attention_probs_dropout_prob": 0.0,
        "decoder_hidden_size": preset.decoder_width,
        "decoder_intermediate_size": 4 * preset.decoder_width,
        "decoder_num_attention_heads": preset.decoder_heads,
        "decoder_num_hidden_layers": preset.decoder_depth,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": preset.channels,
        "image_size": preset.image,
        "initializer_range": 0.02,
        "intermediate_size": 4 * preset.channels,
        "layer_norm_eps": 1e-6,
        "mask_ratio": 0.0,
        "norm_pix_loss": False,
        "num_attention_heads": preset.encoder_heads,
        "num_channels": 3,
        "num_hidden_layers": preset.encoder_depth,
        "patch_size": preset.patch,
        "qkv_bias": True,
    }


def decoder_sizes(preset: Preset) -> DecoderConfig:
    """`decoder_config` as the package's dataclass."""
    return DecoderConfig(
        channels=preset.channels,
        width=preset.decoder_width,
        depth=preset.decoder_depth,
        heads=preset.decoder_heads,
        inner=4 * preset.decoder_width,
        patch=preset.patch,
        image=preset.image,
        eps=1e-6,
    )


def model_config(preset: Preset, vocabulary: int, start: int, end: int, pad: int) -> dict[str, Any]:
    """config.json of the model, in the published layout."""
    return {
        "architectures": ["ScaleRAEQwenForCausalLM"],
        "model_type": "cambrian_qwen",
        "hidden_size": preset.language_width,
        "intermediate_size": preset.language_inner,
        "num_hidden_layers": preset.language_depth,
        "num_attention_heads": preset.language_heads,
        "num_key_value_heads": preset.language_kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_cache": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": pad,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "torch_dtype": "bfloat16",
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "vision_coef": 1.0,
        "vision_tower_aux_token_len_list": [preset.tokens],
        "mm_vision_tower_aux_list": [ENCODER_NAME],
        "mm_vision_tower_aux_token_len_list": [preset.tokens],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "square",
        "connector_only": True,
        "si_token_len": preset.tokens,
        "miv_token_len": 0,
        "vision_hidden_size": preset.channels,
        "unfreeze_mm_vision_tower": False,
        "diffusion_model_hidden_size": preset.dit_width,
        "diffusion_model_depth": preset.dit_depth,
        "diffusion_model_heads": preset.dit_heads,
        "diffusion_model_z_channels": preset.z_channels,
        "diffusion_model_channels": preset.channels,
        "ddt_encoder_depth": 0,
        "diffusion_class_dropout_prob": CLASS_DROPOUT,
        "diffusion_base_dim": BASE_DIM,
        "diffusion_norm_stats_path": None,
        "diffusion_split_per_token": preset.tokens,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 1024,
    }
