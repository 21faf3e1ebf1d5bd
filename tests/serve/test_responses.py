"""OpenAI's newer interface, with the `openai` package as it is."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from scale_rae.pipeline import ScaleRAE
from tests.serve.conftest import CIRCLE, Running, alone, openai, picture

STEPS: dict[str, Any] = {"extra_body": {"steps": 4, "seed": 7}}


def test_it_draws_answers_and_goes_on(running: Running, shapes: ScaleRAE) -> None:
    client = running.client()
    drawn = client.responses.create(model="shapes", input=CIRCLE, tools=[{"type": "image_generation"}], **STEPS)
    assert drawn.status == "completed"
    assert drawn.output_text == "Sure, here it is:"
    words, image = drawn.output
    assert (words.type, image.type) == ("message", "image_generation_call")
    assert np.array_equal(picture(image.result), alone(shapes, CIRCLE, 7, steps=4))
    assert drawn.usage is not None
    assert drawn.usage.total_tokens == drawn.usage.input_tokens + drawn.usage.output_tokens

    # The answer's items are put before the next question, as clients do.
    asked: list[Any] = [{"role": "user", "content": CIRCLE}, *[item.to_dict() for item in drawn.output]]
    asked.append({"role": "user", "content": "Describe this image."})
    described = client.responses.create(model="shapes", input=asked)
    chat = client.chat.completions.create(
        model="shapes",
        messages=[
            {"role": "user", "content": CIRCLE},
            {
                "role": "assistant",
                "content": "Sure, here it is:",
                "images": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image.result}"}}],
            },
            {"role": "user", "content": "Describe this image."},
        ],
    )
    assert described.output_text == chat.choices[0].message.content


def test_an_image_that_is_sent(running: Running) -> None:
    image = running.client().images.generate(prompt=CIRCLE, extra_body={"seed": 7, "steps": 8}).data[0].b64_json
    parts: list[Any] = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{image}"},
        {"type": "input_text", "text": "Describe this image."},
    ]
    answer = running.client().responses.create(model="shapes", input=[{"role": "user", "content": parts}])
    assert answer.output_text == "a photo of a red circle."


def test_streamed_it_is_the_same(running: Running) -> None:
    client = running.client()
    plain = client.responses.create(model="shapes", input=CIRCLE, **STEPS)
    with client.responses.stream(model="shapes", input=CIRCLE, **STEPS) as stream:
        events = list(stream)
        whole = stream.get_final_response()
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == plain.output_text
    assert whole.output_text == plain.output_text
    assert whole.output[1].result == plain.output[1].result
    assert base64.b64decode(whole.output[1].result)[:4] == b"\x89PNG"


def test_without_the_tool_nothing_is_drawn(running: Running) -> None:
    for more in ({"tools": []}, {"tool_choice": "none"}):
        answer = running.client().responses.create(model="shapes", input=CIRCLE, **more, **STEPS)
        assert [item.type for item in answer.output] == ["message"]


def test_cut_off_and_refused(running: Running) -> None:
    client = running.client()
    short = client.responses.create(model="shapes", input="Hello", max_output_tokens=1)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="shapes", input="Hello", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="input: the last one must be a user's"):
        client.responses.create(model="shapes", input=[{"role": "assistant", "content": "Hello"}])
