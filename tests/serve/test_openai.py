"""The `openai` package as it is, against a server on this machine."""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.noise import image_seed
from scale_rae.pipeline import ScaleRAE
from tests.serve.conftest import CIRCLE, HANGS, Running, alone, data_url, openai, picture, serving

PROMPTS = (
    CIRCLE,
    "Can you generate a photo of a blue cross and a pink square?",
    "Can you generate a photo of two green triangles?",
)


def look(text: str, *urls: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def test_the_model_is_listed_and_no_other_is_found(running: Running) -> None:
    client = running.client()
    assert [m.id for m in client.models.list()] == ["shapes"]
    assert client.models.retrieve("shapes").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_images_are_those_of_t2i(running: Running, shapes: ScaleRAE) -> None:
    answer = running.client().images.generate(
        model="shapes",
        prompt=CIRCLE,
        n=2,
        size="128x128",
        response_format="b64_json",
        extra_body={"seed": 7, "steps": 6, "guidance": 2.0, "solver": "heun", "guidance_interval": [0.1, 0.9]},
    )
    assert answer.data is not None
    seeds = [getattr(image, "seed") for image in answer.data]  # noqa: B009
    assert seeds == [7, image_seed(7, 0, 1)]
    options = {"steps": 6, "guidance": 2.0, "solver": "heun", "guidance_interval": (0.1, 0.9)}
    for image, seed in zip(answer.data, seeds, strict=True):
        assert np.array_equal(picture(image.b64_json or ""), alone(shapes, CIRCLE, seed, **options))
    with Image.open(io.BytesIO(b64decode(answer.data[1].b64_json or ""))) as png:
        assert png.info["image_seed"] == str(seeds[1])


def test_a_description_becomes_a_request(running: Running, shapes: ScaleRAE) -> None:
    answer = running.client().images.generate(prompt="a photo of a red circle", extra_body={"seed": 1, "steps": 4})
    assert answer.data is not None
    assert np.array_equal(
        picture(answer.data[0].b64_json or ""), alone(shapes, "Can you generate a photo of a red circle", 1, steps=4)
    )


def test_what_the_model_does_not_draw_is_answered_by_what_it_draws(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="draws one to four shapes") as caught:
        running.client().images.generate(prompt="Hello")
    assert caught.value.code == "no_image"
    assert "Hello" not in str(caught.value)


def test_without_a_seed_every_drawing_is_another(running: Running) -> None:
    answers = [running.client().images.generate(prompt=CIRCLE, extra_body={"steps": 2}).data for _ in range(2)]
    seeds = {image.seed for data in answers for image in data or ()}
    assert len(seeds) == 2


@pytest.mark.parametrize("reward", ["answer", "siglip", None])
def test_best_of_returns_the_best_by_the_reward(running: Running, shapes: ScaleRAE, reward: str | None) -> None:
    body = {"seed": 5, "steps": 6, "best_of": 4} | ({"reward": reward} if reward else {})
    answer = running.client().images.generate(prompt=CIRCLE, n=2, extra_body=body)
    data: list[Any] = list(answer.data or ())
    assert [d.reward for d in data] == [reward or "siglip"] * 2
    assert data[0].score >= data[1].score or data[0].answer != data[1].answer
    if reward == "siglip":
        drawn = shapes.generate(CIRCLE, num_images=4, seed=5, steps=6, batch_size=1).images
        scores = running.engine.rewards["siglip"].score([d.image for d in drawn if d.image], CIRCLE)
        best = sorted(range(4), key=lambda i: -scores[i])[:2]
        assert [d.seed for d in data] == [drawn[i].seed for i in best]
        assert [d.score for d in data] == pytest.approx([scores[i] for i in best])


def test_chat_looks(running: Running, shapes: ScaleRAE) -> None:
    image = shapes.generate(CIRCLE, seed=3, guidance=3.0).images[0].image
    assert image is not None
    expected = shapes.answer("Describe this image.", images=image)[0].text
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        url = data_url(image, format)
        answer = running.client().chat.completions.create(model="shapes", messages=look("Describe this image.", url))
        choice = answer.choices[0]
        if format == "PNG":
            assert choice.message.content == expected
            assert choice.finish_reason == "stop"
            assert answer.usage is not None
            assert answer.usage.prompt_tokens > shapes.config.tokens
        assert "circle" in (choice.message.content or "")


def test_chat_draws(running: Running, shapes: ScaleRAE) -> None:
    answer: Any = running.client().chat.completions.create(
        model="shapes",
        messages=[{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": CIRCLE}],
        n=2,
        seed=9,
        temperature=0.7,
        extra_body={"steps": 4},
    )
    expected = shapes.generate(CIRCLE, num_images=2, seed=9, steps=4, batch_size=1)
    for choice, drawn in zip(answer.choices, expected.images, strict=True):
        assert choice.message.content == expected.text
        (part,) = choice.message.images
        pixels = picture(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(pixels, np.asarray(drawn.image))


def test_chat_without_image_modality_draws_nothing(running: Running) -> None:
    before = running.metric("scale_rae_images_total")
    answer: Any = running.client().chat.completions.create(
        model="shapes", messages=[{"role": "user", "content": CIRCLE}], modalities=["text"]
    )
    assert answer.choices[0].message.content
    assert not hasattr(answer.choices[0].message, "images")
    assert running.metric("scale_rae_images_total") == before


def test_chat_history_reaches_the_model(running: Running, shapes: ScaleRAE) -> None:
    drawn = shapes.generate(CIRCLE, seed=3, guidance=3.0)
    assert drawn.images[0].image is not None
    part = {"type": "image_url", "image_url": {"url": data_url(drawn.images[0].image)}}
    history: list[Any] = [
        {"role": "user", "content": CIRCLE},
        {"role": "assistant", "content": drawn.text, "images": [part]},
        {"role": "user", "content": "Describe this image."},
    ]
    client = running.client()
    answer = client.chat.completions.create(model="shapes", messages=history)
    assert answer.usage is not None
    tokenizer, latent = shapes.tokenizer, shapes.encode([drawn.images[0].image])[0]
    short = tokenizer.chat("Describe this image.")
    assert answer.usage.prompt_tokens > len(short) + shapes.config.tokens
    from scale_rae.language import Conversation
    from scale_rae.prompt import Turn

    turns = [Turn("user", CIRCLE), Turn("assistant", drawn.text, 1), Turn("user", "Describe this image.")]
    ids = tokenizer.conversation(turns)
    (reply,) = shapes.converse([Conversation(ids, latents=[latent])], [64])
    assert answer.choices[0].message.content == tokenizer.decode(reply.ids)


def test_chat_stops_at_max_tokens(running: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = running.client().chat.completions.create(
            model="shapes", messages=[{"role": "user", "content": CIRCLE}], extra_body={name: 2}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


def test_stream_is_the_answer_bit_by_bit(running: Running) -> None:
    client = running.client()
    messages: list[Any] = [{"role": "user", "content": CIRCLE}]
    options: dict[str, Any] = {"model": "shapes", "messages": messages, "seed": 2, "extra_body": {"steps": 4}}
    whole: Any = client.chat.completions.create(**options)
    chunks: list[Any] = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(texts) > 3
    assert "".join(texts) == whole.choices[0].message.content
    pictures = [c.choices[0].delta.images for c in chunks if c.choices and hasattr(c.choices[0].delta, "images")]
    assert pictures == [whole.choices[0].message.images]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_what_waits_together_is_drawn_together_and_comes_out_as_alone(
    shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    try:
        with serving(shapes) as running:
            assert running.engine.summary().startswith("cpu, 2 threads")
            assert running.engine.batch_size == 4, "this CPU's sums depend on the batch"
            _hold(shapes, running, monkeypatch)
            texts, drawings = asyncio.run(_crowd(running))
            assert running.metric("scale_rae_batch_size_sum", stage="draw") == 16
            # One image by itself; half of what waits for two threads, up to 4: 4, 2, 1 of 7 images and 4, 2, 1, 1 of 8.
            assert running.metric("scale_rae_batch_size_count", stage="draw") == 8
    finally:
        torch.set_num_threads(1)
    monkeypatch.undo()
    for i, b64 in drawings.items():
        options: dict[str, Any] = {"steps": 2, "guidance": 1.0 + i % 2}
        assert np.array_equal(picture(b64), alone(shapes, PROMPTS[i % 3], i, **options)), i
    assert set(texts) == {shapes.generate(PROMPTS[1], decode=False, steps=2).text}


def _hold(shapes: ScaleRAE, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the replies until all requests are there, and the first drawing until the other thread has given all replies."""
    converse, sample, drawings = shapes.converse, shapes.sample, itertools.count(1)
    all_here, second = threading.Event(), threading.Event()

    def held_reply(*arguments: Any) -> Any:
        if not all_here.is_set():
            running.wait_for(lambda: running.engine.jobs == 20)
            all_here.set()
        return converse(*arguments)

    def held_drawing(*arguments: Any) -> Any:
        if next(drawings) == 1:
            assert second.wait(HANGS)
        second.set()
        return sample(*arguments)

    monkeypatch.setattr(shapes, "converse", held_reply)
    monkeypatch.setattr(shapes, "sample", held_drawing)


async def _crowd(running: Running) -> tuple[list[str], dict[int, str]]:
    """16 images of three prompts at two guidances, and 4 answers, all at once."""
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client:

        async def draw(i: int) -> tuple[int, str]:
            body = {"seed": i, "steps": 2, "guidance": 1.0 + i % 2}
            answer = await client.images.generate(prompt=PROMPTS[i % 3], extra_body=body)
            assert answer.data is not None
            return i, answer.data[0].b64_json or ""

        async def ask() -> str:
            answer = await client.chat.completions.create(
                model="shapes", messages=[{"role": "user", "content": PROMPTS[1]}], extra_body={"modalities": ["text"]}
            )
            return answer.choices[0].message.content or ""

        drawings, texts = await asyncio.gather(
            asyncio.gather(*(draw(i) for i in range(16))), asyncio.gather(*(ask() for _ in range(4)))
        )
    return list(texts), dict(drawings)


# What OpenAI's clients send besides -----------------------------------------------------------------------------------


def test_null_is_absent(running: Running, shapes: ScaleRAE) -> None:
    client = running.client()
    optional = ("background", "model", "n", "output_format", "quality", "response_format", "size", "style", "stream")
    body: dict[str, Any] = {"seed": 7, "steps": 2, "guidance": None, "solver": None, "guidance_interval": None}
    answer: Any = client.images.generate(prompt=CIRCLE, extra_body=body | dict.fromkeys(optional))
    assert np.array_equal(picture(answer.data[0].b64_json), alone(shapes, CIRCLE, 7, steps=2))
    optional = (
        "n", "seed", "stream", "stop", "tools", "tool_choice", "top_logprobs", "logit_bias", "metadata", "service_tier",
        "modalities", "response_format", "temperature", "web_search_options", "audio", "prediction",
    )  # fmt: skip
    message: Any = {"role": "user", "content": CIRCLE, "name": None}
    options: dict[str, Any] = dict.fromkeys(optional) | {"max_tokens": 3, "stream_options": {"include_usage": None}}
    answer = client.chat.completions.create(model="shapes", messages=[message], extra_body=options)
    assert answer.choices[0].message.content


def test_values_that_promise_nothing(running: Running) -> None:
    options: dict[str, Any] = {
        "tool_choice": "none",
        "tools": [],
        "functions": [],
        "function_call": "none",
        "parallel_tool_calls": False,
        "logit_bias": {},
        "top_logprobs": 0,
        "logprobs": False,
        "metadata": {"team": "blue"},
        "service_tier": "auto",
        "store": False,
        "stop": [],
        "reasoning_effort": "none",
        "verbosity": "medium",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "user": "u",
        "max_tokens": 2,
    }
    messages: Any = [{"role": "user", "content": "hi"}]
    assert running.client().chat.completions.create(model="shapes", messages=messages, extra_body=options).choices


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("logit_bias", {"50256": -100}),
        ("top_logprobs", 3),
        ("logprobs", True),
        ("service_tier", "priority"),
        ("reasoning_effort", "high"),
        ("verbosity", "high"),
        ("store", True),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(running: Running, field: str, value: Any) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError) as caught:
        running.client().chat.completions.create(model="shapes", messages=messages, extra_body={field: value})
    assert str(caught.value.param).startswith(field)
    assert "validation" not in str(caught.value)
    assert "less than" not in str(caught.value)


@pytest.mark.parametrize("how", ["create", "parse", "stream"])
def test_messages_that_the_package_returned_can_be_sent_back(running: Running, how: str) -> None:
    completions: Any = running.client().chat.completions
    asked: list[Any] = [{"role": "user", "content": CIRCLE}]
    options: dict[str, Any] = {"model": "shapes", "seed": 3, "extra_body": {"steps": 2}}
    if how == "stream":
        with completions.stream(messages=asked, **options) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = getattr(completions, how)(messages=asked, **options).choices[0].message
    assert message.content
    assert message.images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    again: Any = {"role": "user", "content": "Describe this image."}
    options["extra_body"] = {"modalities": ["text"]}
    expected = completions.create(messages=[*asked, message, again], **options)
    # All of its fields, null ones too, as other programs store them; and what other servers' messages have besides.
    stored = message.model_dump() | {"tool_calls": [], "reasoning_content": "", "refusal": None, "parsed": None}
    answer = completions.create(messages=[*asked, stored, again], **options)
    assert answer.usage == expected.usage
    assert answer.choices[0].message.content == expected.choices[0].message.content
    nothing = {"role": "assistant", "content": "Sure.", "images": None, "tool_calls": [], "reasoning_content": ""}
    assert completions.create(messages=[*asked, nothing, again], **options).choices


def test_a_picture_alone_is_a_message(running: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (128, 128), "white")), "detail": None}}
    completions: Any = running.client().chat.completions
    asked = {"model": "shapes", "modalities": ["text"], "max_tokens": 8}
    used = []
    for content in ([part], [{"type": "text", "text": ""}, part], [part, part]):
        answer = completions.create(messages=[{"role": "user", "content": content}], **asked)
        assert answer.choices[0].message.content
        used.append(answer.usage.prompt_tokens)
    assert used[0] == used[1] < used[2]


def test_an_answer_without_the_image_modality_ends_where_it_would_draw(running: Running, shapes: ScaleRAE) -> None:
    drawn = shapes.generate(CIRCLE, seed=1, steps=2, decode=False)
    answer = running.client().chat.completions.create(
        model="shapes", messages=[{"role": "user", "content": CIRCLE}], modalities=["text"]
    )
    assert answer.choices[0].message.content == drawn.text
    assert answer.choices[0].finish_reason == "stop"


def test_a_question_about_an_image_is_not_answered_by_drawing(running: Running) -> None:
    """The bundled model draws a bare prompt, which here is no request, since a picture is shown; an explicit wish still draws."""
    image = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (64, 64), "white"))}}

    def ask(text: str, **more: Any) -> Any:
        content = [{"type": "text", "text": text}, image]
        body: Any = {
            "model": "shapes",
            "messages": [{"role": "user", "content": content}],
            "extra_body": {"steps": 2} | more,
        }
        return running.client().chat.completions.create(**body).choices[0].message

    question = "a photo of a blue star"
    assert getattr(ask(question, modalities=["text", "image"]), "images", None), "the model answers this one in words"
    assert not getattr(ask(question), "images", None)
    assert getattr(ask("Can you generate a photo of a red circle?"), "images", None)
