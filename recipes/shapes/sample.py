"""A quick look at an exported model: a contact sheet of held-out prompts, and shares of right pictures and answers.

A quick look during training; the figures to report come from `python -m scale_rae.shapes.evaluate`.

    python -m recipes.shapes.sample --model exported/shapes --sheet sheet.png --prompts 300
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from recipes.shapes.loop import say
from scale_rae.options import SamplingOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.shapes import draw, world

REQUEST = "Can you generate {prompt}"
ANSWER_TOKENS = 48


def pictures(
    model: ScaleRAE, lines: Sequence[dict[str, Any]], guidance: float, steps: int, batch: int
) -> list[Image.Image | None]:
    """A picture of each prompt's metadata, None where the model's reply asked for none. Seeds count from 0."""
    replies = model.reply([REQUEST.format(prompt=line["prompt"]) for line in lines], max_new_tokens=ANSWER_TOKENS)
    drawing = [i for i, reply in enumerate(replies) if reply.condition is not None]
    conditions = [c for i in drawing if (c := replies[i].condition) is not None]
    latents = model.sample(conditions, drawing, SamplingOptions(steps=steps, guidance=guidance), batch)
    images: list[Image.Image | None] = [None] * len(lines)
    for i, image in zip(drawing, model.decode(latents, batch), strict=True):
        images[i] = image
    return images


def contact_sheet(images: Sequence[Image.Image | None], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """The pictures in rows with their captions below."""
    size, foot = 128, 30
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 8), rows * (size + foot)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (size + 8), i // columns * (size + foot)
        if image is not None:
            sheet.paste(image.resize((size, size)), (x, y))
        words, lines = caption.removeprefix("a photo of ").split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 20:
                lines.append("")
            lines[-1] += word + " "
        pen.text((x + 2, y + size + 1), "\n".join(lines), fill="black")
    return sheet


def judged(images: Sequence[Image.Image | None], lines: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each picture shows what its metadata asks for."""
    from scale_rae.shapes.judge import judge

    return [image is not None and judge(image, line).correct for image, line in zip(images, lines, strict=True)]


def per_kind(lines: Sequence[dict[str, Any]], right: Sequence[bool]) -> str:
    """Share of right pictures of each kind and in all."""
    total = Counter(line["tag"] for line in lines)
    good = Counter(line["tag"] for line, ok in zip(lines, right, strict=True) if ok)
    shares = "  ".join(f"{kind} {good[kind] / total[kind]:.2f}" for kind in total)
    return f"{sum(right) / len(right):.3f}   {shares}"


def reading(model: ScaleRAE, count: int) -> dict[str, float]:
    """Shares of right yes, no and descriptions on drawn scenes with held-out pairs."""
    scenes = world.sample(np.random.default_rng(777), count, world.SCENE_KINDS, "only")
    size = model.encoder.processor.size["height"]
    latents = model.encode(draw.to_pil(scenes, size), 256)
    listed = list(scenes)
    asked = world.alignments(random.Random(777), listed, "any")
    answers = model.answer(
        [world.ALIGN.format(prompt=prompt.text) for prompt, _ in asked], latents=latents, max_new_tokens=ANSWER_TOKENS
    )
    of: dict[bool, list[bool]] = {True: [], False: []}
    for (_, true), answer in zip(asked, answers, strict=True):
        of[true].append(answer.text.strip() == (world.YES if true else world.NO))
    described = model.answer([world.DESCRIBE], latents=latents, max_new_tokens=ANSWER_TOKENS)
    exact = [a.text.strip() == world.describe(scene) for a, scene in zip(described, listed, strict=True)]
    return {
        "yes": float(np.mean(of[True])),
        "no": float(np.mean(of[False])),
        "describe": float(np.mean(exact)),
    }


def look(
    folder: Path, sheet: Path, prompts: int, guidance: Sequence[float], steps: int, device: str | None, batch: int
) -> dict[str, Any]:
    """Draws the sheet, scores `prompts` held-out prompts and as many others at each guidance level, asks about as many held-out
    scenes, and says it all."""
    model = ScaleRAE.from_pretrained(str(folder), device=device)
    summary: dict[str, Any] = {}
    lines = world.prompts(4, "only", seed=1)
    captions = [line["prompt"] for line in lines]
    for level in guidance:
        images = pictures(model, lines, level, steps, batch)
        path = sheet.with_name(f"{sheet.stem}-g{level:g}{sheet.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, captions).save(path)
        say(f"24 held-out prompts at guidance {level:g}: {path}")
    asked: tuple[tuple[world.HeldOut, str], ...] = (("only", "held out"), ("exclude", "seen")) if prompts else ()
    for held_out, which in asked:
        lines = world.prompts(-(-prompts // len(world.KINDS)), held_out, seed=2)
        for level in guidance:
            start = time.perf_counter()
            images = pictures(model, lines, level, steps, batch)
            drawn = time.perf_counter()
            right = judged(images, lines)
            say(
                f"{which}, guidance {level:g}: {per_kind(lines, right)}   ({len(lines)} prompts drawn in {drawn - start:.1f} s, "
                f"judged in {time.perf_counter() - drawn:.1f} s)"
            )
            summary[f"correct at guidance {level:g}, {which}"] = sum(right) / len(right)
    if prompts:
        summary |= reading(model, prompts)
        say("reading held-out scenes: " + json.dumps({k: round(summary[k], 3) for k in ("yes", "no", "describe")}))
    return summary


def main(argv: list[str] | None = None) -> None:
    """Runs `look`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="exported folder")
    parser.add_argument("--sheet", type=Path, default=Path("sheet.png"))
    parser.add_argument(
        "--prompts", type=int, default=300, help="held-out prompts to score, and as many others, 0 for none"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    look(args.model, args.sheet, args.prompts, args.guidance, args.steps, args.device, args.batch)


if __name__ == "__main__":
    main()
