"""Scenes and texts of the world: what `sample` promises, and that every sentence is true."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_rae.shapes import world
from scale_rae.shapes.world import COLORS, KINDS, SCENE_KINDS, SHAPES, Object, Prompt, Scene

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=15, deadline=None)


def says_truth(text: str, scene: Scene) -> bool:
    """Whether "a photo of …" is the whole truth about the scene, from its words alone (not by the package's own check)."""
    words = text.removeprefix("a photo of ")
    shapes = [thing.shape for thing in scene.objects]
    if match := re.fullmatch(r"(two|three|four) (\w+)", words):
        number = ("two", "three", "four").index(match[1]) + 2
        shape = match[2].removesuffix("es" if match[2] == "crosses" else "s")
        return shapes == [shape] * number
    if match := re.fullmatch(r"a (\w+) (left of|right of|above|below) a (\w+)", words):
        if sorted(shapes) != sorted((match[1], match[3])):
            return False
        a, b = (next(thing for thing in scene.objects if thing.shape == shape) for shape in (match[1], match[3]))
        ahead, aside = {
            "left of": (b.x - a.x, b.y - a.y),
            "right of": (a.x - b.x, b.y - a.y),
            "above": (b.y - a.y, b.x - a.x),
            "below": (a.y - b.y, b.x - a.x),
        }[match[2]]
        return ahead > abs(aside)
    names = [name.split()[1:] for name in words.split(" and ")]
    if len(names) != len(scene.objects):
        return False
    return any(
        all(name in ([t.shape], [t.color, t.shape]) for name, t in zip(names, order, strict=True))
        for order in itertools.permutations(scene.objects)
    )


def held_out_facts(scene: Scene) -> list[object]:
    """The held-out pairs that the scene shows."""
    number = Counter(thing.shape for thing in scene.objects)
    shown = {(thing.color, thing.shape) for thing in scene.objects}
    return [
        *(pair for pair in world.HELD_OUT_COLOR_SHAPES if pair in shown),
        *(pair for pair in world.HELD_OUT_SHAPE_PAIRS if set(pair) <= set(number)),
        *(pair for pair in world.HELD_OUT_COUNTS if number[pair[1]] == pair[0]),
    ]


@quick
@given(seeds, st.sampled_from(["exclude", "any", "only"]))
def test_objects_are_apart_and_in_the_frame(seed: int, held_out: world.HeldOut) -> None:
    batch = world.sample(np.random.default_rng(seed), 300, SCENE_KINDS, held_out)
    assert len(batch) == 300
    there = batch.shape >= 0
    assert ((batch.color >= 0) == there).all()
    edge = batch.radius[..., None] + 1
    assert ((batch.center >= edge) & (batch.center <= 128 - edge))[there].all()
    for i, j in itertools.combinations(range(4), 2):
        both = there[:, i] & there[:, j]
        apart = np.linalg.norm(batch.center[both, i] - batch.center[both, j], axis=1)
        assert (apart >= batch.radius[both, i] + batch.radius[both, j] + 3).all()
        assert (abs(batch.center[both, i, 0] - batch.center[both, j, 0]) >= 6).all()
    assert (abs(batch.tilt) <= np.radians(15)).all()
    assert (batch.radius[there] >= 14).all()
    assert (batch.radius[there] <= 36).all()
    for values in (batch.rgb, batch.back):
        assert (values >= 0).all()
        assert (values <= 1).all()


@quick
@given(seeds)
def test_every_kind_is_what_it_says(seed: int) -> None:
    for scene in world.sample(np.random.default_rng(seed), 300, SCENE_KINDS, "any"):
        objects = scene.objects
        if scene.kind == "mixed":
            assert 2 <= len(objects) <= 4
            with pytest.raises(ValueError, match="mixed"):
                world.metadata(scene)
            continue
        line = world.metadata(scene)
        assert line["tag"] == scene.kind
        assert says_truth(line["prompt"], scene)
        assert not world.mismatches(line, objects)
        if scene.kind == "position":
            dx, dy = abs(objects[0].x - objects[1].x), abs(objects[0].y - objects[1].y)
            assert max(dx, dy) >= 1.3 * min(dx, dy)
        if scene.kind == "color_attr":
            assert objects[0].color != objects[1].color


@quick
@given(seeds)
def test_training_never_shows_what_is_held_out(seed: int) -> None:
    for scene in world.sample(np.random.default_rng(seed), 500, SCENE_KINDS, "exclude"):
        assert not held_out_facts(scene)


@quick
@given(seeds)
def test_only_falls_on_what_is_held_out(seed: int) -> None:
    for scene in world.sample(np.random.default_rng(seed), 100, SCENE_KINDS, "only"):
        facts = set(held_out_facts(scene))
        wanted: set[object] = {
            "two_object": {*world.HELD_OUT_SHAPE_PAIRS},
            "position": {*world.HELD_OUT_SHAPE_PAIRS},
            "counting": {*world.HELD_OUT_COUNTS},
            "colors": {*world.HELD_OUT_COLOR_SHAPES},
            "color_attr": {*world.HELD_OUT_COLOR_SHAPES},
            "mixed": facts,
        }.get(scene.kind, set())
        assert scene.kind == "single_object" or facts & wanted


def test_what_is_held_out_is_a_tenth() -> None:
    colors, shapes = zip(*world.HELD_OUT_COLOR_SHAPES, strict=True)
    assert len(colors) == len(set(colors)) == len(set(shapes)) == 6
    assert len({shape for pair in world.HELD_OUT_SHAPE_PAIRS for shape in pair}) == 6
    assert set(colors) <= set(COLORS)
    assert {shape for pair in world.HELD_OUT_SHAPE_PAIRS for shape in pair} | set(shapes) <= set(SHAPES)


@quick
@given(seeds)
def test_alignment_questions_are_true_balanced_and_hold_out(seed: int) -> None:
    scenes = list(world.sample(np.random.default_rng(seed), 600, SCENE_KINDS))
    pairs = world.alignments(random.Random(seed), scenes)
    for scene, (prompt, true) in zip(scenes, pairs, strict=True):
        assert says_truth(prompt.text, scene) == true, (prompt, scene)
        assert world.mismatches(prompt.metadata(), scene.objects) == [] or not true
        assert not prompt.is_held_out
    for kind in KINDS:
        answers = [true for prompt, true in pairs if prompt.tag == kind]
        assert abs(sum(answers) - len(answers) / 2) <= 1


@quick
@given(seeds)
def test_changed_prompts_are_false(seed: int) -> None:
    rng = random.Random(seed)
    for scene in world.sample(np.random.default_rng(seed), 200, KINDS, "any"):
        for prompt in world.true_prompts(scene):
            assert says_truth(prompt.text, scene)
            other = world.changed(rng, prompt, "any")
            assert other.tag == prompt.tag
            assert not says_truth(other.text, scene)
            assert world.mismatches(other.metadata(), scene.objects)
            if prompt.is_held_out:
                with pytest.raises(ValueError, match="held out"):
                    world.changed(rng, prompt)
            else:
                assert not world.changed(rng, prompt).is_held_out


@quick
@given(seeds)
def test_answers_are_true(seed: int) -> None:
    scenes = list(world.sample(np.random.default_rng(seed), 300, SCENE_KINDS))
    numbers = {"None.": 0, "One.": 1, "Two.": 2, "Three.": 3, "Four.": 4}
    for scene, (question, answer) in zip(scenes, world.questions(random.Random(seed), scenes), strict=True):
        shapes = [thing.shape for thing in scene.objects]
        if match := re.fullmatch(r"Does this image align with the prompt: (a photo of .+)\?", question):
            assert (answer == "Yes.") == says_truth(match[1], scene)
            assert answer in ("Yes.", "No.")
        elif question == "Describe this image.":
            in_order = sorted(scene.objects, key=lambda thing: thing.x)
            assert world.parse_description(answer) == [(thing.color, thing.shape) for thing in in_order]
        elif match := re.fullmatch(r"What color is the (\w+)\?", question):
            assert [thing.color for thing in scene.objects if thing.shape == match[1]] == [answer[:-1].lower()]
        elif question == "How many objects are there?":
            assert numbers[answer] == len(shapes)
        elif match := re.fullmatch(r"How many (\w+) are there\?", question):
            assert numbers[answer] == [world.plural(shape) for shape in shapes].count(match[1])
        elif match := re.fullmatch(r"What is (.+) the (\w+)\?", question):
            color, shape = answer[:-1].split()[1:]
            assert says_truth(f"a photo of a {shape} {match[1]} a {match[2]}", scene)
            assert color == next(thing.color for thing in scene.objects if thing.shape == shape)
        else:
            raise AssertionError(question)


def test_all_questions_are_asked() -> None:
    scenes = list(world.sample(np.random.default_rng(0), 2000, SCENE_KINDS))
    starts = Counter(question.split()[0:2][1] for question, _ in world.questions(random.Random(0), scenes))
    assert {"this", "color", "is", "many"} == set(starts)
    assert min(starts.values()) > 20


def test_same_seed_same_world() -> None:
    first, second = (world.sample(np.random.default_rng(7), 200, SCENE_KINDS) for _ in range(2))
    assert list(first) == list(second)
    assert np.array_equal(first.back, second.back)
    scenes = list(first)
    assert world.questions(random.Random(3), scenes) == world.questions(random.Random(3), scenes)
    assert world.prompts(100, "only", 1) == world.prompts(100, "only", 1) != world.prompts(100, "only", 2)


def test_batches_can_be_cut() -> None:
    batch = world.sample(np.random.default_rng(0), 10)
    assert batch[3] == list(batch)[3] == batch[2:5][1] == batch[np.array([3])][0] == batch[-7]
    assert len(batch[2:5]) == 3
    with pytest.raises(IndexError):
        batch[10]
    assert list(world.sample(np.random.default_rng(0), 0)) == []


def test_unknown_arguments_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="kinds"):
        world.sample(rng, 1, ("animals",))
    with pytest.raises(ValueError, match="kinds"):
        world.sample(rng, 1, ())
    with pytest.raises(ValueError, match="held_out"):
        world.sample(rng, 1, KINDS, "some")
    with pytest.raises(ValueError, match="held_out"):
        world.prompts(1, "some")


