"""The recipe's last stage: what it says is true, in other words than evaluation's, and names nothing that is held out."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from recipes.shapes import common, export, lessons, networks, own, reader, refit, wordings
from recipes.shapes.lessons import Writer
from recipes.shapes.settings import TINY
from recipes.shapes.tokenizer import cased_words, words
from scale_rae.prompt import SYSTEM, ChatTokenizer, Turn
from scale_rae.shapes import asking, world
from scale_rae.shapes.world import Object, Scene
from scale_rae.training.optim import OptimizerOptions

SHIPPED = Path(__file__).parents[2] / "scale_rae" / "bundled" / "shapes"


@pytest.fixture(scope="module")
def write() -> Writer:
    tokenizer = ChatTokenizer(SHIPPED, image_markers=True)
    return Writer(tokenizer, tokenizer.chat_start - 1, TINY.tokens)


def plain(text: str) -> str:
    return re.sub(r"[^a-z{} ]", "", text.lower()).strip()


def test_evaluation_asks_in_other_words_than_training() -> None:
    assert set(asking.WORDINGS) == set(wordings.QUESTIONS) == set(asking.KINDS)
    for kind, told in wordings.QUESTIONS.items():
        assert not set(map(plain, told)) & set(map(plain, asking.WORDINGS[kind])), kind
    assert set(world.HELD_OUT_WORDINGS).isdisjoint(wordings.REQUESTS)
    assert not set(asking.REQUESTS) & {request.replace("{prompt}", "{}") for request in wordings.REQUESTS}


def test_evaluation_asks_for_other_things_than_training() -> None:
    rng = random.Random(0)
    texts = [wordings.outside(rng) for _ in range(3000)] + [wordings.talk(rng).lower() for _ in range(1000)]
    said = set(re.findall(r"[a-z0-9]+", " ".join(texts)))
    for told in (asking.NOUNS, asking.COLORS, asking.SHAPES, asking.NUMBERS):
        assert said.isdisjoint(told), said & set(told)
    assert {"cat", "horse", "giraffe", "windowsill"} <= set(asking.NOUNS)


def test_requests_of_training_are_not_worded_as_those_of_evaluation() -> None:
    for text in ("Could you show me {things}?", "CAN I GET {prompt}", "Could you make a drawing of {things}, please."):
        assert asking.is_held_out_request(text), text
    assert not asking.is_held_out_request("Could you paint {things}?")
    rng = random.Random(0)
    said = {plain(wordings.inside_request(rng, "a photo of a star")) for _ in range(3000)}
    wanted = {
        plain(wording.replace("{}", thing)) for wording in asking.REQUESTS for thing in ("a star", "a photo of a star")
    }
    assert not said & wanted


def test_evaluation_has_other_system_messages_than_training() -> None:
    rng = random.Random(0)
    said = [wordings.system(rng) for _ in range(4000)]
    others = [text for text in said if text != SYSTEM]
    assert 0.1 < len(others) / len(said) < 0.2
    assert "" in others
    assert len(set(others)) > 0.8 * len(others)
    everything = "|".join(map(plain, others))
    for told in asking.SYSTEMS:
        for sentence in re.split(r"(?<=[.])\s", told.replace(SYSTEM, "")):
            assert not plain(sentence) or plain(sentence) not in everything, sentence


def test_things_without_articles_are_asked_for_in_any_case() -> None:
    rng = random.Random(0)
    inside = {wordings.inside_request(rng, "a photo of a red circle") for _ in range(4000)}
    assert {"red circle", "RED CIRCLE", "Red Circle", "red circle."} <= inside
    assert "can you generate red circle" in map(plain, inside)
    after_a_picture = {wordings.inside_request(rng, "a photo of a red circle", bare=False) for _ in range(2000)}
    assert "red circle" not in map(plain, after_a_picture)
    outside = [plain(wordings.outside_request(rng)) for _ in range(2000)]
    assert sum(len(text.split()) == 1 for text in outside) > 10


def test_questions_in_title_case_are_not_rare() -> None:
    rng = random.Random(0)
    asked = asking.Question("it_color", {"color": "black"}, world.YES)
    said = [wordings.in_words(rng, asked) for _ in range(2000)]
    titles = [text for text in said if all(word[:1].isupper() for word in re.findall(r"[A-Za-z'’]+", text))]
    assert sum(not text.isupper() for text in titles) > 0.15 * len(said)
    assert not any(re.search("[a-z]['’][A-Z]", text) for text in said)


def test_lessons_are_true_and_name_nothing_held_out(write: Writer) -> None:
    scenes, second, read = reader.read_chunk(0, 300, 3, write)
    assert len(scenes) == len(second) == len(read) == 300
    usual, plainly, follow = reader.draw_chunk(0, 60, 3, 300, write)
    assert len(plainly) == reader.REQUESTS_EACH * len(usual)
    everything = [read, usual, plainly, follow, *reader.other_chunk(0, 80, 3, 300, write).values()]
    for rows in everything:
        for ids, length, answer, image in zip(rows.ids, rows.length, rows.answer, rows.image, strict=True):
            text = write.tokenizer.decode(ids[:length].tolist())
            turn = text.rsplit("user\n", 1)[1].removesuffix(world.OUTSIDE_REPLY)
            assert not asking.names_held_out(turn), turn
            assert not any(wording.partition("{")[0].lower() in text.lower() for wording in world.HELD_OUT_WORDINGS)
            assert answer <= length <= lessons.WIDTH
            if image != lessons.NO_PLACE:
                assert (ids[image : image + TINY.tokens] == write.pad).all()
                assert ids[image - 1] == write.tokenizer.image_start


def test_a_lesson_is_the_conversation_at_inference(write: Writer) -> None:
    tokenizer = write.tokenizer
    lesson = write.said("What shape is this", "A star.", picture=5)
    assert lesson is not None
    shown = [*lesson.ids[: lesson.image], -200, *lesson.ids[lesson.image + TINY.tokens : lesson.answer]]
    assert shown == tokenizer.chat("What shape is this", image=True)
    assert tokenizer.decode(lesson.ids[lesson.answer :]) == "A star."
    asked = write.drawn("SHOW ME A STAR", 7, learns=True)
    assert asked is not None
    assert asked.ids[: asked.answer] == tokenizer.chat("SHOW ME A STAR")
    assert asked.ids[asked.answer :] == [*tokenizer.plain(world.REPLY), tokenizer.image_start]


def test_a_lesson_after_another_system_message_is_the_conversation_at_inference(write: Writer) -> None:
    tokenizer, system = write.tokenizer, "Be kind."
    lesson = write.said("Is it red?", world.NO, picture=5, before="Draw a star.", system=system)
    assert lesson is not None
    shown = [*lesson.ids[: lesson.image], -200, *lesson.ids[lesson.image + TINY.tokens : lesson.answer]]
    turns = [Turn("user", "Draw a star."), Turn("assistant", world.REPLY, 1), Turn("user", "Is it red?")]
    assert shown == tokenizer.conversation(turns, system)
    asked = write.drawn("RED CIRCLE", 7, learns=True, system=system)
    assert asked is not None
    assert asked.ids[: asked.answer] == tokenizer.conversation([Turn("user", "RED CIRCLE")], system)


def thing(color: str, shape: str, x: float = 60, y: float = 60) -> Object:
    return Object(shape, color, x, y, 20)


def test_wishes_are_granted_by_what_they_name() -> None:
    listed = own.Wish("", None, (("red", "circle"), ("", "star")))
    star, circle = thing("blue", "star"), thing("red", "circle")
    assert listed.is_granted((star, circle))
    assert not listed.is_granted((star, star))
    assert not listed.is_granted((star, circle, circle))
    single = own.Wish("a photo of a star", world.Prompt("single_object", ("star",)))
    assert single.is_granted((star,))
    assert not single.is_granted((circle,))


def test_lessons_about_own_drawings_follow_the_judge(write: Writer) -> None:
    wish = own.Wish("a photo of a circle", world.Prompt("single_object", ("circle",)))
    circle, cross = thing("red", "circle"), thing("pink", "cross")
    seen = [own.Seen((circle,), True), own.Seen((cross,), True), own.Seen((circle,), False), own.Seen((), False)]
    seen.append(own.Seen((thing("red", "star"),), True))  # held out
    seen.append(own.Seen((thing("pink", "square"),) * 6, False))  # four of them would be
    made = lessons.own_lessons(random.Random(0), write, [wish] * len(seen), seen, 100)
    assert [sum(one.picture == 100 + i for one in made) for i in range(len(seen))] == [4, 6, 6, 0, 0, 6]
    for one in made:
        text = write.tokenizer.decode(one.ids)
        told, answer = text.rsplit("\nassistant\n", 1)
        if world.ALIGN.format(prompt=wish.text) in told:
            assert answer == (world.YES if one.picture == 100 else world.NO)


def test_questions_are_answered_by_what_is_there() -> None:
    rng = random.Random(0)
    scene = Scene("mixed", (thing("red", "circle", 30, 60), thing("blue", "star", 90, 62)))
    wanted = {
        "which_shapes": {"A circle and a star."},
        "which_colors": {"Red and blue."},
        "how_many": {"Two."},
        "where": {"Left of the star.", "Right of the circle."},
        "which_shape": set(),
    }
    for kind, answers in wanted.items():
        found = {one.answer for _ in range(20) if (one := asking.question(rng, scene, kind))}
        assert found == answers, kind
    for _ in range(100):
        one = asking.question(rng, scene, "there")
        assert one is not None
        there = one.parts["thing"] in ("a circle", "a red circle", "a star", "a blue star")
        assert (one.answer == world.YES) == there, one
        beside = asking.question(rng, scene, "beside")
        if beside is not None and beside.parts == {"relation": "left of", "shape": "star"}:
            assert beside.answer == "A red circle."
        if beside is not None and beside.parts == {"relation": "right of", "shape": "star"}:
            assert beside.answer == asking.NOTHING


def test_names_held_out_in_any_case() -> None:
    assert asking.names_held_out("IS THERE A RED STAR?")
    assert asking.names_held_out("Draw 2 hearts.")
    assert asking.names_held_out("a star above a ring")
    assert not asking.names_held_out("a red ring and two crosses")


def test_varied_words_stay_the_same_words() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = asking.varied(rng, "What's in this image?")
        assert text.lower().rstrip(".?! ") == "what's in this image"


def test_queries_and_pictures_stand_where_inference_has_them(write: Writer) -> None:
    torch.manual_seed(0)
    words = common.Vocabulary(write.tokenizer, None, write.pad + 5, write.pad, 0, write.tokenizer.chat_end)
    _, language, _ = networks.build_joint(words.model_config(TINY))
    reading = reader.Reading(language, TINY, words.size, lessons.WIDTH, torch.float32)
    asked = write.drawn("Show me a star.", 0, learns=True)
    about = write.said("Is it green?", world.YES, picture=0)
    assert asked is not None
    assert about is not None
    rows = lessons.Rows.of([asked, about], write.pad)
    ids, length = torch.from_numpy(rows.ids).long(), torch.from_numpy(rows.length).long()
    with torch.no_grad():
        queried = reading.embed(reading.with_queries(ids[:1], length[:1]))
        place = int(length[0])
        assert torch.equal(queried[0, place : place + TINY.tokens], language.model.latent_queries)
        assert torch.equal(queried[0, :place], language.model.embed_tokens.weight[ids[0, :place]])
        latents = torch.randn(2, TINY.tokens, TINY.channels)
        image = torch.from_numpy(rows.image).long()
        shown = reading.with_pictures(reading.embed(ids), latents, image)
        assert torch.equal(shown[0], reading.embed(ids)[0])
        there = slice(about.image, about.image + TINY.tokens)
        assert torch.allclose(shown[1, there], language.model.mm_projector(latents[1]), atol=1e-6)
        condition = reading.condition(reading.hidden(queried), length[:1])
        made = reader.conditions_of(language, TINY, words.size, lessons.Rows.of([asked], write.pad), torch.float32)
    torch.testing.assert_close(made, condition, atol=1e-5, rtol=1e-5)


def test_every_word_in_any_case_is_one_token(tmp_path: Path) -> None:
    plainly, cased = common.vocabulary(tmp_path), common.vocabulary(tmp_path, cased=True)
    for word in words():
        for other in (word.lower(), word.upper(), f" {word.strip().capitalize()}"):
            assert len(cased.tokenizer.plain(other)) == 1 or other not in {*words(), *cased_words()}, other
    text = "Can you generate a photo of two lobsters? Yes, 7 of them!"
    assert cased.tokenizer.plain(text) == plainly.tokenizer.plain(text)


def test_a_grown_model_says_what_it_said(tmp_path: Path) -> None:
    before, after = common.vocabulary(tmp_path), common.vocabulary(tmp_path, cased=True)
    table = torch.randn(before.size, 8, generator=torch.Generator().manual_seed(0))
    grown = export.grown({export.EMBEDDING: table, "model.x": torch.ones(1)}, before, after)
    assert grown["model.x"] == 1
    bigger = grown[export.EMBEDDING]
    assert bigger.shape == (after.size, 8)
    for text in ("Can you generate a photo of a red circle?", "Zebra"):
        ids, old = after.tokenizer.chat(text), before.tokenizer.chat(text)
        assert torch.equal(bigger[ids], table[old])
    (capitals,), (small,) = after.tokenizer.plain(" CIRCLE"), before.tokenizer.plain(" circle")
    assert torch.nn.functional.cosine_similarity(bigger[capitals], table[small], dim=0) > 0.999
    assert torch.equal(export.grown(grown, after, after)[export.EMBEDDING], bigger)


def test_names_are_read_alike_wherever_they_stand(tmp_path: Path) -> None:
    words = common.vocabulary_of(SHIPPED)
    table = torch.randn(words.size, 64, generator=torch.Generator().manual_seed(0))
    alike = export.read_alike({export.EMBEDDING: table}, words)[export.EMBEDDING]

    def near(one: str, other: str) -> float:
        (a,), (b,) = words.tokenizer.plain(one), words.tokenizer.plain(other)
        return float(torch.nn.functional.cosine_similarity(alike[a], table[b], dim=0))

    for one, other in (
        (" Red", " red"),
        (" A", " a"),
        ("blue", " blue"),
        ("circles", " circles"),
        ("STAR", " STAR"),
        (" Two", " two"),
    ):
        assert near(one, other) > 0.999, one
    for text in (
        "Can you generate a photo of a red circle and two stars?",
        "Red and blue.",
        "Two.",
        "Is it colored green?",
    ):
        usual = words.tokenizer.plain(text)
        assert torch.equal(alike[usual], table[usual]), text


def test_the_projector_that_was_changed_is_solved_for() -> None:
    torch.manual_seed(0)
    wanted, present = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
    fit = refit.LeastSquares(6, 3)
    with torch.no_grad():
        for states in torch.randn(4, 50, 2, 6):
            fit.add(states, wanted(states) - present(states))
        weight, bias = fit.solve()
        torch.testing.assert_close(present.weight + weight, wanted.weight, atol=1e-3, rtol=0, check_dtype=False)
        torch.testing.assert_close(present.bias + bias, wanted.bias, atol=1e-3, rtol=0, check_dtype=False)


def test_pools_are_what_was_saved(write: Writer, tmp_path: Path) -> None:
    scenes, second, read = reader.read_chunk(0, 20, 1, write)
    made = reader.Made(scenes, second, read, {"read": read})
    made.save(tmp_path / "pools.npz")
    back = reader.Made.load(tmp_path / "pools.npz")
    assert list(back.rows) == ["read"]
    assert (back.rows["read"].ids == read.ids).all()
    assert (back.prompts.length == read.length).all()
    assert (back.scenes.shape == scenes.shape).all()
    assert (back.second.rgb == second.rgb).all()


def test_each_step_pulls_towards_the_anchor() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    options = OptimizerOptions(kind="adamw", lr=0.0, weight_decay=0.0, warmup=1, decay=0.5)
    model = reader.Held({"": layer}, torch.device("cpu"), torch.float32, options, 10)
    before = layer.weight.detach().clone()
    model.hold({"weight": torch.zeros(4, 4)}, pull=0.25)
    assert torch.equal(layer.weight, before)
    for _ in range(2):  # the rate of the step before is that of the pull: none at first
        model.update([torch.zeros(4, 4)])
    torch.testing.assert_close(layer.weight.detach(), 0.75 * before)


@pytest.mark.parametrize(("flags", "moved"), [([], 4.0), (["--along", "1.5"], 5.5)])
def test_a_velocity_network_is_put_into_an_exported_model(
    tmp_path: Path, flags: list[str], moved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run is needed: the language model is that of the exported model."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 4.0)):
        tensors = {"model.x": torch.full((2,), value), "diff_head.y": torch.full((2,), value)}
        common.save_weights(tmp_path / name / "model.safetensors", tensors)
    export.main(["--parts-of", "a", "--dit", "b", "--export", "c", *flags])
    made = export.stored(tmp_path / "c")
    assert made["model.x"].tolist() == [1.0, 1.0]
    assert made["diff_head.y"].tolist() == [moved, moved]


@pytest.mark.parametrize("flags", [["--dit", "b"], ["--along", "2"], ["--parts-of", "a", "--along", "2"]])
def test_a_velocity_network_needs_a_model_to_be_put_into(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--export", "c", *flags])
    assert "needs --" in capsys.readouterr().err
