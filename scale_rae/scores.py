"""What the model thinks of a latent against a prompt (REFERENCE §10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_rae.language import Conversation, LanguageModel, Reply
from scale_rae.prompt import ChatTokenizer

QUESTION = "Does this image align with the prompt: {prompt}?"
DESCRIBE = "Describe this image."


@dataclass(frozen=True)
class Score:
    """One latent's scores; logits and confidences are 0 where the reply had no such token.

    Confidences are self-certainty in nats: mean over the vocabulary of -log(V p); higher is more certain.
    `prompt_loss` is a mean cross-entropy in nats a token; lower is a better match.
    """

    answer: str  # yes, no or uncertain
    yes_logit: float
    yes_conf_score: float
    no_logit: float
    no_conf_score: float
    response_conf_score: float
    prompt_loss: float
    prompt_conf_score: float
    image_conf_score: float
    question: str
    reply: str


def ask_question(template: str, prompt: str) -> str:
    """The question about a prompt: `{prompt}` in the template replaced, or the prompt appended when it has none."""
    if "{prompt}" in template:
        return template.replace("{prompt}", prompt)
    return f"{template.rstrip()} {prompt}"


def answer_tokens(tokenizer: ChatTokenizer, word: str) -> set[int]:
    """Ids that say `word` alone: its three capitalisations, with and without a space before."""
    spellings = (word.lower(), word.capitalize(), word.upper())
    encoded = [tokenizer.plain(space + spelling) for spelling in spellings for space in ("", " ")]
    return {ids[0] for ids in encoded if len(ids) == 1}


@torch.inference_mode()
def score_latents(
    language: LanguageModel,
    tokenizer: ChatTokenizer,
    latents: Sequence[Tensor],
    prompt: str,
    request: str,
    request_reply: Reply,
    question_template: str,
    max_new_tokens: int,
) -> list[Score]:
    """Scores of latents [L, C] against `prompt`.

    `request` is the message that asked for the drawing and `request_reply` the model's reply to it.
    """
    question = ask_question(question_template, prompt)
    asked = tokenizer.chat(question, image=True)
    answers = language.reply(
        [Conversation(asked, latent) for latent in latents],
        [max_new_tokens] * len(latents),
        tokenizer.chat_end,
        tokenizer.image_start,
    )
    prompt_ids = tokenizer.plain(prompt)
    described = [*tokenizer.chat(DESCRIBE, image=True), *prompt_ids]
    prompt_scores = [
        _prompt_scores(language, hidden, prompt_ids)
        for hidden in language.read([Conversation(described, latent) for latent in latents])
    ]
    drawn = tokenizer.chat(request)
    drawn_ids = [*drawn, *tokenizer.plain(tokenizer.decode(request_reply.ids)), *tokenizer.image()]
    first = len(drawn) + len(request_reply.ids)
    image_scores = [
        float(language.confidence_and_loss(hidden[first:-1])[0].mean())
        for hidden in language.read([Conversation(drawn_ids, latent) for latent in latents])
    ]
    yes, no = answer_tokens(tokenizer, "yes"), answer_tokens(tokenizer, "no")
    scores = []
    for reply, (prompt_loss, prompt_conf), image_conf in zip(answers, prompt_scores, image_scores, strict=True):
        yes_at, no_at = _first_of(reply, yes), _first_of(reply, no)
        scores.append(
            Score(
                answer="yes" if yes_at is not None else "no" if no_at is not None else "uncertain",
                yes_logit=reply.logits[yes_at] if yes_at is not None else 0.0,
                yes_conf_score=reply.confidences[yes_at] if yes_at is not None else 0.0,
                no_logit=reply.logits[no_at] if no_at is not None else 0.0,
                no_conf_score=reply.confidences[no_at] if no_at is not None else 0.0,
                response_conf_score=sum(reply.confidences) / len(reply.confidences) if reply.confidences else 0.0,
                prompt_loss=prompt_loss,
                prompt_conf_score=prompt_conf,
                image_conf_score=image_conf,
                question=question,
                reply=tokenizer.decode(reply.ids),
            )
        )
    return scores


def _prompt_scores(language: LanguageModel, hidden: Tensor, prompt_ids: list[int]) -> tuple[float, float]:
    """Mean loss of the prompt's tokens from the second on, and mean confidence at all of them."""
    at_prompt = hidden[-len(prompt_ids) :]
    confidence, _ = language.confidence_and_loss(at_prompt)
    if len(prompt_ids) < 2:
        return 0.0, float(confidence.mean())
    _, loss = language.confidence_and_loss(at_prompt[:-1], prompt_ids[1:])
    assert loss is not None
    return float(loss.mean()), float(confidence.mean())


def _first_of(reply: Reply, tokens: set[int]) -> int | None:
    return next((i for i, token in enumerate(reply.ids) if token in tokens), None)
