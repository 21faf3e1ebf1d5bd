"""Reward models, which score how well pictures show what a prompt asks for. `load_reward` loads one by name.

    imagereward   ImageReward-v1.0, trained on people's choices (Xu et al. 2023, arXiv:2304.05977)
    siglip        the similarity of picture and prompt in the checkpoint's own SigLIP
    pickscore     PickScore-v1, trained on people's choices (Kirstain et al. 2023, arXiv:2305.01569)

Higher is better. Scores of one reward compare pictures of one prompt; each reward has its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from scale_rae.errors import InputError, ScaleRAEError, counted
from scale_rae.images import Picture

if TYPE_CHECKING:
    from scale_rae.rewards.parts import Host

__all__ = ["DEFAULT_REWARD", "REWARDS", "Reward", "default_reward", "load_reward", "scores_of", "scores_of_each"]

DEFAULT_REWARD = "imagereward"


class Reward(Protocol):
    """The interface of a reward model."""

    @property
    def name(self) -> str:
        """One of `REWARDS`."""

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest score that a picture can have."""

    @property
    def operations(self) -> float:
        """Floating-point operations of scoring one picture, without its text: what an early look costs."""

    def identity(self) -> dict[str, Any]:
        """{"name"}, and for each part {"name", "revision"} or {"name", "files": {file: SHA-256}}."""

    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        """One score per picture, higher if it shows the prompt better; pictures may differ in size."""


def scores_of(reward: Reward, pictures: Sequence[Picture], prompt: str) -> list[float]:
    """The scores of pictures for one prompt.

    Raises:
        ScaleRAEError: when the reward gives another number of scores.
    """
    scores = [float(value) for value in reward.score(pictures, prompt)]
    if len(scores) != len(pictures):
        raise ScaleRAEError(f"the reward gave {counted(len(scores), 'score')} for {counted(len(pictures), 'image')}")
    return scores


def scores_of_each(reward: Reward, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
    """The score of each picture for its own prompt; consecutive pictures of one prompt are scored at once.

    Raises:
        ScaleRAEError: as `scores_of`.
    """
    scores: list[float] = []
    for prompt, run in groupby(prompts):
        stop = len(scores) + sum(1 for _ in run)
        scores += scores_of(reward, pictures[len(scores) : stop], prompt)
    return scores


def default_reward(model: Host) -> str:
    """The reward that ranks pictures where none is chosen: the model's own, else DEFAULT_REWARD.

    A model brings `siglip` when the encoder in its own folder has a text tower, as the bundled model's has. An encoder from
    elsewhere does not count: published checkpoints share one that was made without them.
    """
    from scale_rae.rewards.siglip import why_unusable

    _ = model.encoder  # finds its source
    encoder = model.encoder_source
    if encoder is None or model.source.folder not in encoder.folder.parents:
        return DEFAULT_REWARD
    return DEFAULT_REWARD if why_unusable(model) is not None else "siglip"


def load_reward(name: str, model: Host, path: str | None = None) -> Reward:
    """The reward called `name`, on the model's device and in its dtype.

    `path` is a folder with the reward's weights, instead of those found by their hub id inside the model's folder,
    beside it, or on the hub.

    Raises:
        InputError: for an unknown name, listing those there are.
        ConfigError, CheckpointError, HubError: naming the file and what is wrong with it, or where missing weights come
            from and what to use instead.
        DeviceError: out of GPU memory.
    """
    if name not in REWARDS:
        said = "stands for no reward; there is nothing to load" if name == "none" else "no such reward"
        raise InputError(f"reward {name!r}: {said}; use one of {', '.join(REWARDS)}, or none")
    with model.memory_errors(f"loading the reward {name}", "--reward none"):
        return REWARDS[name](model, path)


def _imagereward(model: Host, path: str | None) -> Reward:
    from scale_rae.rewards.imagereward import ImageReward

    return ImageReward(model, path)


def _siglip(model: Host, path: str | None) -> Reward:
    from scale_rae.rewards.siglip import SiglipReward

    if path is not None:
        raise InputError(f"reward path {path}: the reward siglip is the checkpoint's own encoder and takes no path")
    return SiglipReward(model)


def _pickscore(model: Host, path: str | None) -> Reward:
    from scale_rae.rewards.pickscore import PickScore

    return PickScore(model, path)


# Functions, so that each reward's part of transformers is imported only when that reward loads.
REWARDS: dict[str, Callable[[Host, str | None], Reward]] = {
    "imagereward": _imagereward,
    "siglip": _siglip,
    "pickscore": _pickscore,
}
"""The names that `load_reward` knows, as in `options.REWARDS`, and what loads them."""
