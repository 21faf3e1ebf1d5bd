"""Ranking: the metrics a prompt's images can be ordered by, the order, and why an image was not kept. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale_rae.errors import InputError, OptionError

ANSWERS = ("yes", "uncertain", "no")  # in the order of preference


@dataclass(frozen=True)
class Metric:
    """One way to order images; a new metric is one entry of TABLE.

    A metric goes by one of three things: the reward, a `field` of the judgement, or the answer. By the answer, images with
    a yes come first, then the uncertain ones, then those with a no; `answer_field` names the number that orders images
    with the same answer ("logit" stands for yes_logit and no_logit).
    """

    title: str  # in headings
    label: str  # in a list to choose from
    short: str  # below an image
    noun: str  # in sentences
    field: str | None = None
    answer_field: str | None = None
    needs_reward: bool = False
    mixes_reward: bool = (
        False  # among images with the same answer, the reward counts beside yes_conf_score, if there is one
    )
    lower_is_better: bool = False

    @property
    def uses_reward(self) -> bool:
        """Whether rewards make a difference."""
        return self.needs_reward or self.mixes_reward


TABLE = {
    "combined": Metric(
        "reward and confidence",
        "answer, then reward and confidence",
        "comb.",
        "combined score",
        answer_field="conf_score",
        mixes_reward=True,
    ),
    "answer_conf": Metric(
        "confidence of the answer", "answer and its confidence", "answer", "confidence", answer_field="conf_score"
    ),
    "answer_logits": Metric("logit of the answer", "answer and its logit", "logit", "logit", answer_field="logit"),
    "image_reward": Metric("reward", "reward alone", "reward", "reward", needs_reward=True),
    "prompt_loss": Metric(
        "loss of the prompt",
        "prompt loss (lower is better)",
        "loss",
        "prompt loss",
        field="prompt_loss",
        lower_is_better=True,
    ),
    "prompt_conf": Metric(
        "confidence at the prompt",
        "confidence in the prompt",
        "prompt",
        "confidence in the prompt",
        field="prompt_conf_score",
    ),
    "image_conf": Metric(
        "confidence at the image",
        "confidence in the image",
        "image",
        "confidence in the image",
        field="image_conf_score",
    ),
    "response_conf": Metric(
        "confidence of the reply",
        "confidence in the answer",
        "reply",
        "confidence in the answer",
        field="response_conf_score",
    ),
}
METRICS = tuple(TABLE)
ALIASES = {"loss": "prompt_loss"}
_ALIAS_OF = {metric: alias for alias, metric in ALIASES.items()}
METRICS_HELP = ", ".join(f"{name} (or {_ALIAS_OF[name]})" if name in _ALIAS_OF else name for name in METRICS)


def metric_as_given(name: str) -> str:
    """The name of a metric or alias as METRICS and ALIASES spell it: lower case, dashes as underscores.

    Raises:
        OptionError: when there is no such metric.
    """
    plain = name.strip().lower().replace("-", "_")
    if plain not in METRICS and plain not in ALIASES:
        raise OptionError(f"{name!r} is not one of {', '.join((*METRICS, *ALIASES))}")
    return plain


def metric_named(name: str) -> str:
    """The metric of that name; `loss` is `prompt_loss`.

    Raises:
        OptionError: when there is no such metric.
    """
    plain = metric_as_given(name)
    return ALIASES.get(plain, plain)


@dataclass(frozen=True)
class Verdicts:
    """The model's judgements and the rewards of a prompt's images, as metadata.jsonl holds them.

    `responses` is its text_responses, `rewards_field` its all_ir_scores, `where` a prefix of errors (the file). Fields are
    checked when they are read; errors name them.
    """

    count: int
    responses: Any = None
    rewards_field: Any = None
    where: str = ""
    names_rewards: bool = True  # whether the record has all_ir_scores at all

    @classmethod
    def of(cls, metadata: Mapping[str, Any], count: int, where: str = "") -> Verdicts:
        """The verdicts in a prompt's record of `count` images."""
        return cls(
            count,
            metadata.get("text_responses"),
            metadata.get("all_ir_scores"),
            where,
            names_rewards="all_ir_scores" in metadata,
        )

    @classmethod
    def made(cls, judged: Sequence[Mapping[str, Any]], rewards: Sequence[float] | None) -> Verdicts:
        """The verdicts of images that were judged just now: one judgement and, with a reward model, one reward per image."""
        responses = {str(i): dict(entry) for i, entry in enumerate(judged)}
        return cls(len(judged), responses, None if rewards is None else list(rewards))

    def rewards(self) -> list[float | None] | None:
        """The reward of each image; None when there was no reward model.

        Raises:
            InputError: naming the field, when their number is not that of the images, or one is not a number.
        """
        values = self.rewards_field
        if values is None:
            return None
        if not isinstance(values, list):
            raise self._error("all_ir_scores is not a list")
        if len(values) != self.count:
            raise self._error(f"all_ir_scores has {len(values)} values for {self.count} images")
        return [self._number(value, f"all_ir_scores[{i}]") for i, value in enumerate(values)]

    def response(self, image: int) -> Mapping[str, Any]:
        """The judgement of an image; empty when the model was not asked (the official code asks about some images only)."""
        if self.responses is None:
            return {}
        if not isinstance(self.responses, dict):
            raise self._error("text_responses is not an object")
        value = self.responses.get(str(image))
        if value is not None and not isinstance(value, dict):
            raise self._error(f'text_responses["{image}"] is not an object')
        return value or {}

    def answer(self, image: int) -> str | None:
        """yes, no or uncertain; None when the model was not asked about the image."""
        value = self.response(image).get("answer")
        if value is None:
            return None
        answer = value.strip().lower() if isinstance(value, str) else value
        if answer not in ANSWERS:
            raise self._error(f'text_responses["{image}"].answer is {value!r}, not one of {", ".join(ANSWERS)}')
        return str(answer)

    def score(self, image: int, name: str) -> float | None:
        """A number of an image's judgement; None when there is none."""
        return self._number(self.response(image).get(name), f'text_responses["{image}"].{name}')

    def answer_score(self, image: int, name: str) -> float | None:
        """yes_<name>, or -no_<name>, or 0 if uncertain, by the answer; None when the model was not asked."""
        answer = self.answer(image)
        if answer is None:
            return None
        if answer == "uncertain":
            return 0.0
        value = self.score(image, f"{answer}_{name}")
        return value if value is None or answer == "yes" else -value

    def _number(self, value: Any, name: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._error(f"{name} is {value!r}, not a number")
        return float(value)

    def _error(self, text: str) -> InputError:
        return InputError(f"{self.where}{text}")


@dataclass(frozen=True)
class Ranking:
    """A prompt's images, best first, and the score of each by the metric.

    `scores` are in the order the images were drawn; None marks an image that lacks what the metric needs, and such
    images come last.
    """

    order: list[int]
    scores: list[float | None]
    without_reward: bool = False  # `combined` went by confidence alone


def rank(verdicts: Verdicts, metric: str, reward_weight: float = 0.5, at_least: int = 1) -> Ranking:
    """A prompt's images by a metric, best first; images that are equal stay in the order they were drawn.

    - `combined`: images with a yes, then the uncertain ones, then those with a no; within each by
      w · z(reward) + (1 - w) · z(yes_conf_score), where w is `reward_weight` and z standardises over the prompt's images
      (0 if all are equal). Without rewards, as `answer_conf`.
    - `answer_conf`, `answer_logits`: the answers in the same order; the surest yes first, the surest no last.
    - `image_reward`, `prompt_conf`, `image_conf`, `response_conf`: higher is better; `prompt_loss`: lower.

    Images that lack what the metric needs come last, in the order they were drawn.

    Raises:
        InputError: naming the field, when fewer than `at_least` images have what the metric needs.
    """
    metric = metric_named(metric)
    entry, count = TABLE[metric], verdicts.count
    without_reward = False
    tiers = [0] * count
    if entry.needs_reward:
        rewards = verdicts.rewards()
        if rewards is None:
            missing = "null" if verdicts.names_rewards else "missing"
            raise InputError(
                f"{verdicts.where}all_ir_scores is {missing}; --metric {metric} needs a reward of each image"
            )
        scores, needs = rewards, "all_ir_scores"
    elif entry.answer_field is None:
        needs = str(entry.field)
        scores = [verdicts.score(i, needs) for i in range(count)]
    else:
        answers = [verdicts.answer(i) for i in range(count)]
        tiers = [ANSWERS.index(answer) if answer is not None else len(ANSWERS) for answer in answers]
        needs = entry.answer_field
        scores = [verdicts.answer_score(i, needs) for i in range(count)]
        if entry.mixes_reward:
            rewards = verdicts.rewards()
            without_reward = rewards is None
            if rewards is not None:
                sure = [verdicts.score(i, "yes_conf_score") if a is not None else None for i, a in enumerate(answers)]
                scores = _combine(rewards, sure, reward_weight)
    scored = [i for i in range(count) if scores[i] is not None]
    if len(scored) < at_least:
        raise _lacking(verdicts, metric, needs, scores, at_least)
    sign = 1.0 if entry.lower_is_better else -1.0
    order = sorted(scored, key=lambda i: (tiers[i], sign * (scores[i] or 0.0), i))
    return Ranking(order + [i for i in range(count) if scores[i] is None], scores, without_reward)


def _combine(
    rewards: Sequence[float | None], confidences: Sequence[float | None], reward_weight: float
) -> list[float | None]:
    both = [
        (i, reward, sure)
        for i, (reward, sure) in enumerate(zip(rewards, confidences, strict=True))
        if reward is not None and sure is not None
    ]
    z_reward, z_sure = standardised([r for _, r, _ in both]), standardised([c for _, _, c in both])
    scores: list[float | None] = [None] * len(rewards)
    for (i, _, _), r, c in zip(both, z_reward, z_sure, strict=True):
        # Rounded, so that scores that are equal on paper tie whatever their last bits.
        scores[i] = round(reward_weight * r + (1 - reward_weight) * c, 9) + 0.0
    return scores


def standardised(values: Sequence[float]) -> list[float]:
    """Values minus their mean, over their (population) standard deviation; zeros when all are equal."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / spread for v in values] if spread else [0.0] * len(values)


def _lacking(verdicts: Verdicts, metric: str, needs: str, scores: Sequence[float | None], at_least: int) -> InputError:
    """The error that names the first field that is missing."""
    have = sum(score is not None for score in scores)
    image = next(i for i, score in enumerate(scores) if score is None)
    if needs == "all_ir_scores":
        name = f"all_ir_scores[{image}]"
    elif not verdicts.responses:
        name = "text_responses"
    elif not verdicts.response(image):
        name = f'text_responses["{image}"]'
    else:
        response = verdicts.response(image)
        if TABLE[metric].answer_field:
            given = "yes" if TABLE[metric].mixes_reward and verdicts.rewards_field else verdicts.answer(image)
            needs = "answer" if verdicts.answer(image) is None else f"{given}_{needs}"
            if response.get(needs) is not None:  # so the image's reward is null
                return InputError(f"{verdicts.where}all_ir_scores[{image}] is null; --metric {metric} needs it")
        name = f'text_responses["{image}"].{needs}'
    images = "1 image" if at_least == 1 else f"{at_least} images"
    return InputError(
        f"{verdicts.where}{name} is missing; --metric {metric} needs it of at least {images} ({have} have it)"
    )


def why_dropped(verdicts: Verdicts, ranking: Ranking, keep: int, metric: str, image: int) -> str | None:
    """A sentence on what `image` lacks against the last of the `keep` kept images; None when it is kept itself."""
    metric = metric_named(metric)
    entry = TABLE[metric]
    if ranking.order.index(image) < keep:
        return None
    last = ranking.order[keep - 1]
    score, needed = ranking.scores[image], ranking.scores[last]
    if entry.answer_field:
        answer, best = verdicts.answer(image), verdicts.answer(last)
        if answer is None:
            return "The model was not asked about it."
        if best is not None and ANSWERS.index(answer) > ANSWERS.index(best):
            said = {"no": "the model says no", "uncertain": "the model says neither yes nor no"}[answer]
            return f"Asked whether it shows the prompt, {said}; the last image kept has a {best}."
    combined = entry.mixes_reward and not ranking.without_reward
    name = TABLE["answer_conf"].noun if ranking.without_reward else entry.noun
    if score is None or needed is None:
        return f"It has no {name}."
    if score == needed:
        return f"Its {name} of {number(score)} is that of the last image kept, which was drawn earlier."
    side = "above" if entry.lower_is_better else "below"
    sentence = f"Its {name} of {number(score)} is {side} the {number(needed)} of the last image kept"
    return f"{sentence}{_parts(verdicts, image, last) if combined else ''}."


def _parts(verdicts: Verdicts, image: int, last: int) -> str:
    """The numbers that a combined score is made of, for both images."""
    rewards = verdicts.rewards() or []
    pairs = [("reward", rewards[image], rewards[last])] if rewards else []
    pairs.append(("confidence in yes", verdicts.score(image, "yes_conf_score"), verdicts.score(last, "yes_conf_score")))
    parts = [f"{name} {number(a)} against {number(b)}" for name, a, b in pairs if a is not None and b is not None]
    return f" ({', '.join(parts)})" if parts else ""


def number(value: float) -> str:
    """Three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")
