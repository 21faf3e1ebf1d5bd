from __future__ import annotations

from pathlib import Path

import pytest

from scale_rae.hub import BUNDLED, Source
from scale_rae.shapes.world import COLORS, SHAPES
from scale_rae.wording import GUIDE, after_no_drawing, asks_to_draw, is_bundled, is_refusal, subject, what_it_can

SHIPPED, OTHER = Source("shapes", BUNDLED["shapes"]), Source("other", Path("/models/other"))


@pytest.mark.parametrize(
    "message",
    [
        "Make it blue",
        "Now make it night.",
        "make the sky green",
        "Draw the same at night",
        "Please draw a cat",
        "Can you generate a photo of a cat?",
        "Could you please change the colour of the car?",
        "can you make it blue?",
        "Turn the cat into a dog",
        "Add a hat",
        "Remove the background.",
        "Show me three stars.",
        "I want a photo of a ring",
        "I'd like a red one",
        "I’d like you to paint it red",
        "Can I see it in blue?",
        "OK, now replace the cat by a dog",
        '"Draw a cat"',
        "Hey, draw a cat",
        "Hi! Can you draw a blue star?",
        "Make the star in this picture blue",
    ],
)
def test_requests_ask_to_draw(message: str) -> None:
    assert asks_to_draw(message)


@pytest.mark.parametrize(
    "message",
    [
        "Is there a blue star?",
        "Can you describe what's in this image?",  # the guide's
        "Describe this image.",
        "Does this image align with the prompt: a photo of a red circle?",
        "What's in this image?",
        "What color is the star?",
        "How many objects are there?",
        "Hello",
        "Can you see a cat?",
        "Could you tell me who made this?",
        "Which of them would you change?",
        "Makeup or paintings?",
        "Please list everything you see.",
        "Tell me how to draw this.",
        "Can I see a star in this picture?",
        "Color of the star?",
        "Place of the star?",
        "Show me where the star is.",
        "Give me a description of this image.",
        "I want to know what colour this is",
        "Generate a caption",
        "Make a list of the objects",
        "What if I asked you the colour?",
        "Could you please generate a short description",
        "Turn this picture into words",
        "Fill in the blank: a photo of a ___ star",
        "I'd like a summary of it",
        "",
    ],
)
def test_questions_do_not_ask_to_draw(message: str) -> None:
    assert not asks_to_draw(message)


def test_what_the_bundled_model_can() -> None:
    said = what_it_can(SHIPPED)
    assert said is not None
    assert all(word in said for word in (*SHAPES, *COLORS))
    assert (Path(__file__).parents[1] / GUIDE).is_file()
    assert GUIDE in said
    assert after_no_drawing(SHIPPED) == said
    assert is_bundled(Source("a path", Path(str(BUNDLED["shapes"]) + "/../shapes")))


def test_of_other_models_nothing_is_claimed() -> None:
    assert what_it_can(OTHER) is None
    assert "shapes" not in after_no_drawing(OTHER)
    assert not is_refusal(OTHER, "I only draw and read pictures of shapes.")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("Can you generate a photo of a red circle?", "a photo of a red circle"),
        ("Can you generate red circles", "red circles"),
        ("Show me a green ring above a red heart.", "a green ring above a red heart"),
        ("Please draw me two stars!", "two stars"),
        ("I want to see a dog", "a dog"),
        ("I'd like a red one", "a red one"),
        ("a photo of a cat.", "a photo of a cat."),  # no request
        ("paint brushes on a table", "paint brushes on a table"),
        ("Can you tell me a story?", "Can you tell me a story?"),
        ("Can you generate ?", "Can you generate ?"),
    ],
)
def test_what_a_message_asks_to_draw(message: str, wanted: str) -> None:
    assert subject(message) == wanted
