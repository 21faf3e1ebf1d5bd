"""Latents of several prompts in one batch score as they do one by one; an early score is the cheap part of a Score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from scale_rae.errors import InputError
from scale_rae.kv_cache import CachePool, KVCache
from scale_rae.language import Reply
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION
from scale_rae.qwen2 import Qwen2
from scale_rae.scores import Asked, EarlyScore, Score, texts_of
from scale_rae.shapes import draw, world

# Sums of float32 products depend on the number of rows that are multiplied at once: by less than 1e-6 here.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def shapes() -> ScaleRAE:
    return ScaleRAE.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def latents(shapes: ScaleRAE) -> list[Tensor]:
    return shapes.encode(draw.to_pil(world.sample(np.random.default_rng(0), 6)))


@pytest.fixture(scope="module")
def asked(shapes: ScaleRAE) -> list[Asked]:
    """Of each latent: true, false, long and one-token prompts; the first and the last two share one."""
    scenes = world.sample(np.random.default_rng(0), 6)
    long = f"{world.describe(scenes[3])} and two green stars below a yellow ring" * 3
    prompts = [world.describe(scenes[0]), world.describe(scenes[1]), "x", long]
    requests = ["a circle", "Can you generate a photo of two blue stars above a red ring?", "x", "Draw a red star."]
    each = [Asked(*about) for about in zip(prompts, requests, shapes.reply(requests, draw=False), strict=True)]
    return [each[i] for i in (0, 1, 2, 3, 0, 0)]


def same(scores: Sequence[Score | EarlyScore], expected: Sequence[Score | EarlyScore]) -> None:
    assert len(scores) == len(expected)
    for score, one in zip(scores, expected, strict=True):
        for name, value in vars(one).items():
            near = pytest.approx(value, rel=ROUNDING, abs=ROUNDING) if isinstance(value, float) else value
            assert getattr(score, name) == near, name


def one_by_one(model: ScaleRAE, latents: Sequence[Tensor], asked: Sequence[Asked], most: int = 64) -> list[Score]:
    return [
        score
        for latent, about in zip(latents, asked, strict=True)
        for score in model.score(
            [latent], about.prompt, request=about.request, request_reply=about.reply, max_new_tokens=most
        )
    ]


def test_several_prompts_in_one_batch_score_as_one_by_one(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]
) -> None:
    assert len({len(shapes.tokenizer.plain(about.prompt)) for about in asked}) > 2
    alone = one_by_one(shapes, latents, asked)
    assert {score.answer for score in alone} >= {"yes", "no"}
    same(shapes.score_each(latents, asked), alone)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = shapes.score_each([latents[i] for i in order], [asked[i] for i in order])
    same(shuffled, [alone[i] for i in order])


@pytest.mark.parametrize("name", ["siglip", "webssl"])  # with and without tokens around an image
def test_several_prompts_score_alike_in_every_layout(models: dict[str, ScaleRAE], name: str) -> None:
    model = models[name]
    latents = list(
        torch.randn(3, model.config.tokens, model.config.channels, generator=torch.Generator().manual_seed(5))
    )
    requests = ["a cat", "Can you generate a photo of a dog on a mat?"]
    first, second = map(Asked, ("a cat", "a dog on a mat"), requests, model.reply(requests, max_new_tokens=12))
    asked = [first, second, first]
    alone = one_by_one(model, latents, asked, most=6)
    assert len({len(score.reply) for score in alone}) > 1
    same(model.score_each(latents, asked, max_new_tokens=6), alone)


def test_several_prompts_score_alike_in_memory_of_fixed_size(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: caches of 2, 4, 8 … rows that other batches have used, and passes of padded width."""
    expected = shapes.score_each(latents, asked)
    monkeypatch.setattr(Qwen2, "on_cuda", True)
    monkeypatch.setattr(shapes.language, "caches", CachePool(graph=False, compile_steps=False))
    for start in (0, 1):  # the second time six rows less one, in the memory of six
        same(shapes.score_each(latents[start:], asked[start:]), expected[start:])
    assert sorted(cache.rows for cache in shapes.language.caches.waiting) == [4, 8]


def test_latents_of_one_prompt_score_as_with_score_to_the_bit(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]
) -> None:
    about = asked[1]
    scores = shapes.score(latents[:3], about.prompt, request=about.request, request_reply=about.reply)
    assert shapes.score_each(latents[:3], [about] * 3) == scores


