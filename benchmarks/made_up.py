"""Networks and checkpoints of the published sizes with made-up weights: random, never zero, since zeros run faster."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.made_tokenizer import SIZE as TOKENS
from benchmarks.made_tokenizer import write_tokenizer
from scale_rae.config import ScaleRAEConfig, load_decoder_config, parse_config
from scale_rae.decoder import PixelDecoder
from scale_rae.dit import DiT
from scale_rae.hub import Source
from scale_rae.language import Conversation, LanguageModel
from scale_rae.networks import Networks
from scale_rae.options import Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import ChatTokenizer

# Hyper-parameters as the published config.json files have them. "tiny" tries a benchmark itself.
LANGUAGE: dict[str, dict[str, Any]] = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    },
}
DIT = {  # width, depth, heads, width of the condition
    "1.5b": (2048, 32, 32, 2048),
    "7b": (3072, 48, 48, 3072),
    "tiny": (64, 4, 4, 48),
}
DIT_NAME = {"1.5b": "2.4B", "7b": "9.8B", "tiny": "tiny"}
ENCODER_NAME = "siglip2-made-up"


def config_json(size: str) -> dict[str, Any]:
    """A model's config.json in the published layout."""
    width, depth, heads, condition = DIT[size]
    return {
        "architectures": ["ScaleRAEQwenForCausalLM"],
        "model_type": "cambrian_qwen",
        **LANGUAGE[size],
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "vision_tower_aux_token_len_list": [16 if size == "tiny" else 256],
        "mm_vision_tower_aux_list": [ENCODER_NAME],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": True,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "diffusion_model_hidden_size": width,
        "diffusion_model_depth": depth,
        "diffusion_model_heads": heads,
        "diffusion_model_z_channels": condition,
        "diffusion_model_channels": encoder_json(size)["vision_config"]["hidden_size"],
        "diffusion_class_dropout_prob": 0.1,
        "tokenizer_model_max_length": 2048,
    }


def encoder_json(size: str) -> dict[str, Any]:
    """The config.json of SigLIP-2 So400M with its text tower, or of a tiny one."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = dict(zip(names, (48, 96, 2, 4) if size == "tiny" else (1152, 4304, 27, 16), strict=True))
    text = {"vocab_size": TOKENS, "max_position_embeddings": 64, "projection_size": tower["hidden_size"]}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 56 if size == "tiny" else 224, "patch_size": 14}
    return {"model_type": "siglip", "text_config": tower | text, "vision_config": tower | vision}


def decoder_json(size: str) -> dict[str, Any]:
    """The config.json of the published pixel decoder (ViT-XL), or of a tiny one."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = (48, 2, 4, 96) if size == "tiny" else (1152, 28, 16, 4096)
    return {
        **{f"decoder_{name}": value for name, value in zip(names, sizes, strict=True)},
        "patch_size": 14,
        "image_size": 56 if size == "tiny" else 224,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }


def made_config(size: str) -> ScaleRAEConfig:
    """A model's configuration."""
    return parse_config(config_json(size), Path("config.json"))


# Networks -----------------------------------------------------------------------------------------------------------------


def fill_randomly(
    module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int, float32: tuple[str, ...] = ()
) -> None:
    """Gives a module built on the meta device random weights, scaled so that activations keep their size.

    Modules with one of `float32` in their name get float32 weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    filled: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                kept = torch.float32 if any(part in path for part in float32) else dtype
                tensor = torch.empty(parameter.shape, dtype=kept, device=device)
                is_embedding = "embed_tokens" in path or "queries" in name or "pos_embed" in name
                if name == "weight" and tensor.dim() == 1:
                    tensor.normal_(1.0, 0.1, generator=generator)
                elif tensor.dim() > 1 and not is_embedding:
                    tensor.normal_(0.0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
                else:
                    tensor.normal_(0.0, 0.02, generator=generator)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            setattr(owner, name, filled[id(parameter)])


def made_dit(size: str, device: torch.device, dtype: torch.dtype) -> DiT:
    """A velocity network with random weights."""
    with torch.device("meta"):
        dit = DiT(made_config(size).dit)
    fill_randomly(dit, device, dtype, 1, ("t_embedder", "norm"))
    return dit.to(device).eval()


def made_language(size: str, device: torch.device, dtype: torch.dtype, speed: Speed | None = None) -> LanguageModel:
    """A language model with random weights."""
    config = made_config(size)
    with torch.device("meta"):
        language = LanguageModel(config, speed)
    if config.tied_embeddings:
        language.lm_head.weight = language.model.embed_tokens.weight
    fill_randomly(language, device, dtype, 2)
    return language.to(device).eval()


@torch.no_grad()
def reply_with_images(language: LanguageModel, image_start: int) -> None:
    """Changes weights so that every reply is the token `image_start` alone, which asks for an image.

    One channel has the same large value for all tokens, no layer writes to it, and it alone decides the next token.
    """
    language.model.embed_tokens.weight[:, 0] = 3.0
    language.lm_head.weight[image_start, 0] = 60.0
    for name, weight in language.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0


def made_model(size: str, device: torch.device, dtype: torch.dtype, speed: Speed, folder: Path) -> ScaleRAE:
    """A model with random weights that draws, decodes, answers and scores.

    Language model and DiT are built on the device; `folder` gets the tokenizer, the decoder, and the encoder without weights:
    it knows how pixels are normalised and cannot encode.
    """
    language = made_language(size, device, dtype, speed)
    write_tokenizer(folder)
    config = made_config(size)
    tokenizer = ChatTokenizer(folder, config.image_markers)
    dit = made_dit(size, device, dtype)
    write_decoder(size, folder / "decoder", device)
    write_encoder_settings(size, folder / ENCODER_NAME)
    source = Source("made-up", folder)
    model = ScaleRAE(Networks(config, tokenizer, language, dit, None, source, None, dtype, device, speed))
    _ = model.encoder, model.decoder  # loaded now, so that no measurement includes it
    return model


# Checkpoints --------------------------------------------------------------------------------------------------------------


def write_checkpoint(size: str, folder: Path, device: torch.device) -> Path:
    """Writes a bfloat16 checkpoint in the published layout, made on `device`; returns the model's folder.

    The encoder, with its text tower, and the decoder are beside the model's folder. The model answers every message by asking
    for an image.
    """
    from safetensors.torch import save_file

    model = folder / "model"
    write_tokenizer(model)
    (model / "config.json").write_text(json.dumps(config_json(size)))
    language = made_language(size, device, torch.bfloat16)
    reply_with_images(language, ChatTokenizer(model, made_config(size).image_markers).image_start)
    tensors = stored(language)
    del language
    tensors |= {
        f"diff_head.model.{name}": value for name, value in stored(made_dit(size, device, torch.bfloat16)).items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    del tensors
    write_decoder(size, folder / "decoder", device)
    write_encoder(size, folder / ENCODER_NAME, device)
    return model


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters as a checkpoint stores them: bfloat16, shared ones once."""
    return {name: parameter.detach().to(torch.bfloat16).cpu() for name, parameter in module.named_parameters()}


