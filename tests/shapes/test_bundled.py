"""The bundled model: what it is made of, and that it draws and reads. Figures on many prompts come from evaluate."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import scale_rae
from scale_rae.hub import BUNDLED
from scale_rae.pipeline import ScaleRAE
from scale_rae.shapes import evaluate, world
from scale_rae.shapes.judge import judge
from scale_rae.wording import subject, what_it_can

FOLDER = BUNDLED["shapes"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> ScaleRAE:
    return scale_rae.load("shapes", device="cpu")


def test_files_are_small_and_bfloat16() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32_000_000
    assert max(file.stat().st_size for file in files) < 15_000_000
    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                assert stored.get_slice(name).get_dtype() == "BF16" or name.startswith("diff_head.data_")


def test_config_has_the_published_keys() -> None:
    published = json.loads((Path(__file__).parents[1] / "goldens" / "siglip.json").read_text())["model"]["config"]
    assert set(published) <= set(json.loads((FOLDER / "config.json").read_text()))


@pytest.fixture(scope="module")
def drawn(model: ScaleRAE) -> list[evaluate.Drawn]:
    """A drawing of each of 12 prompts, two of each kind."""
    prompts = world.prompts(2, "exclude", seed=11)
    return evaluate.draw_prompts(model, prompts, seed=3, guidance=3.0, solver="dpmpp_2m", steps=8)


def test_draws_what_it_is_asked_for(drawn: list[evaluate.Drawn]) -> None:
    wrong = [f"{item.metadata['prompt']}: {item.reason}" for item in drawn if not item.correct]
    assert len(wrong) <= 1, wrong  # it gets 99 % right


def _prompts_of_pages() -> list[str]:
    """The prompts of the commands that draw with the bundled model, and those that README.md lists for it."""
    found = re.findall(
        r'"([^"]+)"', next(re.finditer(r"^\| draw \|.*", (ROOT / "README.md").read_text(), re.MULTILINE))[0]
    )
    for page in (ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text().replace("\\\n", " ").splitlines():
            if " t2i " in line and "--model-path shapes" in line and "--lora" not in line:
                found += re.findall(r'(?: t2i|--prompt|shapes) "([^"]+)"', line)
    return found


def test_draws_the_prompts_of_every_page(model: ScaleRAE) -> None:
    prompts = _prompts_of_pages()
    assert len(prompts) >= 8
    assert [p for p, reply in zip(prompts, model.reply(prompts), strict=True) if reply.condition is None] == []


def test_reads_pictures(model: ScaleRAE) -> None:
    shares = evaluate.alignment(model, 60, seed=5, held_out="exclude")
    assert shares["overall"].value >= 0.93
    assert evaluate.description(model, 30, seed=6, held_out="exclude").value >= 0.85


def test_judges_its_own_latents(model: ScaleRAE, drawn: list[evaluate.Drawn]) -> None:
    assert evaluate.agreement(model, drawn)["all"].value >= 0.75
    others = [item.metadata["prompt"] for item in drawn[2:] + drawn[:2]]  # another kind's prompt is false
    said_yes = evaluate.align(model, [item.latent for item in drawn], others)
    assert sum(said_yes) <= 2


def test_encode_decode(model: ScaleRAE) -> None:
    assert evaluate.reconstruction(model, 12, seed=7, held_out="any") >= 27


def test_small_talk(model: ScaleRAE) -> None:
    generation = model.generate("Hello")
    assert not generation.images
    assert generation.text == world.CHAT_REPLY


def scene(color: str, shape: str) -> world.SceneBatch:
    """A scene of this object alone."""
    scenes = world.sample(np.random.default_rng(4), 600, ("colors",), "any")
    found = [i for i, one in enumerate(scenes) if (one.objects[0].color, one.objects[0].shape) == (color, shape)]
    return scenes[np.array(found[:1])]


GUIDE_QUESTIONS = {
    "Can you describe what's in this image?": ("a photo of a blue star.", "a photo of a green circle."),
    "What's in this image?": ("a photo of a blue star.", "a photo of a green circle."),
    "Is there a blue star?": ("Yes.", "No."),
    "Is it green?": ("No.", "Yes."),
    "What shape is this?": ("A star.", "A circle."),
}


def test_answers_the_questions_of_the_guide(model: ScaleRAE) -> None:
    images = [evaluate.pictures(scene(*thing))[0] for thing in (("blue", "star"), ("green", "circle"))]
    latents, wrong = model.encode(images), []
    for question, wanted in GUIDE_QUESTIONS.items():
        for text in (question, question.lower(), question.upper(), question.rstrip("?"), question.rstrip("?").lower()):
            answers = model.answer(text, latents=latents, max_new_tokens=40)
            wrong += [(text, a.text, w) for a, w in zip(answers, wanted, strict=True) if a.text.strip() != w]
    assert not [one for one in wrong if not one[0].isupper()]
    assert len(wrong) <= 2, wrong  # of 50: capital letters are spelled one by one, and are read less surely


def test_a_question_without_a_picture_is_not_answered_by_a_drawing(model: ScaleRAE) -> None:
    for reply in model.reply(list(GUIDE_QUESTIONS), max_new_tokens=40):
        assert reply.condition is None
        assert model.tokenizer.decode(reply.ids).strip() == world.NO_PICTURE


def test_says_yes_to_its_drawings_of_the_examples_that_it_is_shown_with(model: ScaleRAE) -> None:
    examples = re.findall('"(.+?)"', str(what_it_can(model.source)))
    assert len(examples) == 3
    drawn = model.generate(examples, num_images=2, solver="ab2", steps=12)
    for example, generation in zip(examples, drawn, strict=True):
        question = f"Does this image align with the prompt: {subject(example).rstrip('.')}?"
        answers = model.answer(question, latents=[image.latent for image in generation.images])
        assert [answer.text for answer in answers] == ["Yes."] * 2, example


def test_declines_what_its_world_does_not_have(model: ScaleRAE) -> None:
    requests = [
        "Can you generate a photo of a cat on a windowsill?",
        "Can you generate a photo of a horse and a giraffe",
        "Can you generate a photo of a cake and a zebra",
        "Can you generate a photo of a bottle and a refrigerator",
        "Can you create an image of a peaceful garden?",
        "Show me a photo of a serene lake at dawn",
        "Can you give me a photo of a futuristic robot?",
        "Show me seven stars.",
        "Please draw a turquoise hexagon.",
    ]
    replies = model.reply(requests, max_new_tokens=60)
    said = [model.tokenizer.decode(reply.ids).strip() for reply in replies]
    assert said == [world.OUTSIDE_REPLY] * len(requests)
    assert all(reply.condition is None for reply in replies)
    inside = [
        "show me a red circle",
        "DRAW TWO BLUE STARS",
        "a black heart",
        "Can you generate a photo of a ring and a cross?",
    ]
    assert all(reply.condition is not None for reply in model.reply(inside, max_new_tokens=20))


def test_share_interval() -> None:
    share = evaluate.Share(90, 100)
    low, high = share.interval
    assert low == pytest.approx(0.8256, abs=1e-3)  # Wilson, from the literature's worked example
    assert high == pytest.approx(0.9448, abs=1e-3)
    assert evaluate.Share(0, 0).interval == (0.0, 1.0)


def test_results_are_genevals(model: ScaleRAE, tmp_path: Path) -> None:
    prompts = world.prompts(1, "exclude", seed=1)[:2]
    drawn = evaluate.draw_prompts(model, prompts, solver="dpmpp_2m", steps=4)
    evaluate.write_results(tmp_path, drawn)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"filename", "tag", "prompt", "correct", "reason", "metadata"}] * 2
    assert all(Path(line["filename"]).is_file() for line in lines)
    assert json.loads(lines[0]["metadata"])["tag"] == lines[0]["tag"]


def test_evaluate_prints_help() -> None:
    command = [sys.executable, "-m", "scale_rae.shapes.evaluate", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(name in shown for name in ("draw", "read", "ask", "decline", "reconstruct"))


@pytest.mark.parametrize(
    ("given", "said"), [(["--steps", "49"], "steps 49"), (["--guidance", "1"], "guidance level 1")]
)
def test_evaluate_refuses_what_a_student_does_not_take(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the defaults, if they are given."""
    monkeypatch.setattr(sys, "argv", ["evaluate", "draw", "--model-path", "shapes-4", *given])
    with pytest.raises(SystemExit):
        evaluate.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}: this model is a student and takes only ")
    assert error.endswith("; leave it out, or draw with its base model, shapes\n")


def test_pictures_are_the_drawn_scenes() -> None:
    rng = random.Random(0)
    scenes = world.sample(np.random.default_rng(0), 12, world.KINDS, held_out="any")
    for scene, image in zip(scenes, evaluate.pictures(scenes), strict=True):
        assert image.size == (world.SIZE, world.SIZE)
        for prompt in world.true_prompts(scene):
            assert judge(image, prompt.metadata()).correct, prompt
            assert not judge(image, world.changed(rng, prompt, "any").metadata()).correct, prompt


def test_the_student_draws_in_four_evaluations() -> None:
    student = scale_rae.load("shapes-4", device="cpu")
    files = [file for file in BUNDLED["shapes-4"].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert max(file.stat().st_size for file in files) < 15_000_000
    evaluations: list[int] = []
    drawn = evaluate.draw_prompts(
        student, world.prompts(1, "exclude", seed=11), seed=3, callback=lambda *at: evaluations.append(at[1])
    )
    assert evaluations == [4] * 4
    assert sum(item.correct for item in drawn) >= 5  # it gets 98 % right
