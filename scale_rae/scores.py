"""What the model thinks of a latent against a prompt (REFERENCE §10), up to the judgement that metadata.jsonl stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_rae.config import ScaleRAEConfig
from scale_rae.errors import InputError, shorten
from scale_rae.language import LanguageModel, Reply
from scale_rae.prompt import DESCRIBE, IMAGE, ChatTokenizer, ask_question


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

    def judgement(self) -> dict[str, Any]:
        """The image's entry in text_responses; its `score` is yes_conf_score, or -no_conf_score, or 0 if uncertain."""
        values = dataclasses.asdict(self)
        signed = {"yes": self.yes_conf_score, "no": -self.no_conf_score}.get(self.answer, 0.0)
        first = ("answer", "yes_logit", "yes_conf_score", "no_logit", "no_conf_score")
        return {name: values.pop(name) for name in first} | {"score": signed} | values

    def __repr__(self) -> str:
        numbers = f"yes {self.yes_logit:.3f}, no {self.no_logit:.3f}, prompt loss {self.prompt_loss:.3f}"
        return f"Score({self.answer}, {numbers}, {shorten(self.reply)!r})"


def answer_tokens(tokenizer: ChatTokenizer, word: str) -> set[int]:
    """The ids of tokens that are `word` alone: in three capitalisations, with and without a space before it."""
    spellings = (word.lower(), word.capitalize(), word.upper())
    encoded = [tokenizer.plain(space + spelling) for spelling in spellings for space in ("", " ")]
    return {ids[0] for ids in encoded if len(ids) == 1}


def texts_of(
    config: ScaleRAEConfig, tokenizer: ChatTokenizer, prompt: str, question_template: str
) -> tuple[list[int], list[int]]:
    """Token ids of the two texts that are read about a latent: the question, and the prompt as the image's description.

    Each holds the image once.

    Raises:
        InputError: when a text is longer than the model reads.
    """
    question = tokenizer.chat(ask_question(question_template, prompt), image=True)
    described = [*tokenizer.chat(DESCRIBE, image=True), *tokenizer.plain(prompt)]
    for what, ids in (("the question", question), ("the prompt as a description", described)):
        length = len(ids) + config.tokens - 1
        if length >= config.max_length:
            raise InputError(
                f"{what} is {length} tokens long with its image; the model reads at most {config.max_length} "
                "(tokenizer_model_max_length); shorten it"
            )
    return question, described


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
    """One score per latent [L, C] against `prompt`.

    `request` is the message that asked for the image, `request_reply` the model's reply to it. `question_template` holds
    `{prompt}`; the answer has at most `max_new_tokens` tokens.

    Raises:
        InputError: when the question or the prompt is longer than the model reads.
    """
    question = ask_question(question_template, prompt)
    asked, described = texts_of(language.config, tokenizer, prompt, question_template)
    prompt_ids = tokenizer.plain(prompt)
    seen = asked.index(IMAGE) + 1  # both texts begin alike up to the image, so this part is read once
    assert asked[:seen] == described[:seen]
    images = language.project(latents)  # [N, L, H]
    longest = language.config.max_length - (len(asked) + language.config.tokens - 1)  # answer, in tokens
    limit = min(max_new_tokens, longest)
    count, slots = len(latents), language.config.tokens + max(len(asked) + limit, len(described))
    with language.cache(count, slots) as cache:
        before = language.tokens(asked[: seen - 1]).expand(count, -1, -1)
        cache.extend(torch.cat([before, images], dim=1))
        lengths = list(cache.lengths)
        hidden = cache.extend(language.tokens(described[seen:]).expand(count, -1, -1))
        prompt_scores = _prompt_scores(language, hidden, prompt_ids)
        cache.rewind(lengths)
        rest = language.tokens(asked[seen:]).expand(count, -1, -1)
        limits = [limit] * count
        answers = language.reply_in(cache, rest, limits, tokenizer.chat_end, tokenizer.image_start, draw=False)
    image_scores = _image_scores(language, tokenizer, images, request, request_reply)
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


def _prompt_scores(language: LanguageModel, hidden: Tensor, prompt_ids: list[int]) -> list[tuple[float, float]]:
    """(prompt loss, confidence) per row of hidden states [B, T, H]; each row ends with the prompt's tokens.

    The loss is the mean over the prompt's tokens from the second on, the confidence the mean over all of them.
    """
    at_prompt = hidden[:, -len(prompt_ids) :]
    targets = [*prompt_ids[1:], 0] * len(hidden)  # the last column's loss is left out below
    confidence, loss = language.confidence_and_loss(at_prompt.flatten(0, 1), targets)
    assert loss is not None
    shape = at_prompt.shape[:2]
    means = confidence.view(shape).mean(dim=1).tolist()
    if len(prompt_ids) < 2:
        return [(0.0, mean) for mean in means]
    losses = loss.view(shape)[:, :-1].mean(dim=1).tolist()
    return list(zip(losses, means, strict=True))


def _image_scores(
    language: LanguageModel, tokenizer: ChatTokenizer, images: Tensor, request: str, request_reply: Reply
) -> list[float]:
    """Mean confidence at each projected latent [N, L, H] in the conversation that drew it; the text is read once."""
    drawn = tokenizer.chat(request)
    ids = [*drawn, *tokenizer.plain(tokenizer.decode(request_reply.ids)), *tokenizer.image()]
    seen, count = ids.index(IMAGE), len(images)
    ending = [images]
    if after := ids[seen + 1 :]:
        ending.append(language.tokens(after).expand(count, -1, -1))
    with language.cache(1, seen) as text, language.cache(count, len(ids) + images.shape[1]) as cache:
        beginning = text.extend(language.tokens(ids[:seen])[None])  # [1, T, H]
        cache.expand(text)
        hidden = torch.cat([beginning.expand(count, -1, -1), cache.extend(torch.cat(ending, dim=1))], dim=1)
    at_image = hidden[:, len(drawn) + len(request_reply.ids) : -1]
    confidence, _ = language.confidence_and_loss(at_image.flatten(0, 1))
    return confidence.view(at_image.shape[:2]).mean(dim=1).tolist()  # type: ignore[no-any-return]


def _first_of(reply: Reply, tokens: set[int]) -> int | None:
    return next((i for i, token in enumerate(reply.ids) if token in tokens), None)
