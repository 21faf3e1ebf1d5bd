"""What a model and rewards make of its drawings in training: log-odds of yes, rewards, standings.

The model reads a latent and is asked whether it aligns with the prompt, as in `scores`. The log-odds of yes against no as the first
word of its answer say more than the answer: they tell drawings apart to which it says yes alike (VQAScore, Lin et al. 2024,
arXiv:2404.01291).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_rae.acceptance import ACCEPT_FROM, REWARD_SPREADS
from scale_rae.errors import ConfigError
from scale_rae.language import LanguageModel
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION, ChatTokenizer, ask_question
from scale_rae.rewards import Reward, load_reward, scores_of_each
from scale_rae.scores import answer_tokens
from scale_rae.training.batches import embed
from scale_rae.training.passes import read
from scale_rae.training.sequences import TokenSequence
from scale_rae.training.settings import NO_REWARD, SelfRewardOptions

READ_AT_ONCE = 256  # latents
READING_SPREAD = 4.0  # nats: least standard deviation that log-odds are measured by
READING_LIMIT = 6.0  # nats: surer than this, in either direction, makes no difference


@torch.no_grad()
def log_odds(
    language: LanguageModel, tokenizer: ChatTokenizer, latents: Sequence[Tensor], prompts: Sequence[str]
) -> Tensor:
    """Log-odds [N] float32 of yes against no, in nats, that latents [L, C] align with their prompts.

    Raises:
        ConfigError: when the tokenizer has no single token for yes or no.
    """
    questions = {prompt: _question(tokenizer, prompt) for prompt in prompts}
    tokens = [sorted(answer_tokens(tokenizer, word)) for word in ("yes", "no")]
    if not all(tokens):
        raise ConfigError(
            "the tokenizer has no single token for yes or for no, so the model's reading cannot be scored"
        )
    yes, no = (torch.tensor(ids, device=language.device) for ids in tokens)
    found = []
    for start in range(0, len(prompts), READ_AT_ONCE):
        part = [questions[prompt] for prompt in prompts[start : start + READ_AT_ONCE]]
        embedded = embed(language, part, latents[start : start + READ_AT_ONCE])
        hidden = read(language, embedded.embeds)
        ends = torch.tensor([question.length(language.config.tokens) - 1 for question in part], device=language.device)
        logits = language.lm_head(hidden[torch.arange(len(part), device=language.device), ends]).float()  # [B, V]
        found.append(logits[:, yes].logsumexp(dim=-1) - logits[:, no].logsumexp(dim=-1))
    return torch.cat(found)


def _question(tokenizer: ChatTokenizer, prompt: str) -> TokenSequence:
    ids = tokenizer.chat(ask_question(QUESTION, prompt), image=True)
    return TokenSequence(tuple(ids), (False,) * len(ids))


@dataclass(frozen=True)
class Scores:
    """The scores of N drawings, each [N] float32.

    `reading` are log-odds of the model's yes, in nats; `reward` is None where there is none.
    """

    reading: Tensor
    reward: Tensor | None

    @property
    def yes(self) -> Tensor:
        """Whether the model says yes, [N] bool."""
        return self.reading > 0


class Scorer:
    """Scores drawings by a model's own reading, and by a reward if one is chosen."""

    def __init__(self, model: ScaleRAE, options: SelfRewardOptions) -> None:
        """Loads the reward.

        Raises:
            ConfigError, CheckpointError, HubError: when it cannot be used.
        """
        self.model, self.options = model, options
        self.reward = load_named(options.reward, model, options.reward_path)

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Scores:
        """The scores of latents [N, L, C], not normalised; those of one prompt come one after the other."""
        reading = log_odds(self.model.language, self.model.tokenizer, list(latents), prompts)
        return Scores(reading, rewards_of(self.model, self.reward, latents, prompts))

    def standings(self, scores: Scores, each: int) -> Tensor:
        """How far each drawing [N] is above its prompt's `each` drawings, in standard deviations.

        Where reading and reward both count, it is their weighted mean.
        """
        options = self.options
        reading = scores.reading.clamp(-READING_LIMIT, READING_LIMIT)
        parts = [(options.reading_weight, reading, READING_SPREAD)]
        if scores.reward is not None:
            parts.append((options.reward_weight, scores.reward, REWARD_SPREADS.get(options.reward, 0.0)))
        total = torch.zeros_like(scores.reading)
        for weight, values, least in parts:
            total = total + weight * _standardised(values.view(-1, each), least).flatten()
        return total / sum(weight for weight, _, _ in parts)

    def accepted(self, scores: Scores, standings: Tensor) -> Tensor:
        """Whether each drawing [N] is accepted, by the rule of adaptive search.

        The model says yes, and the drawing is not far below its prompt's others.
        """
        near = standings >= ACCEPT_FROM
        return near & scores.yes if self.options.reading_weight else near


def _standardised(values: Tensor, least: float) -> Tensor:
    """Values [P, K] minus their rows' means, over their rows' standard deviations.

    A standard deviation counts as at least `least`.
    """
    spread = values.std(dim=1, keepdim=True, correction=0).clamp(min=max(least, 1e-6))
    return (values - values.mean(dim=1, keepdim=True)) / spread


def optimality(standings: Tensor) -> Tensor:
    """DiffusionNFT's r in 0..1 of drawings with these standings [N]."""
    return 0.5 + 0.5 * standings.clamp(-1, 1)


def load_named(name: str, model: ScaleRAE, path: object) -> Reward | None:
    """The reward called `name`, None for "none"."""
    return None if name == NO_REWARD else load_reward(name, model, None if path is None else str(path))


def rewards_of(model: ScaleRAE, reward: Reward | None, latents: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """A reward's scores [N] of decoded latents [N, L, C]; those of one prompt are scored together."""
    if reward is None:
        return None
    images = model.decode(list(latents))
    return torch.tensor(scores_of_each(reward, images, prompts), device=latents.device)


def spoilt(latents: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """Latents [N, L, C] whose second half of tokens is another prompt's: no prompt is true of them.

    None if all prompts are the same: halves of two drawings of one prompt may well show it.
    """
    if len(set(prompts)) == 1:
        return None
    half, count = latents.shape[1] // 2, len(prompts)
    others = []
    for number, prompt in enumerate(prompts):
        other = (number - max(1, count // 2)) % count
        while prompts[other] == prompt:
            other = (other - 1) % count
        others.append(other)
    return torch.cat([latents[:, :half], latents[others, half:]], dim=1)
