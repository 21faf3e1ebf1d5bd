"""The names and shapes of all tensors of a checkpoint, from its config. Imports no torch.

The networks themselves (`language`, `dit`, `decoder`) have the same names and shapes; the tests compare them. With this module, a
checkpoint can be compared with its config before torch is imported, and before it is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scale_rae.config import DecoderConfig, DiTConfig, ScaleRAEConfig

TensorShapes = dict[str, tuple[int, ...]]  # tensor name -> shape

DIT_PREFIX = "diff_head.model."
NORM_STATS = ("diff_head.data_mean", "diff_head.data_std")
TIME_FREQUENCIES = 256
_COMPUTED = ("freqs_cos", "freqs_sin", "rotary_emb.inv_freq", *NORM_STATS)


class Differences(NamedTuple):
    """How stored tensors differ from a layout: names, and for wrong shapes "NAME is SHAPE, should be SHAPE"."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        """The differences as text, at most 20 of each kind; "" if there are none."""
        parts = (
            ("missing tensors", self.missing),
            ("unexpected tensors", self.unexpected),
            ("wrong shapes", self.misshapen),
        )
        return "; ".join(f"{what}: {few(names)}" for what, names in parts if names)


def few(names: Sequence[str], most: int = 20) -> str:
    """The names as a list in words, cut after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def model_layout(config: ScaleRAEConfig) -> TensorShapes:
    """All tensors that a model's weight files must have. Tied to the embedding, `lm_head.weight` need not be there."""
    layout = language_layout(config) | dit_layout(config.dit)
    if config.tied_embeddings:
        del layout["lm_head.weight"]
    return layout


def language_layout(config: ScaleRAEConfig) -> TensorShapes:
    """The language model's tensors: Qwen2, latent queries, the projector of latents and the one of conditions."""
    sizes = config.language
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layout: TensorShapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "model.latent_queries": (config.tokens, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        layout |= _linear(f"{layer}self_attn.q_proj", hidden, hidden)
        layout |= _linear(f"{layer}self_attn.k_proj", hidden, keys)
        layout |= _linear(f"{layer}self_attn.v_proj", hidden, keys)
        layout |= _linear(f"{layer}self_attn.o_proj", hidden, hidden, bias=False)
        layout |= _linear(f"{layer}mlp.gate_proj", hidden, inner, bias=False)
        layout |= _linear(f"{layer}mlp.up_proj", hidden, inner, bias=False)
        layout |= _linear(f"{layer}mlp.down_proj", inner, hidden, bias=False)
        layout |= {f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    if config.vae is None:  # else the projector is not read
        depth = config.projector_depth
        names = [f"model.mm_projector.{2 * i}" for i in range(depth)] if depth else ["model.mm_projector"]
        for i, name in enumerate(names):
            layout |= _linear(name, hidden if i else config.channels, hidden)
    if config.condition_projector:
        layout |= _linear("diff_head_projector", hidden, config.dit.condition_width)
    return layout


def dit_layout(config: DiTConfig) -> TensorShapes:
    """The velocity network's tensors."""
    width, z = config.width, config.condition_width
    late_width = config.decoder_width or width
    is_ddt = config.encoder_depth is not None
    early = config.depth if config.encoder_depth is None else config.encoder_depth
    layout: TensorShapes = {"pos_embed": (1, config.tokens, width)}
    layout |= _embedder("x_embedder", config.channels, width)
    layout |= _linear("t_embedder.mlp.0", 2 * TIME_FREQUENCIES, z) | _linear("t_embedder.mlp.2", z, z)
    if config.null_condition:
        layout["y_embedder.dropout_embedding"] = (z,)
    for i in range(config.depth):
        layout |= _block(f"dit_blocks.{i}.", *((width, z) if i < early else (late_width, late_width)))
    if is_ddt:
        layout |= _embedder("s_embedder", config.channels, late_width)
    if is_ddt and config.wide and late_width != width:
        layout |= _linear("s_projector", width, late_width)
    layout["final_layer.norm_final.weight"] = (late_width,)
    layout |= _linear("final_layer.linear", late_width, config.channels)
    layout |= _linear("final_layer.adaLN_modulation.1", late_width if is_ddt else z, 2 * late_width)
    return {DIT_PREFIX + name: shape for name, shape in layout.items()}


def decoder_layout(config: DecoderConfig) -> TensorShapes:
    """The pixel decoder's tensors."""
    width = config.width
    layout: TensorShapes = {
        "trainable_cls_token": (1, 1, width),
        "decoder_pos_embed": (1, config.patches**2 + 1, width),
    }
    layout |= _linear("decoder_embed", config.channels, width) | _linear("decoder_pred", width, config.patch**2 * 3)
    layout |= _layer_norm("decoder_norm", width)
    for i in range(config.depth):
        layer = f"decoder_layers.{i}."
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            layout |= _linear(layer + name, width, width)
        layout |= _linear(f"{layer}attention.output.dense", width, width)
        layout |= _linear(f"{layer}intermediate.dense", width, config.inner)
        layout |= _linear(f"{layer}output.dense", config.inner, width)
        layout |= _layer_norm(f"{layer}layernorm_before", width) | _layer_norm(f"{layer}layernorm_after", width)
    return layout


def swiglu_inner(width: int) -> int:
    """The inner width of a DiT block's SwiGLU, as published."""
    return int(2 / 3 * 4 * width)


def keeps_float32(name: str) -> bool:
    """Whether a tensor stays float32: those of the time embedding, and the DiT's norm gains."""
    return name.startswith(DIT_PREFIX) and (".t_embedder." in name or ".norm" in name)


def is_not_read(name: str, config: ScaleRAEConfig) -> bool:
    """Whether a tensor of a model's files is not among those that networks load, and may be there all the same.

    Stored constants are computed here, norm stats are read by themselves. A FLUX-VAE-aligned model has no use for its projector,
    which takes latents of the encoder's width.
    """
    tied = config.tied_embeddings and name == "lm_head.weight"
    return tied or name.endswith(_COMPUTED) or (config.vae is not None and name.startswith("model.mm_projector."))


def compare(expected: TensorShapes, stored: Mapping[str, tuple[int, ...]]) -> Differences:
    """How stored shapes differ from the expected ones."""
    return Differences(
        missing=sorted(expected.keys() - stored.keys()),
        unexpected=sorted(stored.keys() - expected.keys()),
        misshapen=[
            f"{name} is {list(stored[name])}, should be {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in stored and tuple(stored[name]) != shape
        ],
    )


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> TensorShapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _layer_norm(name: str, width: int) -> TensorShapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _embedder(name: str, channels: int, width: int) -> TensorShapes:
    return {f"{name}.proj.weight": (width, channels, 1, 1), f"{name}.proj.bias": (width,)}


def _block(name: str, width: int, condition_width: int) -> TensorShapes:
    inner = swiglu_inner(width)
    return {
        f"{name}norm1.weight": (width,),
        f"{name}norm2.weight": (width,),
        **_linear(f"{name}attn.qkv", width, 3 * width),
        **_linear(f"{name}attn.proj", width, width),
        **_linear(f"{name}mlp.w12", width, 2 * inner),
        **_linear(f"{name}mlp.w3", inner, width),
        **_linear(f"{name}adaLN_modulation.1", condition_width, 6 * width),
    }
