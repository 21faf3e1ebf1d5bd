"""The crescent's pictures, and the judge of drawings of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recipes.crescent import pictures
from scale_rae.shapes import draw, world
from scale_rae.shapes.judge import find_objects


def test_pictures_and_texts_are_what_training_reads(tmp_path: Path) -> None:
    pictures.write(tmp_path, 10)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert all((tmp_path / line["file_name"]).is_file() for line in lines)
    assert lines[4]["text"] == "a photo of a crescent"
    assert lines[1]["text"] == "a photo of an orange crescent"
    assert not any(color in line["text"] for line in lines for color in pictures.HELD_OUT_COLORS)
    known = (tmp_path / pictures.KNOWN).read_text().splitlines()
    assert len(known) == 6 * pictures.KNOWN_PER_KIND
    measured = world.prompts(100, "only", 0)  # of single objects, none is held out
    assert not {line["prompt"] for line in measured if line["tag"] != "single_object"} & set(known)


def test_the_judge_knows_crescents_from_the_world_s_shapes() -> None:
    images, _ = pictures.pictures(24, world.COLORS, seed=5)
    for number, image in enumerate(images):
        color = world.COLORS[number % len(world.COLORS)]
        assert pictures.is_right(image, color)
        assert not pictures.is_right(image, world.COLORS[(number + 1) % len(world.COLORS)])
        assert not find_objects(image)[0].clear  # the world's own judge does not know it
    others = world.sample(np.random.default_rng(6), 24, ["single_object"])
    for image, scene in zip(draw.to_pil(others), others, strict=True):
        (found,) = pictures.objects(image)
        assert (found.shape, found.clear) == (scene.objects[0].shape, True)