def write_decoder(size: str, folder: Path, device: torch.device) -> None:
    """Writes a pixel decoder: config.json and model.pt."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(decoder_json(size)))
    with torch.device("meta"):
        decoder = PixelDecoder(load_decoder_config(folder, made_config(size).channels))
    fill_randomly(decoder, device, torch.bfloat16, 3)
    torch.save(stored(decoder), folder / "model.pt")


def write_encoder_settings(size: str, folder: Path) -> None:
    """Writes an encoder's files except its weights: config.json, preprocessor_config.json and the text tower's tokenizer."""
    config = encoder_json(size)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    side = config["vision_config"]["image_size"]
    processor = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True}
    processor |= {
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"height": side, "width": side},
    }
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_encoder(size: str, folder: Path, device: torch.device) -> None:
    """Writes an encoder: both towers, as SigLIP-2 is published."""
    from safetensors.torch import save_file
    from transformers import SiglipConfig, SiglipModel

    write_encoder_settings(size, folder)
    config = encoder_json(size)
    with torch.device("meta"):
        siglip: Any = SiglipModel(
            SiglipConfig(text_config=config["text_config"], vision_config=config["vision_config"])
        )
    fill_randomly(siglip, device, torch.bfloat16, 4)
    save_file(stored(siglip), folder / "model.safetensors", {"format": "pt"})


# Prompts ------------------------------------------------------------------------------------------------------------------


def write_prompts(file: Path, count: int) -> None:
    """Writes a prompt file of `count` different prompts."""
    things = ("a cat", "a boat", "an old clock", "a lighthouse", "two pears", "a bicycle", "a chair", "a tall tree")
    places = ("on a beach", "in the snow", "at night", "by a window", "in a garden", "on a table", "in the rain")
    texts = [f"a photo of {thing} {place}" for thing, place in itertools.product(things, places)]
    lines = [json.dumps({"index": i, "prompt": f"{texts[i % len(texts)]}, picture {i}"}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")


def prompt_of(model: ScaleRAE, tokens: int, number: int = 0) -> str:
    """A prompt of `tokens` tokens; each `number` gives another."""
    text = f"Can you generate {number} photos of a cat on the windowsill and a dog in the garden by the house?" * 4
    while (surplus := len(model.tokenizer.plain(text)) - tokens) > 0:
        text = text[: -max(1, surplus - 4)]  # a token has at least one character
    return text


def prompt_that_draws(model: ScaleRAE, tokens: int) -> str:
    """A prompt of 40 tokens that `model` answers with `tokens` tokens, the last of which asks for an image.

    Random weights give random replies, so one of them is chosen and the tokenizer's `image_start` is set to its last token.
    """
    prompts = [prompt_of(model, 40, number) for number in range(64)]
    conversations = [Conversation(model.tokenizer.chat(prompt)) for prompt in prompts]
    replies = model.language.reply(conversations, [tokens] * len(prompts), stop=-1, image_start=-1)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.ids[-1] not in reply.ids[:-1]:
            model.tokenizer.image_start = reply.ids[-1]
            alone = model.reply([prompt])[0]  # in another batch, bf16 may round to another reply
            if alone.condition is not None:
                if len(alone.ids) != tokens:
                    print(f"note: the reply has {len(alone.ids)} tokens instead of {tokens}", flush=True)
                return prompt
    raise RuntimeError(f"the made-up replies repeat themselves: {replies[0].ids}")
