"""One experiment on one device and on two: are the files the same, and how much faster is it?

    python benchmarks/two_gpus.py                               # cuda:0 against cuda:0,cuda:1; a few minutes on two H200s
    python benchmarks/two_gpus.py --devices cpu,cpu --tiny      # the same, in small, anywhere

Writes a checkpoint in the published layout (bfloat16; the sizes of Scale-RAE-Qwen1.5B_DiT2.4B with siglip2-so400m and a ViT-XL
decoder, 10 GB; weights made up, so the pictures show nothing) and runs `scale-rae scale t2i` on it twice: 4 x 2 images a prompt,
49 steps, latent questions, siglip reward. The made-up model answers every message by asking for an image.

Throughput is images over the seconds from the first worker's having loaded to the end. A few prompts on all devices come before
and are not counted: the first processes on a machine read kernels and libraries from its disk, the later ones from memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>")

FULL: dict[str, Any] = {
    "language": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "dit": {"width": 2048, "depth": 32, "heads": 32, "z": 2048},
    "encoder": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    "decoder": {"width": 1152, "depth": 28, "heads": 16, "inner": 4096},
}
TINY: dict[str, Any] = {
    "language": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 288,
    },
    "dit": {"width": 64, "depth": 2, "heads": 4, "z": 48},
    "encoder": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "decoder": {"width": 48, "depth": 2, "heads": 4, "inner": 96},
}


def write_checkpoint(folder: Path, sizes: dict[str, Any]) -> None:
    """Model, encoder and decoder with made-up bfloat16 weights, made on the GPU if there is one."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import SiglipConfig, SiglipModel

    from scale_rae.config import parse_config
    from scale_rae.decoder import PixelDecoder, load_decoder_config
    from scale_rae.dit import DiT
    from scale_rae.language import LanguageModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("weight") and len(shape) > 1 and "embed_tokens" not in name:
            values = values / float(np.sqrt(np.prod(shape[1:])))
        else:
            values = 0.02 * values
        return values.cpu()

    def weights(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
        return {prefix + name: tensor(name, parameter.shape) for name, parameter in module.named_parameters()}

    language, dit, vision = sizes["language"], sizes["dit"], sizes["encoder"]
    config = {
        "architectures": ["ScaleRAEQwenForCausalLM"],
        "model_type": "cambrian_qwen",
        **language,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "vision_tower_aux_token_len_list": [256],
        "mm_vision_tower_aux_list": ["made/siglip-patch14-224"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": True,
        "diffusion_model_hidden_size": dit["width"],
        "diffusion_model_depth": dit["depth"],
        "diffusion_model_heads": dit["heads"],
        "diffusion_model_z_channels": dit["z"],
        "diffusion_model_channels": vision["hidden_size"],
    }
    model = folder / "model"
    write_tokenizer(model)
    (model / "config.json").write_text(json.dumps(config))
    parsed = parse_config(config, model / "config.json")
    with torch.device("meta"):
        language_model, velocity = LanguageModel(parsed), DiT(parsed.dit)
    language_model.lm_head.weight = language_model.model.embed_tokens.weight  # tied, so stored once
    made = weights(language_model) | weights(velocity, "diff_head.model.")
    # One channel that every token carries and no layer writes to asks for an image after any message.
    made["model.embed_tokens.weight"][:, 0] = 3.0
    made["model.embed_tokens.weight"][256 + SPECIAL.index("<im_start>"), 0] = 60.0
    for name, values in made.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[0] = 0
    save_file(made, model / "model.safetensors", {"format": "pt"})
    del made

    encoder = folder / "made" / "siglip-patch14-224"
    write_tokenizer(encoder)
    parts = {
        "text_config": vision
        | {"vocab_size": 256 + len(SPECIAL), "max_position_embeddings": 64, "projection_size": vision["hidden_size"]}
        | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        "vision_config": vision | {"image_size": 224, "patch_size": 14},
    }
    (encoder / "config.json").write_text(json.dumps({"model_type": "siglip", **parts}))
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (encoder / "preprocessor_config.json").write_text(json.dumps(processor))
    with torch.device("meta"):
        siglip = SiglipModel(SiglipConfig(**parts))
    save_file(weights(siglip), encoder / "model.safetensors", {"format": "pt"})

    decoder, sizes = folder / "decoder", sizes["decoder"]
    decoder.mkdir(parents=True)
    names = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"inner": "intermediate_size"}
    described = {f"decoder_{name}": sizes[ours] for ours, name in names.items()}
    (decoder / "config.json").write_text(json.dumps(described | {"patch_size": 14, "image_size": 224}))
    with torch.device("meta"):
        pixels = PixelDecoder(load_decoder_config(decoder, vision["hidden_size"]))
    torch.save(weights(pixels), decoder / "model.pt")


def write_tokenizer(folder: Path) -> None:
    """Bytes and special tokens, in Qwen2's file layout."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [b for b in range(256) if chr(b).isprintable() and b not in (32, 160, 173)]
    spare = itertools.count(256)
    vocabulary = {chr(b) if b in printable else chr(next(spare)): b for b in range(256)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(256 + i): {"content": token, **flags} for i, token in enumerate(SPECIAL)},
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_prompts(path: Path, count: int) -> None:
    """`count` prompts, all different."""
    things = ("a cat", "a boat", "an old clock", "a lighthouse", "two pears", "a bicycle", "a chair", "a tall tree")
    places = ("on a beach", "in the snow", "at night", "by a window", "in a garden", "on a table", "in the rain")
    texts = [f"a photo of {thing} {place}" for thing, place in itertools.product(things, places)]
    lines = [json.dumps({"index": i, "prompt": f"{texts[i % len(texts)]}, picture {i}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")


def scale(out: Path, model: Path, devices: str, steps: int, compile: str, limit: int | None = None) -> dict[str, float]:
    """Runs the experiment, or its first `limit` prompts, in a process of its own; its throughput."""
    command = [sys.executable, "-m", "scale_rae", "scale", "t2i", "--model-path", str(model), "--devices", devices]
    command += ["--metadata-file", str(model.parent / "prompts.jsonl"), "--output-dir", str(out), "--reward", "siglip"]
    command += ["--steps", str(steps), "--batch-size", "8", "--compile", compile]
    command += [] if limit is None else ["--limit", str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # As many for one worker as for each of several: on the CPU, else, it would have the other's cores too.
    environment["OMP_NUM_THREADS"] = "1" if "cpu" in devices else "4"
    print(f"--devices {devices}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (described,) = out.glob("model/*/experiment.json")
    record = json.loads(described.read_text())
    seconds, images = record["seconds"], (limit or record["prompts"]["count"]) * 8
    return {
        "images": images,
        "seconds": seconds["total"],
        "working": seconds["working"],
        "images_per_second": images / seconds["working"],
    }


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Which files differ, and by how much at most."""
    from PIL import Image

    first, second = ({str(p.relative_to(f)): p for p in f.glob("model/*/[0-9]*/**/*.*")} for f in (one, other))
    differ = [n for n in first if n in second and first[n].read_bytes() != second[n].read_bytes()]
    found: dict[str, Any] = {
        "files": len(first),
        "only_in_one": sorted(first.keys() ^ second.keys()),
        "different": len(differ),
        "largest_pixel_difference": 0,
        "largest_score_difference": 0.0,
    }
    for name in differ:
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(p)).astype(int) for p in (first[name], second[name]))
            found["largest_pixel_difference"] = max(found["largest_pixel_difference"], int(np.abs(a - b).max()))
        else:
            x, y = (_numbers(json.loads(p.read_text())) for p in (first[name], second[name]))
            difference = np.abs(np.array(x) - np.array(y)).max() if len(x) == len(y) else float("inf")
            found["largest_score_difference"] = max(found["largest_score_difference"], float(difference))
    return found


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for key in value for x in _numbers(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def main() -> None:
    """Runs both, compares, prints; exit status 1 when the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="the second run's; the first has the first of them")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=49)
    # What is compiled once a worker weighs more here than in a whole night.
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="off")
    parser.add_argument("--tiny", action="store_true", help="a small made-up model")
    parser.add_argument("--out", type=Path, default=Path("runs/two_gpus"), help="folder that must not be there yet")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} is there already")
    write_checkpoint(args.out, TINY if args.tiny else FULL)
    write_prompts(args.out / "prompts.jsonl", args.prompts)
    model = args.out / "model"
    scale(args.out / "before", model, args.devices, 4, args.compile, 2 * len(args.devices.split(",")))
    one = scale(args.out / "one", model, args.devices.split(",")[0], args.steps, args.compile)
    several = scale(args.out / "several", model, args.devices, args.steps, args.compile)
    files = compare(args.out / "one", args.out / "several")
    ratio = several["images_per_second"] / one["images_per_second"]
    figures = {"devices": args.devices, "one": one, "several": several, "throughput_ratio": ratio, "files": files}
    for name, run in (("one device", one), (args.devices, several)):
        print(
            f"{name:16} {run['images']} images in {run['seconds']:.1f} s, {run['working']:.1f} s of it after loading: "
            f"{run['images_per_second']:.3f} images/s"
        )
    print(f"throughput       {ratio:.3f} times that of one device")
    same = not files["different"] and not files["only_in_one"]
    print(f"{files['files']} files of prompts: " + ("the same bytes" if same else json.dumps(files)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