def test_each_prompts_text_is_read_once(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    extend = KVCache.extend
    monkeypatch.setattr(KVCache, "extend", lambda cache, new: (rows.append(len(new)), extend(cache, new))[1])
    shapes.score_each(latents, asked)
    assert rows == [6, 6, 6, 4, 6]  # images, descriptions, questions; the texts of four prompts, their images


def test_an_early_score_is_a_part_of_the_score(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = shapes.score_each(latents, asked)
    images = []
    expand = KVCache.expand
    monkeypatch.setattr(KVCache, "expand", lambda *args: (images.append(1), expand(*args)))
    early = shapes.score_early(latents, asked)
    assert not images  # the conversations that drew the images are not read
    names = [field.name for field in dataclasses.fields(EarlyScore)]
    assert [one.judgement() for one in early] == [{n: getattr(score, n) for n in names} for score in scores]
    assert list(early[0].judgement()) == names
    assert len(repr(early[0])) < 100


def test_judgement_keeps_its_order(shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]) -> None:
    (score,) = shapes.score_each(latents[:1], asked[:1])
    assert list(score.judgement()) == [
        *("answer", "yes_logit", "yes_conf_score", "no_logit", "no_conf_score", "score", "response_conf_score"),
        *("prompt_loss", "prompt_conf_score", "image_conf_score", "question", "reply"),
    ]


def test_answers_of_one_token(shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]) -> None:
    scores = shapes.score_each(latents, asked, max_new_tokens=1)
    same(scores, one_by_one(shapes, latents, asked, most=1))
    assert {score.reply for score in scores} >= {"Yes", "No"}


def test_a_long_prompt_limits_only_its_own_answer(shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]) -> None:
    long = with_room(shapes, 1)
    crowd = [asked[0], Asked(long, "x", asked[0].reply), asked[1]]
    scores = shapes.score_each(latents[:3], crowd)
    same(scores, one_by_one(shapes, latents[:3], crowd))
    assert [len(shapes.tokenizer.plain(score.reply)) for score in scores] == [2, 1, 2]


def test_a_prompt_that_is_too_long_is_named(shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]) -> None:
    long = with_room(shapes, 0)
    crowd = [asked[0], Asked(long, "x", asked[0].reply)]
    for score in (shapes.score_each, shapes.score_early):
        with pytest.raises(InputError, match=rf"^prompt '{long[:50]}.*': the question is .* tokens long") as caught:
            score(latents[:2], crowd)
        assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="the question is"):
        shapes.check_question(long)


def with_room(model: ScaleRAE, tokens: int) -> str:
    """A prompt whose question leaves room for an answer of `tokens` tokens."""
    question, _ = texts_of(model.config, model.tokenizer, "star", QUESTION)
    more = model.config.max_length - model.config.tokens + 1 - len(question) - tokens
    assert len(model.tokenizer.plain("star" + " star" * more)) == len(model.tokenizer.plain("star")) + more
    return "star" + " star" * more


def test_answers_that_end_at_once_leave_the_others_theirs(
    shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shapes.score_each(latents, asked)
    monkeypatch.setattr(KVCache, "choose", ending(shapes.tokenizer.chat_end, rows=[1, 4], choose=KVCache.choose))
    scores = shapes.score_each(latents, asked)
    for i, (score, one) in enumerate(zip(scores, expected, strict=True)):
        if i in (1, 4):
            assert (score.reply, score.answer, score.response_conf_score) == ("", "uncertain", 0.0)
            assert (score.prompt_loss, score.image_conf_score) == (one.prompt_loss, one.image_conf_score)
        else:
            assert score == one


def ending(end: int, rows: list[int], choose: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., object]:
    """`KVCache.choose`, with `end` as the token that each of `rows` chooses."""

    def chosen(cache: KVCache, hidden: Tensor) -> tuple[Tensor, Tensor]:
        token, record = choose(cache, hidden)
        token[rows], record[0, rows] = end, float(end)
        return token, record

    return chosen


def test_every_latent_needs_its_prompt(shapes: ScaleRAE, latents: list[Tensor], asked: list[Asked]) -> None:
    for score in (shapes.score_each, shapes.score_early):
        with pytest.raises(InputError, match="3 latents, but 2 of `asked`: give one each"):
            score(latents[:3], asked[:2])
        with pytest.raises(InputError, match="the prompt is empty"):
            score(latents[:1], [Asked("", "a cat", Reply([65]))])
        with pytest.raises(InputError, match="a latent must be a tensor"):
            score([[1.0]], asked[:1])
        assert score([], []) == []
