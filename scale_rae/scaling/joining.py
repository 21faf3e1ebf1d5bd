"""Compares a worker's models with the experiment's; the first worker writes experiment.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError
from scale_rae.jsonio import dump_json
from scale_rae.options import AUTO_REWARD
from scale_rae.provenance import differences, reward_differs
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store

if TYPE_CHECKING:
    from scale_rae.opening import OpenedModel
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.rewards import Reward

Say = Callable[[str], None]

CPU_BATCH_SIZE = 8  # images drawn at once on a CPU, where no limit of memory shows in time


def measures_memory(model: ScaleRAE) -> bool:
    """Whether `--batch-size auto` tries out how many images the model's device has memory for."""
    return model.device.type != "cpu"


def with_reward(settings: Settings, model: ScaleRAE, say: Say) -> Settings:
    """The settings with a named reward where it was left open (AUTO_REWARD).

    It is the model's own, else the guide's.
    """
    from scale_rae.rewards import DEFAULT_REWARD, default_reward

    if settings.reward != AUTO_REWARD:
        return settings
    # A path to weights is a path to the guide's: the model's own reward has none.
    name = default_reward(model) if settings.reward_path is None else DEFAULT_REWARD
    if name != DEFAULT_REWARD:
        say(f"reward: {name}, which the model brings (--reward chooses another)")
    return dataclasses.replace(settings, reward=name)


def join_experiment(
    store: Store,
    settings: Settings,
    recorded: dict[str, Any] | None,
    description: Mapping[str, Any],
    opened: OpenedModel,
    reward: Reward | None,
    say: Say,
    measure: Callable[[], int],
) -> int:
    """The experiment's batch size, once this worker's models are known to be the experiment's.

    `recorded` is experiment.json, or None where there was none when this worker started; `description` is its part on settings and
    prompts. The first worker writes experiment.json, and calls `measure` when no batch size is given.

    Raises:
        InputError: when model, reward, device or dtype are not those of the experiment.
    """
    model = opened.model
    recorded = recorded or store.read_experiment()  # another worker may have written it since
    size = settings.batch_size
    if recorded is not None:
        _check_record(store, recorded)
        size = size or recorded["settings"]["batch_size"]
    if size is None:
        size = measure() if measures_memory(model) else CPU_BATCH_SIZE
    now = _with_models(description, settings, size, opened, reward)
    recorded = recorded or store.claim(now)
    _check_record(store, recorded)
    if found := _differences(recorded, now):
        raise InputError(
            f"{store.folder}: this experiment was started differently: {'; '.join(found)}; choose another --output-dir"
        )
    store.keep_copy(recorded)
    for name, version in now["versions"].items():
        then = recorded["versions"].get(name)
        if then not in (None, version):
            say(f"note: {name} {version} here, {then} before: rounding may differ")
    return int(recorded["settings"]["batch_size"])


def _with_models(
    description: Mapping[str, Any], settings: Settings, size: int, opened: OpenedModel, reward: Reward | None
) -> dict[str, Any]:
    """experiment.json of the description and this worker's models, as it is read back from JSON."""
    manifest = opened.record()
    now: dict[str, Any] = {
        **description,
        "settings": {
            **description["settings"],
            "reward": settings.reward,
            "batch_size": size,
            "dtype": manifest["dtype"],
            **({"check_at": settings.adaptive.check_at} if settings.is_adaptive else {}),
        },
        **{part: manifest[part] for part in ("model", "encoder", "decoder", "lora") if part in manifest},
        "reward": {"name": settings.reward, **reward.identity()} if reward is not None else None,
        "device": opened.model.device.type,
        "versions": manifest["versions"],
    }
    return dict(json.loads(dump_json(now)))


def _differences(recorded: Mapping[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the experiment's models and this worker's, one text per difference."""
    # Earlier versions recorded no hashes of adapters; `setting_differences` has compared their names.
    found = differences({"lora": now.get("lora"), **recorded}, now)
    if reward_differs(recorded.get("reward"), now["reward"]):
        found.append("the reward's files")
    if recorded.get("device") != now["device"]:
        found.append(f"device {now['device']} here, {recorded.get('device')} there")
    if recorded["settings"].get("dtype") != now["settings"]["dtype"]:
        found.append(f"dtype {now['settings']['dtype']} here, {recorded['settings'].get('dtype')} there")
    return found


def _check_record(store: Store, recorded: Mapping[str, Any]) -> None:
    """Raises InputError when experiment.json lacks what is needed to go on."""
    settings = recorded.get("settings")
    size = settings.get("batch_size") if isinstance(settings, dict) else None
    if not isinstance(size, int) or size < 1 or not isinstance(recorded.get("versions"), dict):
        raise InputError(
            f"{store.folder / 'experiment.json'}: has no settings.batch_size or no versions; choose another --output-dir"
        )
