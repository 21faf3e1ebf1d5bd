"""The page's handlers and words, without a browser."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scale_rae.demo.board import leaderboard
from scale_rae.demo.listening import bind
from scale_rae.demo.results import RankedImage, RankingState, SavedImage
from scale_rae.demo.shared_model import SharedModel
from scale_rae.demo.words import sentence
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.opening import OpenedModel
from scale_rae.options import PROMPT_PREFIX, ModelChoice
from scale_rae.shapes.judge import find_objects
from scale_rae.wording import as_request
from tests.demo.conftest import needs_gradio
from tests.helpers.late import Late

pytestmark = needs_gradio
gr, page, widgets = (Late(name) for name in ("gradio", "scale_rae.demo.page", "scale_rae.demo.widgets"))

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def drawing(shared: SharedModel) -> SavedImage:
    work = shared.draw("a red circle", widgets.sampling(1, 1.0, 2, "euler", "5"))
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value.images[0]


def test_fields_become_a_sampling() -> None:
    sampling = widgets.sampling(4, 3, 49, "heun", " 9087990001452917107 ")
    options = sampling.options
    assert (sampling.num_images, options.guidance, options.steps, options.solver) == (4, 3.0, 49, "heun")
    assert sampling.seed == 9087990001452917107  # beyond what a browser's numbers hold


def test_an_empty_seed_is_a_new_one_each_time() -> None:
    assert len({widgets.sampling(1, 1, 49, "euler", seed).seed for seed in ("", " ", None) for _ in range(3)}) == 9


@pytest.mark.parametrize("seed", ["a", "1.5", "1e3", "9" * 30])
def test_a_field_that_is_no_number_is_named(seed: Any) -> None:
    with pytest.raises(InputError, match="The seed is"):
        widgets.sampling(1, 1, 49, "euler", seed)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("seed -1: must be at least 0", "Seed -1: must be at least 0."),
        ("Write a prompt first: what is to be drawn?", "Write a prompt first: what is to be drawn?"),
        ("/models/x: no such\n folder", "/models/x: no such folder."),
        (f"{HOSTILE}: bad", "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;: bad."),
    ],
)
def test_errors_are_sentences(text: str, shown: str) -> None:
    assert sentence(text) == shown


def test_handlers_show_sentences_and_keep_secrets(caplog: pytest.LogCaptureFixture) -> None:
    @widgets.shows_errors
    def refused() -> None:
        raise InputError("seed -1: too small")

    @widgets.shows_errors
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("/home/me/secret")

    with pytest.raises(gr.Error) as caught:
        refused()
    assert caught.value.message == "Seed -1: too small."
    assert not caught.value.print_exception
    steps = broken()
    assert next(steps) == 1
    with pytest.raises(gr.Error) as caught:
        next(steps)
    assert "ValueError" in caught.value.message
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text  # on the terminal


def test_details_and_pictures_of_drawings(drawing: SavedImage) -> None:
    column, seed, command, files = widgets.detailed([drawing], 0)
    assert column.visible
    assert seed == "Seed **5**"
    assert command == drawing.command
    assert [Path(file).suffix for file in files] == [".png", ".pt", ".json"]
    assert widgets.detailed([drawing, drawing], 1)[1] == "Image 2 of 2 · seed **5**"
    assert not widgets.detailed([], 0)[0].visible
    assert widgets.pictures([drawing]) == [(str(drawing.png), drawing.request)]
    assert widgets.remembered([drawing] * widgets.REMEMBERED, [drawing, drawing]) == [drawing] * widgets.REMEMBERED


def test_drawing_updates_end_with_the_drawings(shared: SharedModel) -> None:
    work = shared.draw("a red circle", widgets.sampling(2, 1.0, 2, "euler", "5"))
    updates = list(widgets.draw_updates(work, []))
    assert "Reading the prompt" in updates[0][0]
    assert 'role="progressbar" aria-valuenow="50"' in updates[1][0]
    assert len(updates[1][1]) == 2
    *_, last = updates
    assert "2 drawn in" in last[0]
    assert [d.seed for d in last[2]] == [d.seed for d in last[-1]]
    assert len(last) == len(updates[0]) == len(updates[1]) == 8


def test_a_conversation_grows(shared: SharedModel, drawing: SavedImage) -> None:
    history: list[dict[str, Any]] = []
    for question in widgets.QUESTIONS[:2]:
        updates = list(widgets.conversation(shared, history, question, drawing.latent, None))
        fields = [field for _, field in updates]
        assert fields[0] == ""
        assert len(fields) > 1
        assert all(field == gr.skip() for field in fields[1:])  # what is typed meanwhile stays
        history = updates[-1][0]
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    assert history[2]["content"] == widgets.QUESTIONS[1]
    assert all(message["content"] for message in history)


def test_the_examples_are_of_the_bundled_models_world(shared: SharedModel) -> None:
    """What is offered to be drawn and asked works."""
    model = shared.model
    wanted = {
        "a red circle": [("red", "circle")],  # what the empty field shows
        "three stars": ["star"] * 3,
        "a star below a ring": ["ring", "star"],
        "a blue square and a pink star": [("blue", "square"), ("pink", "star")],
    }
    assert list(wanted)[1:] == page.SHAPES_PROMPTS
    latents = []
    options: dict[str, Any] = {"num_images": 2, "seed": 2, "guidance": 3.0, "steps": 8, "solver": "dpmpp_2m"}
    for prompt, things in wanted.items():
        (result,) = model.generate([as_request(prompt, PROMPT_PREFIX)], **options)
        seen = [find_objects(image.image) for image in result.images]
        kinds = [[(f.color, f.shape) if isinstance(things[0], tuple) else f.shape for f in found] for found in seen]
        assert sum(sorted(found) == sorted(things) for found in kinds) == 2, (prompt, kinds)
        latents.append(result.images[0].latent)
    answers = [[a.text.strip() for a in model.answer(q, latents=latents, max_new_tokens=40)] for q in widgets.QUESTIONS]
    assert answers[0][0] == "a photo of a red circle."
    assert answers[1] == ["One.", "Three.", "Two.", "Two."]
    assert answers[2] == ["Yes.", "No.", "No.", "No."]


def judged(place: int, kept: bool, why: str | None = None) -> RankedImage:
    image = Image.new("RGB", (600, 400), "red")
    scores = {"combined": -1.25, "reward": None, "prompt_loss": 2.0}
    return RankedImage(image, torch.zeros(1), 2**62, place, kept, "yes" if kept else "uncertain", scores, why)


def test_the_leaderboard_tells_all_and_escapes(drawing: SavedImage) -> None:
    text = leaderboard(RankingState([judged(0, True), judged(1, False, HOSTILE)], 2, "", [drawing, drawing]))
    assert text.index('class="kept"') < text.index('class="dropped"')
    assert HOSTILE not in text
    assert "&lt;img src=x" in text
    for part in ("model says yes", "model says neither", "<dd>−1.25</dd>", "<dd>–</dd>", str(2**62), "scale-rae t2i"):
        assert part in text
    assert leaderboard(RankingState([], 2, "", [])) == ""


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ScaleRAEError, match=rf"^cannot listen on 127.0.0.1, port {port}; choose another --port$"):
            bind("127.0.0.1", port)
    with pytest.raises(ScaleRAEError, match=r"^cannot listen on no.such.host, any port from 7860 on \(.*--host"):
        bind("no.such.host", None)


def test_the_page_offers_no_interface_but_itself(shared: SharedModel, tmp_path: Path) -> None:
    built = page.build(shared, tmp_path)
    assert not built.get_api_info()["named_endpoints"]
    limits = {f.concurrency_id: f.concurrency_limit for f in built.fns.values() if f.queue}
    assert limits["model"] == 1
    assert not built.analytics_enabled


def test_the_page_says_what_the_bundled_model_draws_and_answers(
    shared: SharedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = str(page.build(shared, tmp_path).config)
    for words in ("one to four shapes", "cross", "pink", "questions about such pictures", "docs/bundled-model.md"):
        assert words in said
    monkeypatch.setattr(shared.model.tokenizer, "image_start", shared.model.tokenizer.chat_end)
    with pytest.raises(InputError, match=r"answered without drawing.*one to four shapes"):
        list(shared.draw("a red circle", widgets.sampling(1, 1.0, 2, "euler", "5")))


def test_a_students_fields_are_fixed_and_have_no_effect(tmp_path: Path) -> None:
    choice = ModelChoice("shapes-4", device="cpu")
    student = SharedModel(OpenedModel(choice, decoder=True), choice, tmp_path / "drawn")
    own = student.model.config.student
    assert own is not None
    components = page.build(student, tmp_path).config["components"]
    fields = {c["props"]["elem_id"]: c["props"] for c in components if c["props"].get("elem_id")}
    for tab in ("draw", "best", "latent"):
        for name, value in (("guidance", own.guidance), ("steps", own.steps), ("solver", "euler")):
            field = fields[f"{tab}-{name}"]
            assert (field["value"], field["interactive"]) == (value, False)
            assert field["info"] == "fixed: this model is a student"
    others = widgets.sampling(1, 3.0, 49, "heun", "5")  # from no page
    *_, last = widgets.draw_updates(student.draw("a red circle", others), [])
    (image,) = last[2]
    manifest = json.loads(image.manifest.read_text())
    assert (manifest["guidance_level"], manifest["steps"], manifest["solver"]) == (own.guidance, own.steps, "euler")
    assert not {"--guidance-level", "--steps", "--solver"} & set(shlex.split(image.command))
    *_, ranked = student.best_of("a red circle", others, 1, "loss", None)
    *_, searched = student.search("a red circle", others, 1, 1, None)
    assert len(ranked.images) == len(searched.cards) == 1
