"""What a listener hears of replies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scale_rae.language import Conversation
from scale_rae.pipeline import ScaleRAE


def test_a_token_is_heard_once_also_when_memory_runs_out(
    models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["siglip"]
    reply = model.language.reply

    def runs_out(conversations: Any, *rest: Any, **options: Any) -> Any:
        replies = reply(conversations, *rest, **options)
        if len(conversations) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return replies

    monkeypatch.setattr(model.language, "reply", runs_out)
    heard: dict[int, list[int]] = {0: [], 1: []}

    def listen(row: int, token: int) -> bool:
        heard[row].append(token)
        return True

    asked = [Conversation(model.tokenizer.chat(text)) for text in ("a cat", "a dog, or two")]
    replies = model.converse(asked, [5, 7], listen)
    assert heard == {0: replies[0].ids, 1: replies[1].ids}
    assert all(heard.values())
