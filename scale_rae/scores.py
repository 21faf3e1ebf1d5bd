"""Yes or no, confidences and prompt loss of a latent against a prompt (REFERENCE §10), as metadata.jsonl stores them.

Latents of several prompts are scored in one batch, in which each prompt's texts are tokenized, and the beginning of the
conversation that drew its images is read, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from scale_rae.config import ScaleRAEConfig
from scale_rae.errors import InputError, shorten
from scale_rae.language import LanguageModel, Reply
from scale_rae.prompt import DESCRIBE, IMAGE, ChatTokenizer, ask_question


@dataclass(frozen=True, eq=False)  # compared by identity, since a reply holds a tensor
class Asked:
    """What a latent is scored against. Latents of one prompt share one object, so that its texts are read once."""

    prompt: str
    request: str  # the message that asked for the image
    reply: Reply  # the model's reply to it


@dataclass(frozen=True)
class EarlyScore:
    """The part of a Score that also says something about a half-formed image; the fields are those of Score."""

    answer: str  # yes, no or uncertain
    yes_logit: float
    yes_conf_score: float
    no_logit: float
    no_conf_score: float
    prompt_loss: float
    prompt_conf_score: float

    def judgement(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        return f"EarlyScore({self.answer}, {_numbers(self)})"


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
        return f"Score({self.answer}, {_numbers(self)}, {shorten(self.reply)!r})"


def _numbers(score: Score | EarlyScore) -> str:
    return f"yes {score.yes_logit:.3f}, no {score.no_logit:.3f}, prompt loss {score.prompt_loss:.3f}"


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
        InputError: when the prompt is empty, or a text is longer than the model reads.
    """
    question = tokenizer.chat(ask_question(question_template, prompt), image=True)
    prompt_ids = tokenizer.plain(prompt)
    if not prompt_ids:
        raise InputError("the prompt is empty; say what the image is to show")
    described = [*tokenizer.chat(DESCRIBE, image=True), *prompt_ids]
    for what, ids in (("the question", question), ("the prompt as a description", described)):
        length = len(ids) + config.tokens - 1
        if length >= config.max_length:
            raise InputError(
                f"prompt {shorten(prompt)!r}: {what} is {length} tokens long with its image; the model reads at most "
                f"{config.max_length} (tokenizer_model_max_length); shorten it"
            )
    return question, described


@torch.inference_mode()
def score_latents(
    language: LanguageModel,
    tokenizer: ChatTokenizer,
    latents: Sequence[Tensor],
    asked: Sequence[Asked],
    question_template: str,
    max_new_tokens: int,
) -> list[Score]:
    """One score per latent [L, C], against the prompt of its `asked`.

    `question_template` holds `{prompt}`; the answer has at most `max_new_tokens` tokens.

    Raises:
        InputError: when the question or the prompt is longer than the model reads.
    """
    images = language.project(latents)  # [N, L, H]
    read = _read(language, tokenizer, images, asked, question_template, max_new_tokens)
    image_scores = _image_scores(language, tokenizer, images, asked)
    return [
        Score(
            **early.judgement(),
            response_conf_score=sum(reply.confidences) / len(reply.confidences) if reply.confidences else 0.0,
            image_conf_score=image_conf,
            question=ask_question(question_template, about.prompt),
            reply=tokenizer.decode(reply.ids),
        )
        for (early, reply), image_conf, about in zip(read, image_scores, asked, strict=True)
    ]


@torch.inference_mode()
def score_early(
    language: LanguageModel,
    tokenizer: ChatTokenizer,
    latents: Sequence[Tensor],
    asked: Sequence[Asked],
    question_template: str,
    max_new_tokens: int,
) -> list[EarlyScore]:
    """One early score per latent [L, C]: `score_latents` without the conversations that drew the images.

    It takes about 0.6 of the time.

    Raises:
        InputError: when the question or the prompt is longer than the model reads.
    """
    images = language.project(latents)
    return [early for early, _ in _read(language, tokenizer, images, asked, question_template, max_new_tokens)]