def test_evaluation_prompts() -> None:
    for held_out in ("exclude", "only", "any"):
        lines = world.prompts(100, held_out, 0)
        assert [line["index"] for line in lines] == list(range(600))
        assert Counter(line["tag"] for line in lines) == dict.fromkeys(KINDS, 100)
        for line in lines:
            assert line["prompt"].startswith("a photo of ")
            shapes = tuple(entry["class"] for entry in line["include"])
            pairs = {(entry.get("color"), entry["class"]) for entry in line["include"]}
            held = {
                "color": bool(pairs & set(world.HELD_OUT_COLOR_SHAPES)),
                "pair": any(set(pair) == set(shapes) for pair in world.HELD_OUT_SHAPE_PAIRS),
                "count": (line["include"][0]["count"], shapes[0]) in world.HELD_OUT_COUNTS,
            }
            if held_out == "exclude":
                assert not any(held.values())
            elif held_out == "only" and line["tag"] != "single_object":
                kind = {"colors": "color", "color_attr": "color", "counting": "count"}.get(line["tag"], "pair")
                assert held[kind]
    # As varied as a kind allows: nothing comes a third time before everything came twice.
    times = Counter(line["prompt"] for line in world.prompts(100, "any", 0) if line["tag"] == "counting")
    assert set(times.values()) == {4, 5}


