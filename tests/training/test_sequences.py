"""The sequence that is trained on is the one that inference reads, and the right tokens are learnt."""

from __future__ import annotations

import torch

from scale_rae.language import Conversation
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import IMAGE
from scale_rae.training.batches import embed
from scale_rae.training.prepare import forced_conditions
from scale_rae.training.sequences import QUERIES, Message, TokenSequence, tokenized

DRAW = "Can you generate a photo of a cat on a windowsill?"


def test_a_drawing_goes_on_where_the_chat_ends(models: dict[str, ScaleRAE]) -> None:
    tokenizer = models["siglip"].tokenizer
    sequence = tokenized(tokenizer, [Message("user", DRAW), Message("assistant", "Here you go:\n<image>")])
    chat, reply = tokenizer.chat(DRAW), tokenizer.plain("Here you go:\n")
    end = [tokenizer.image_start, QUERIES, tokenizer.image_end, tokenizer.chat_end]
    assert list(sequence.ids) == [*chat, *reply, *end]
    header = len(tokenizer.plain("assistant\n"))
    learnt = [i for i, flag in zip(sequence.ids, sequence.learnt, strict=True) if flag]
    assert learnt[-len(reply) - 3 :] == [*reply, tokenizer.image_start, tokenizer.image_end, tokenizer.chat_end]
    newline = tokenizer.plain("\n")[0]
    before = sequence.ids[: len(chat) - header - 1]
    controls = (newline, tokenizer.chat_start, tokenizer.chat_end)
    assert [flag for flag, _ in zip(sequence.learnt, before, strict=False)] == [i in controls for i in before]
    assert all(sequence.learnt[len(before) : len(chat)])
    tokens = models["siglip"].config.tokens
    assert sequence.length(tokens) == len(chat) + len(reply) + 3 + tokens


def test_only_replies_are_learnt_if_so_chosen(models: dict[str, ScaleRAE]) -> None:
    tokenizer = models["siglip"].tokenizer
    turns = [Message("user", "<image>\nWhat is it?"), Message("assistant", "A cat.\nTwo.")]
    sequence = tokenized(tokenizer, turns, "replies")
    learnt = [i for i, flag in zip(sequence.ids, sequence.learnt, strict=True) if flag]
    assert learnt == [*tokenizer.plain("A cat.\nTwo."), tokenizer.chat_end]
    assert sequence.learnt_tokens == len(learnt)
    assert (
        list(sequence.ids[: sequence.ids.index(IMAGE) + 1])
        == tokenizer.chat("What is it?", image=True)[: sequence.ids.index(IMAGE) + 1]
    )
    assert list(sequence.ids[: -len(learnt)]) == tokenizer.chat("What is it?", image=True)


@torch.no_grad()
def test_conditions_are_those_of_inference(models: dict[str, ScaleRAE]) -> None:
    model = models["siglip"]
    reply = model.reply([DRAW])[0]
    assert reply.condition is not None
    shown = torch.randn(model.config.tokens, model.config.channels, generator=torch.Generator().manual_seed(0))
    said = (*model.tokenizer.chat(DRAW), *reply.ids, QUERIES)
    (own,) = forced_conditions(model.language, [TokenSequence(said, (False,) * len(said))], [])
    torch.testing.assert_close(own, reply.condition, rtol=1e-4, atol=1e-5)
    text = "Here you go:\n"
    sequences = [
        tokenized(model.tokenizer, [Message("user", "<image>\n" + DRAW), Message("assistant", text + "<image>")]),
        tokenized(model.tokenizer, [Message("user", DRAW), Message("assistant", text + "<image>")]),
    ]
    ids = list(sequences[0].ids[: sequences[0].ids.index(QUERIES)])
    (before,) = model.language.embed([Conversation(ids, shown)])
    embedded = embed(model.language, sequences, [shown])
    torch.testing.assert_close(embedded.embeds[0, : len(before)], before)
    # The logits at a learnt place predict the token that follows it.
    rows, places = embedded.learnt
    first = [int(target) for row, target in zip(rows, embedded.targets, strict=True) if row == 1]
    assert first == [i for i, flag in list(zip(sequences[1].ids, sequences[1].learnt, strict=True))[1:] if flag]
    assert (places >= 0).all()


def test_checkpoints_of_earlier_trainings_know_the_sequences() -> None:
    assert repr(TokenSequence((1, 2), (True, False))) == "Layout(ids=(1, 2), learnt=(True, False))"