def _read(
    language: LanguageModel,
    tokenizer: ChatTokenizer,
    images: Tensor,
    asked: Sequence[Asked],
    question_template: str,
    max_new_tokens: int,
) -> list[tuple[EarlyScore, Reply]]:
    """Per projected latent [N, L, H], its early score and the reply to the question about it."""
    config, count = language.config, len(images)
    texts = {about: texts_of(config, tokenizer, about.prompt, question_template) for about in asked}
    prompts = {about: tokenizer.plain(about.prompt) for about in texts}
    questions, descriptions = ([texts[about][i] for about in asked] for i in range(2))
    seen = questions[0].index(IMAGE) + 1  # all texts begin alike up to the image, so this part is read once
    before = questions[0][:seen]
    assert all(ids[:seen] == before for pair in texts.values() for ids in pair)
    room = config.max_length - config.tokens + 1
    limits = [min(max_new_tokens, room - len(ids)) for ids in questions]  # of the answers, in tokens
    slots = max(len(ids) + limit for ids, limit in zip(questions, limits, strict=True))
    with language.cache(count, config.tokens + max(slots, *map(len, descriptions))) as cache:
        cache.extend(torch.cat([language.tokens(before[:-1]).expand(count, -1, -1), images], dim=1))
        lengths = list(cache.lengths)
        hidden = cache.extend(_embeddings(language, [ids[seen:] for ids in descriptions]))
        ends = [len(ids) - seen for ids in descriptions]
        prompt_scores = _prompt_scores(language, hidden, ends, [prompts[about] for about in asked])
        cache.rewind(lengths)
        rest = _embeddings(language, [ids[seen:] for ids in questions])
        answers = language.reply_in(cache, rest, limits, tokenizer.chat_end, tokenizer.image_start, draw=False)
    yes, no = answer_tokens(tokenizer, "yes"), answer_tokens(tokenizer, "no")
    read = []
    for reply, (prompt_loss, prompt_conf) in zip(answers, prompt_scores, strict=True):
        yes_at, no_at = _first_of(reply, yes), _first_of(reply, no)
        early = EarlyScore(
            answer="yes" if yes_at is not None else "no" if no_at is not None else "uncertain",
            yes_logit=reply.logits[yes_at] if yes_at is not None else 0.0,
            yes_conf_score=reply.confidences[yes_at] if yes_at is not None else 0.0,
            no_logit=reply.logits[no_at] if no_at is not None else 0.0,
            no_conf_score=reply.confidences[no_at] if no_at is not None else 0.0,
            prompt_loss=prompt_loss,
            prompt_conf_score=prompt_conf,
        )
        read.append((early, reply))
    return read


def _prompt_scores(
    language: LanguageModel, hidden: Tensor, ends: Sequence[int], prompts: Sequence[list[int]]
) -> list[tuple[float, float]]:
    """(prompt loss, confidence) per row of hidden states [B, T, H]; row b's first `ends[b]` states end with its prompt.

    `prompts` are token ids. The loss is the mean over the prompt's tokens from the second on (0 if there is no second), the
    confidence the mean over all of them.
    """
    counts = [len(ids) for ids in prompts]
    at_prompt = [row[end - count : end] for row, end, count in zip(hidden, ends, counts, strict=True)]
    targets = [i for ids in prompts for i in (*ids[1:], 0)]  # the loss at a prompt's last token is left out below
    confidence, loss = language.confidence_and_loss(torch.cat(at_prompt), targets)
    assert loss is not None
    means = torch.cat([rows.mean(dim=1) for rows in _in_rows(confidence, counts)]).tolist()
    losses = torch.cat([rows[:, :-1].mean(dim=1) for rows in _in_rows(loss, counts)]).tolist()
    return [(one if count > 1 else 0.0, mean) for one, mean, count in zip(losses, means, counts, strict=True)]


def _image_scores(
    language: LanguageModel, tokenizer: ChatTokenizer, images: Tensor, asked: Sequence[Asked]
) -> list[float]:
    """Mean confidence at each projected latent [N, L, H] in the conversation that drew it; a prompt's text is read once."""
    row_of = {about: row for row, about in enumerate(dict.fromkeys(asked))}
    drawn = [tokenizer.chat(about.request) for about in row_of]
    replied = [tokenizer.plain(tokenizer.decode(about.reply.ids)) for about in row_of]
    image = tokenizer.image()
    at = image.index(IMAGE)
    texts = [[*ids, *reply, *image[:at]] for ids, reply in zip(drawn, replied, strict=True)]
    starts = [len(ids) + len(about.reply.ids) for ids, about in zip(drawn, row_of, strict=True)]
    ending = [images]
    if after := image[at + 1 :]:
        ending.append(language.tokens(after).expand(len(images), -1, -1))
    longest = max(map(len, texts))
    rows = [row_of[about] for about in asked]
    with (
        language.cache(len(texts), longest) as text,
        language.cache(len(images), longest + len(image) + images.shape[1]) as cache,
    ):
        beginnings = text.extend(_embeddings(language, texts))  # [prompts, T, H]
        cache.expand(text, rows)
        endings = cache.extend(torch.cat(ending, dim=1))  # [N, L (+ 1), H]
    at_image: list[Tensor] = []  # the parts of all rows' hidden states that belong to the images
    counts = []
    for row, hidden in zip(rows, endings, strict=True):
        start, length = starts[row], len(texts[row])
        parts = [beginnings[row, start:length], hidden[max(0, start - length) : -1]]
        at_image += parts
        counts.append(sum(map(len, parts)))
    confidence, _ = language.confidence_and_loss(torch.cat(at_image))
    return torch.cat([part.mean(dim=1) for part in _in_rows(confidence, counts)]).tolist()


def _embeddings(language: LanguageModel, rows: Sequence[list[int]]) -> Sequence[Tensor]:
    """Embeddings [T, H] per row of token ids, all looked up at once."""
    return torch.split(language.tokens([i for ids in rows for i in ids]), [len(ids) for ids in rows])


def _in_rows(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Values [sum of `counts`], those of one row after the other, as [R, count] for each run of R rows of equal count."""
    runs = [(len(list(run)), count) for count, run in groupby(counts)]
    parts = torch.split(values, [rows * count for rows, count in runs])
    return [part.view(run) for part, run in zip(parts, runs, strict=True)]


def _first_of(reply: Reply, tokens: set[int]) -> int | None:
    return next((i for i, token in enumerate(reply.ids) if token in tokens), None)