def test_metadata_is_genevals() -> None:
    def line(prompt: Prompt) -> dict[str, object]:
        return prompt.metadata()

    assert line(Prompt("single_object", ("circle",))) == {
        "tag": "single_object",
        "include": [{"class": "circle", "count": 1}],
        "prompt": "a photo of a circle",
    }
    assert line(Prompt("counting", ("cross",), number=3)) == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert line(Prompt("position", ("heart", "ring"), relation="left of")) == {
        "tag": "position",
        "include": [{"class": "heart", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a ring left of a heart",
    }
    assert line(Prompt("color_attr", ("cross", "ring"), ("blue", "orange"))) == {
        "tag": "color_attr",
        "include": [
            {"class": "cross", "count": 1, "color": "blue"},
            {"class": "ring", "count": 1, "color": "orange"},
        ],
        "prompt": "a photo of a blue cross and an orange ring",
    }


def test_articles_and_plurals() -> None:
    assert [world.with_article(words) for words in ("orange ring", "red circle")] == ["an orange ring", "a red circle"]
    assert [world.plural(shape) for shape in ("cross", "heart", "square")] == ["crosses", "hearts", "squares"]


def test_reasons_name_the_mistake() -> None:
    star, heart = Object("star", "blue", 30, 60, 15), Object("heart", "pink", 90, 60, 15)
    reasons = {
        Prompt("single_object", ("circle",)): ["expected circle>=1, found 0", "expected no star, found 1"],
        Prompt("colors", ("star",), ("red",)): ["expected red star>=1, found 1 blue"],
        Prompt("counting", ("star",), number=2): ["expected star>=2, found 1"],
    }
    for prompt, expected in reasons.items():
        assert world.mismatches(prompt.metadata(), [star]) == expected
    left = Prompt("position", ("star", "heart"), relation="left of").metadata()
    assert world.mismatches(left, [star, heart]) == ["expected heart left of star, found right of"]
    assert world.mismatches(Prompt("single_object", ("star",)).metadata(), [star, star]) == ["expected star<2, found 2"]


def test_every_wording_of_a_request_holds_the_prompt() -> None:
    wordings = (*world.REQUEST_WORDINGS, *world.HELD_OUT_WORDINGS)
    assert len(set(wordings)) == len(wordings)
    assert world.request("Can you generate {prompt}", "a photo of a star") == "Can you generate a photo of a star"
    assert world.request("Please draw {things}.", "a photo of two stars") == "Please draw two stars."
    for wording in wordings:
        assert "an orange ring" in world.request(wording, "a photo of an orange ring")


def test_descriptions() -> None:
    objects = (
        Object("star", "blue", 60, 60, 15),
        Object("circle", "red", 20, 60, 15),
        Object("ring", "orange", 100, 60, 15),
    )
    assert world.describe(Scene("mixed", objects[:1])) == "a photo of a blue star."
    assert world.describe(Scene("mixed", objects)) == "a photo of a red circle, a blue star and an orange ring."
    assert world.parse_description("a red circle and a blue star") == [("red", "circle"), ("blue", "star")]
    for text in (
        "",
        "a photo of .",
        "a red circle and",
        "a red circle, a blue star",
        "a red dog.",
        "red circle",
        "an red star",
    ):
        assert world.parse_description(text) is None


def test_vocabulary_holds_every_word() -> None:
    words = set(world.vocabulary())
    scenes = list(world.sample(np.random.default_rng(0), 1500, SCENE_KINDS, "any"))
    texts = [text for pair in world.questions(random.Random(0), scenes, "any") for text in pair]
    texts += [world.request(world.REQUEST_WORDINGS[5], line["prompt"]) for line in world.prompts(100, "any", 0)]
    texts += [*world.CHATS, world.CHAT_REPLY, world.REPLY]
    assert {word for text in texts for word in re.findall(r"[A-Za-z]+", text)} <= words


def test_the_world_needs_only_numpy() -> None:
    code = "import sys, scale_rae.shapes.world; print([m for m in ('torch', 'skimage', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
