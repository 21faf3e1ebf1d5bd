"""Why an image of a ranking was not kept, in a sentence."""

from __future__ import annotations

from scale_rae.scaling.select import ANSWERS, LOWER_IS_BETTER, Prompt, Ranking, metric_named

_NAMES = {
    "combined": "combined score",
    "answer_conf": "confidence",
    "answer_logits": "logit",
    "image_reward": "reward",
    "prompt_loss": "prompt loss",
    "prompt_conf": "confidence in the prompt",
    "image_conf": "confidence in the image",
    "response_conf": "confidence in the answer",
}


def why_dropped(prompt: Prompt, ranking: Ranking, keep: int, metric: str, image: int) -> str | None:
    """What `image` lacks against the last of the `keep` that are kept; None when it is kept itself."""
    metric = metric_named(metric)
    place = ranking.order.index(image)
    if place < keep:
        return None
    last = ranking.order[keep - 1]
    score, needed = ranking.scores[image], ranking.scores[last]
    if metric in ("combined", "answer_conf", "answer_logits"):
        answer, best = prompt.answer(image), prompt.answer(last)
        if answer is None:
            return "The model was not asked about it."
        if best is not None and ANSWERS.index(answer) > ANSWERS.index(best):
            said = {"no": "the model says no", "uncertain": "the model says neither yes nor no"}[answer]
            return f"Asked whether it shows the prompt, {said}; the last image kept has a {best}."
    name = "confidence" if metric == "combined" and ranking.without_reward else _NAMES[metric]
    if score is None or needed is None:
        return f"It has no {name}."
    if score == needed:
        return f"Its {name} of {number(score)} is that of the last image kept, which was drawn earlier."
    side = "above" if metric in LOWER_IS_BETTER else "below"
    sentence = f"Its {name} of {number(score)} is {side} the {number(needed)} of the last image kept"
    return f"{sentence}{_parts(prompt, image, last) if name == 'combined score' else ''}."


def _parts(prompt: Prompt, image: int, last: int) -> str:
    """What a combined score is made of, of both images."""
    rewards = prompt.rewards() or []
    pairs = [("reward", rewards[image], rewards[last])] if rewards else []
    pairs.append(("confidence in yes", prompt.score(image, "yes_conf_score"), prompt.score(last, "yes_conf_score")))
    told = [f"{name} {number(a)} against {number(b)}" for name, a, b in pairs if a is not None and b is not None]
    return f" ({', '.join(told)})" if told else ""


def number(value: float) -> str:
    """Three significant digits, with a minus that is one."""
    return f"{value:.3g}".replace("-", "−")
