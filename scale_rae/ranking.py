"""Ranking: the metrics a prompt's images can be ordered by, the order, and why an image was not kept. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale_rae.errors import InputError, OptionError, counted

ANSWERS = ("yes", "uncertain", "no")  # in the order of preference
REWARD_WEIGHT = 0.5  # of the reward in a mix, where nothing else is chosen


@dataclass(frozen=True)
class Part:
    """A number of the judgement that a metric mixes, and its share of what the reward's weight leaves."""

    field: str
    share: float
    noun: str  # in sentences


@dataclass(frozen=True)
class Metric:
    """One way to order images; a new metric is one entry of TABLE.

    A metric goes by one of four things: the reward, a `field` of the judgement, the answer, or the answer and a mix. By the
    answer, images with a yes come first, then the uncertain ones, then those with a no; `answer_field` names the number
    that orders images with the same answer ("logit" stands for yes_logit and no_logit). With a `mix`, such images are
    ordered by w · z(reward) + (1 - w) · Σ share · z(field), where w is the reward's weight and z standardises over the
    prompt's images.
    """

    title: str  # in headings
    label: str  # in a list to choose from
    short: str  # below an image
    noun: str  # in sentences
    field: str | None = None
    answer_field: str | None = None
    mix: tuple[Part, ...] = ()
    without_reward: str | None = None  # the metric that takes a mix's place without rewards; None: the mix alone
    fewer_fields: str | None = None  # a metric for records that lack a field of the mix
    needs_reward: bool = False
    lower_is_better: bool = False

    @property
    def uses_reward(self) -> bool:
        """Whether rewards make a difference."""
        return self.needs_reward or bool(self.mix)

    @property
    def by_answer(self) -> bool:
        """Whether images with a yes come first, then the uncertain ones, then those with a no."""
        return self.answer_field is not None or bool(self.mix)


