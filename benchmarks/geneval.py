"""How many pictures a second GenEval's evaluator judges, by stage, with made-up weights of the published sizes.

    python benchmarks/geneval.py --device cuda --json geneval.json

Pictures are PNGs of smooth noise. The made-up detector is sure of many objects, and two crops of every picture go to CLIP, where
GenEval's prompts need half a crop on average: real pictures take less time. Float32 is what verdicts agree in; the other forms
show what they would save. --tiny runs everything with small networks on small pictures, in a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.bench import Bench
from scale_rae.geneval import COLORS, ColorClassifier, Detector, VerdictOptions, crop, detector, judge
from scale_rae.geneval.mask2former import Architecture, Network, library_config
from scale_rae.memory import pick_device

SIZES = (512, 1024)  # pixels of the pictures' sides
FORMS = ("float32", "tf32", "bfloat16", "float16")
READERS, AHEAD = 8, 2  # threads, and batches that are read ahead, as in `evaluate`
# Times the random weights, so that queries differ, masks are clear and a good part of the objects pass the threshold.
LOUDER = {
    "class_predictor.": 4.0,
    "mask_predictor.mask_embedder.2.0.": 30.0,
    "queries_features.": 16.0,
    "queries_embedder.": 16.0,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = Architecture(24, (2, 2, 2, 2), (1, 2, 4, 8), 7, 32, 2, 64, 3, 128, 20)


def write_detector(folder: Path, architecture: Architecture) -> Path:
    """A folder with a made-up detector."""
    folder.mkdir()
    torch.manual_seed(0)
    network = Network(architecture)
    for name, parameter in network.named_parameters():
        parameter.data *= next((factor for part, factor in LOUDER.items() if part in name), 1.0)
    (folder / "config.json").write_text(json.dumps({"model_type": "mask2former"} | library_config(architecture)))
    save_file({n: t.contiguous() for n, t in network.state_dict().items()}, folder / "model.safetensors")
    return folder


def write_clip(folder: Path, tiny: bool) -> Path:
    """A folder with a made-up CLIP of ViT-L/14's size, and a tokenizer for which every word is one token."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir()
    few = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4} if tiny else {}
    )
    config = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": TEXT | few | {"vocab_size": 49408, "hidden_act": "quick_gelu", "eos_token_id": 49407},
        "vision_config": VISION | few | {"image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        network = CLIPModel(CLIPConfig(**config))
    torch.manual_seed(0)
    weights = {
        name: torch.ones(p.shape, dtype=torch.float16)
        if p.dim() < 2 and name.endswith("weight")
        else torch.empty(p.shape, dtype=torch.float16).normal_(0, 0.02)
        for name, p in network.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {f"#{i}": i for i in range(49406)} | {start: 49406, end: 49407}
    ends = {"type": "RobertaProcessing", "sep": [end, 49407], "cls": [start, 49406]}
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": ends | {"trim_offsets": False, "add_prefix_space": False},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "#0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_pictures(folder: Path, side: int, count: int) -> list[Path]:
    """PNG files of smooth noise, of a photograph's size in bytes."""
    folder.mkdir()
    files = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        file = folder / f"{number:05}.png"
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, compress_level=1)
        files.append(file)
    return files


def read(file: Path) -> Image.Image:
    """A decoded picture."""
    with Image.open(file) as image:
        return image.convert("RGB")


def read_ahead(files: Sequence[Path], batch: int) -> Iterator[list[Image.Image]]:
    """Batches of pictures; the next ones are decoded on threads meanwhile."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[list[Future[Image.Image]]] = deque()
        for start in range(0, len(files), batch):
            waiting.append([pool.submit(read, file) for file in files[start : start + batch]])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def set_form(objects: Detector, form: str) -> None:
    """Has the detector compute in one of FORMS; tf32 is for matrix products only."""
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    objects.dtype = torch.float32 if form == "tf32" else getattr(torch, form)


def prompts_for(found: Sequence[detector.Detections]) -> list[dict[str, Any]]:
    """Metadata that ask each picture for the colours of its two surest classes."""
    prompts = []
    for one in found:
        surest = sorted(one.boxes, key=lambda name: -float(one.boxes[name][:, 4].max()))[:2]
        include = [{"class": n, "count": 1, "color": c} for n, c in zip(surest, COLORS, strict=False)]
        prompts.append({"tag": "color_attr", "include": include})
    return prompts


def measure_size(
    b: Bench, side: int, files: list[Path], objects: Detector, colors: ColorClassifier, batch: int, forms: Sequence[str]
) -> None:
    """The stages and the whole for pictures of one size."""
    stage, device = f"{side}", objects.device

    def rate(name: str, run: Any, pictures: int, target: str = "") -> None:
        first, seconds = b.seconds(run)
        b.add(stage, name, pictures / seconds, "images/s", target, first=first)

    images = [read(file) for file in files[:batch]]
    rate("decoding PNGs, one thread", lambda: [read(file) for file in files[:batch]], batch)
    size = detector.resized_size(side, side, objects.scale)
    padded = detector.padded_size(*size)

    def prepare() -> torch.Tensor:
        pictures = [torch.from_numpy(np.array(image)).to(device) for image in images]
        return detector.network_input([detector.resize(picture, *size) for picture in pictures], padded)

    rate(f"copying and resizing to {size[0]}", prepare, batch)
    for form in forms:
        set_form(objects, form)
        rate(f"detector from pictures to outputs, {form}", lambda: objects.outputs(images), batch)
    set_form(objects, "float32")
    classes, masks = objects.outputs(images)

    def finish(least: float) -> list[detector.Detections]:
        with torch.inference_mode():
            return [detector.detections(c, m, (side, side), size, least) for c, m in zip(classes, masks, strict=True)]

    rate("post-processing, all objects", lambda: finish(0.0), batch)
    rate("post-processing, scores over 0.3", lambda: finish(0.3), batch)
    found = finish(0.0)
    b.add(
        stage,
        "objects over 0.3 per picture",
        sum((o.boxes[n][:, 4] > 0.3).sum() for o in found for n in o.boxes) / batch,
        "",
    )
    pairs = [(image, one, next(iter(one.boxes))) for image, one in zip(images, found, strict=True)]

    def cut() -> list[Image.Image]:
        return [crop(image, one.boxes[name][0], one.masks[name][0]) for image, one, name in pairs for _ in range(2)]

    rate("two crops per picture", cut, batch)
    crops = cut()
    rate("CLIP on two crops per picture", lambda: colors.classify_colors(crops, "bench"), batch)
    every = objects.detect(images)
    prompts = prompts_for(every) * -(-len(files) // batch)

    def whole(options: VerdictOptions) -> None:
        done = 0
        for group in read_ahead(files, batch):
            judge(group, prompts[done : done + len(group)], objects, colors, options)
            done += len(group)

    for form in forms:
        set_form(objects, form)
        rate(f"files to verdicts, {form}", lambda: whole(VerdictOptions()), len(files), "25")
    set_form(objects, "float32")
    rate("files to verdicts, float32, masks of all objects", lambda: whole(VerdictOptions(threshold=0.0)), len(files))


def main() -> int:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; default: the best there is")
    parser.add_argument("--batch", type=int, default=16, help="pictures judged at once (default: 16)")
    parser.add_argument("--pictures", type=int, default=64, help="files of each size (default: 64)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sides of pictures in pixels")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=None, help="default: all on a GPU, float32 on a CPU"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds after which no stage is begun")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="small networks and pictures")
    args = parser.parse_args()
    device = pick_device(args.device)
    forms = args.forms or (FORMS if device.type == "cuda" else FORMS[:1])
    b = Bench(device, torch.float32, args.repeat, args.budget, args.json, args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        architecture = SMALL if args.tiny else Architecture()
        scale = (224, 128) if args.tiny else detector.SCALE
        objects = Detector(str(write_detector(where / "detector", architecture)), str(device), scale=scale)
        colors = ColorClassifier(str(write_clip(where / "clip", args.tiny)), str(device))
        for side in (64,) if args.tiny else args.sizes:
            if b.over(f"{side}"):
                continue
            files = write_pictures(where / f"{side}", side, args.batch if args.tiny else args.pictures)
            with b.stage(f"{side} x {side}"):
                measure_size(b, side, files, objects, colors, args.batch, forms)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    b.add("memory", "peak of the process", peak, "GiB")
    if device.type == "cuda":
        b.add("memory", "peak of the GPU", b.peak_gib(), "GiB")
    b.write()
    return 1 if b.errors else 0


if __name__ == "__main__":
    sys.exit(main())