TABLE = {
    # Shares tuned on recorded drawings with other seeds than those that docs/scaling.md reports. Among images that the model
    # says yes to, confidence in yes hardly tells right from wrong (mean area under the ROC curve within a prompt 0.41); the
    # reward (0.66) and confidence in the prompt (0.68) do.
    "combined": Metric(
        "reward and both confidences",
        "answer, then reward and both confidences",
        "comb.",
        "combined score",
        mix=(
            Part("yes_conf_score", 0.2, "confidence in yes"),
            Part("prompt_conf_score", 0.8, "confidence in the prompt"),
        ),
        fewer_fields="combined_v1",
    ),
    "combined_v1": Metric(
        "reward and confidence in yes",
        "answer, then reward and confidence in yes",
        "comb. v1",
        "combined score",
        mix=(Part("yes_conf_score", 1.0, "confidence in yes"),),
        without_reward="answer_conf",
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
            raise self._error(f"all_ir_scores has {counted(len(values), 'value')} for {counted(self.count, 'image')}")
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
    without_reward: bool = False  # a metric that mixes the reward in went by confidence alone


def formula(metric: str, reward_weight: float = REWARD_WEIGHT, with_reward: bool = True) -> str:
    """What a metric orders images by, in one line: "yes first; 0.5 z(reward) + 0.1 z(yes_conf_score) + …".

    z standardises over the prompt's images. `with_reward` says whether there are rewards.
    """
    entry = _goes_by(metric_named(metric), with_reward)
    if entry.mix:
        weight = reward_weight if with_reward else 0.0
        terms = [f"{weight:.4g} z(reward)"] if with_reward else []
        terms += [f"{(1 - weight) * part.share:.4g} z({part.field})" for part in entry.mix]
        return f"yes first; {' + '.join(terms)}"
    if entry.answer_field:
        return f"yes first; yes_{entry.answer_field} of a yes, -no_{entry.answer_field} of a no"
    return f"{'-' if entry.lower_is_better else ''}{entry.field or 'reward'}"


def _goes_by(metric: str, with_reward: bool) -> Metric:
    """The metric's entry of TABLE, or the entry that takes its place where there are no rewards."""
    entry = TABLE[metric]
    return TABLE[entry.without_reward] if entry.without_reward is not None and not with_reward else entry


def rank(
    verdicts: Verdicts,
    metric: str,
    reward_weight: float = REWARD_WEIGHT,
    at_least: int = 1,
    spreads: Mapping[str, float] | None = None,
) -> Ranking:
    """A prompt's images by a metric, best first; images that are equal stay in the order they were drawn.

    - `combined`: images with a yes, then the uncertain ones, then those with a no; within each by
      w · z(reward) + (1 - w) · (0.2 · z(yes_conf_score) + 0.8 · z(prompt_conf_score)), where w is `reward_weight` and z
      standardises over the prompt's images (0 if all are equal). Without rewards, the same without the first term.
    - `combined_v1`: likewise by w · z(reward) + (1 - w) · z(yes_conf_score). Without rewards, as `answer_conf`.
    - `answer_conf`, `answer_logits`: the answers in the same order; the surest yes first, the surest no last.
    - `image_reward`, `prompt_conf`, `image_conf`, `response_conf`: higher is better; `prompt_loss`: lower.

    `spreads` has least standard deviations for z, by field ("reward" for the reward's): values that differ by less than that
    are hardly told apart, however few they are. Images that lack what the metric needs come last, in the order they were
    drawn.

    Raises:
        InputError: naming the field, when fewer than `at_least` images have what the metric needs.
    """
    metric = metric_named(metric)
    count = verdicts.count
    rewards = verdicts.rewards() if TABLE[metric].uses_reward else None
    entry = _goes_by(metric, rewards is not None)
    if entry.needs_reward and rewards is None:
        missing = "null" if verdicts.names_rewards else "missing"
        raise InputError(
            f"{verdicts.where}all_ir_scores is {missing}; --metric {metric} needs a reward of each image, which "
            "`scale-rae score DIR --reward NAME` adds to an experiment"
        )
    tiers = [0] * count
    if entry.by_answer:
        answers = [verdicts.answer(i) for i in range(count)]
        tiers = [ANSWERS.index(answer) if answer is not None else len(ANSWERS) for answer in answers]
    scores: Sequence[float | None]
    if entry.mix:
        scores = _mixed(verdicts, entry.mix, rewards, reward_weight, spreads or {})
    elif entry.answer_field is not None:
        scores = [verdicts.answer_score(i, entry.answer_field) for i in range(count)]
    elif entry.field is not None:
        scores = [verdicts.score(i, entry.field) for i in range(count)]
    else:
        scores = rewards or []
    scored = [i for i in range(count) if scores[i] is not None]
    if len(scored) < at_least:
        raise _lacking(verdicts, metric, entry, scores, at_least)
    sign = 1.0 if entry.lower_is_better else -1.0
    order = sorted(scored, key=lambda i: (tiers[i], sign * (scores[i] or 0.0), i))
    without_reward = bool(TABLE[metric].mix) and rewards is None
    return Ranking(order + [i for i in range(count) if scores[i] is None], list(scores), without_reward)


def _mixed(
    verdicts: Verdicts,
    mix: Sequence[Part],
    rewards: Sequence[float | None] | None,
    reward_weight: float,
    spreads: Mapping[str, float],
) -> list[float | None]:
    """The mixed score of each image; None for an image that was not asked about or lacks a part."""
    complete: list[int] = []
    columns: list[list[float]] = [[] for _ in range(len(mix) + 1)]  # the reward first
    for i in range(verdicts.count):
        parts = [0.0 if rewards is None else rewards[i], *(verdicts.score(i, part.field) for part in mix)]
        values = [value for value in parts if value is not None]
        if verdicts.answer(i) is not None and len(values) == len(parts):
            complete.append(i)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    weight = 0.0 if rewards is None else reward_weight
    names = ["reward", *(part.field for part in mix)]
    z_reward, *z_parts = (standardised(c, spreads.get(name, 0.0)) for name, c in zip(names, columns, strict=True))
    scores: list[float | None] = [None] * verdicts.count
    for place, i in enumerate(complete):
        rest = sum(part.share * z[place] for part, z in zip(mix, z_parts, strict=True))
        # Rounded, so that scores that are equal on paper tie whatever their last bits.
        scores[i] = round(weight * z_reward[place] + (1 - weight) * rest, 9) + 0.0
    return scores


def standardised(values: Sequence[float], least_spread: float = 0.0) -> list[float]:
    """Values minus their mean, over their (population) standard deviation, at least `least_spread`; zeros if all are equal."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    spread = max(least_spread, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)))
    return [(v - mean) / spread for v in values] if spread else [0.0] * len(values)


def _lacking(
    verdicts: Verdicts, metric: str, entry: Metric, scores: Sequence[float | None], at_least: int
) -> InputError:
    """The error that names the first field that is missing; the metric goes by `entry`."""
    have = sum(score is not None for score in scores)
    image = next(i for i, score in enumerate(scores) if score is None)
    instead = ""
    if entry.needs_reward:
        name = f"all_ir_scores[{image}]"
    elif not verdicts.responses:
        name = "text_responses"
    elif not (response := verdicts.response(image)):
        name = f'text_responses["{image}"]'
    else:
        answer = verdicts.answer(image)
        missing: str | None = entry.field
        if entry.by_answer and answer is None:
            missing = "answer"
        elif entry.answer_field is not None:
            missing = f"{answer}_{entry.answer_field}"
        elif entry.mix:
            missing = next((part.field for part in entry.mix if response.get(part.field) is None), None)
            if missing is None:
                return InputError(f"{verdicts.where}all_ir_scores[{image}] is null; --metric {metric} needs it")
            if entry.fewer_fields and missing not in [part.field for part in TABLE[entry.fewer_fields].mix]:
                instead = f"; --metric {entry.fewer_fields.replace('_', '-')} does without"
        name = f'text_responses["{image}"].{missing}'
    return InputError(
        f"{verdicts.where}{name} is missing; --metric {metric} needs it of at least {counted(at_least, 'image')} ({have} have it){instead}"
    )


def why_dropped(verdicts: Verdicts, ranking: Ranking, keep: int, metric: str, image: int) -> str | None:
    """A sentence on what `image` lacks against the last of the `keep` kept images; None when it is kept itself."""
    entry = _goes_by(metric_named(metric), not ranking.without_reward)
    if ranking.order.index(image) < keep:
        return None
    last = ranking.order[keep - 1]
    score, needed = ranking.scores[image], ranking.scores[last]
    if entry.by_answer:
        answer, best = verdicts.answer(image), verdicts.answer(last)
        if answer is None:
            return "The model was not asked about it."
        if best is not None and ANSWERS.index(answer) > ANSWERS.index(best):
            said = {"no": "the model says no", "uncertain": "the model says neither yes nor no"}[answer]
            return f"Asked whether it shows the prompt, {said}; the last image kept has a {best}."
    if score is None or needed is None:
        return f"It has no {entry.noun}."
    if score == needed:
        return f"Its {entry.noun} of {number(score)} is that of the last image kept, which was drawn earlier."
    side = "above" if entry.lower_is_better else "below"
    sentence = f"Its {entry.noun} of {number(score)} is {side} the {number(needed)} of the last image kept"
    return f"{sentence}{_parts(verdicts, entry.mix, image, last)}."


def _parts(verdicts: Verdicts, mix: Sequence[Part], image: int, last: int) -> str:
    """The numbers that a mixed score is made of, for both images; empty for a score of one number."""
    rewards = (verdicts.rewards() or []) if mix else []
    pairs = [("reward", rewards[image], rewards[last])] if rewards else []
    pairs += [(part.noun, verdicts.score(image, part.field), verdicts.score(last, part.field)) for part in mix]
    parts = [f"{name} {number(a)} against {number(b)}" for name, a, b in pairs if a is not None and b is not None]
    return f" ({', '.join(parts)})" if parts else ""


def number(value: float) -> str:
    """Three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")
