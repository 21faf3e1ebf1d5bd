"""Adds a reward's scores to an experiment, as if it had been drawn with that reward.

Scores are collected in .work/scoring first, a file per prompt, so that a run can be killed and started again while the
experiment stays as it is. Once every prompt is scored, the records get the scores: batch records, metadata.jsonl, and
experiment.json last. A run that is killed there leaves each file as it was or as it will be, and the next start goes on.

    .work/scoring/reward.json    the reward's identity: what is being added here
    .work/scoring/00000.json     a prompt's scores, and the reward and the SHA-256 of the images that they belong to
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from scale_rae.errors import InputError, OutputError
from scale_rae.files import read_bytes, sha256
from scale_rae.jsonio import MOST_BYTES, dump_json, json_bytes
from scale_rae.opening import find_model, silence_libraries
from scale_rae.options import ModelChoice, from_record
from scale_rae.promptfile import PromptRecord
from scale_rae.provenance import differences, reward_differs
from scale_rae.scaling import worker
from scale_rae.scaling.events import ImagesDrawn, Listener, Message, Planned, PromptFinished, WorkerLoaded
from scale_rae.scaling.experiment import check_finite, prompt_record
from scale_rae.scaling.reader import Prompt, local_folder, read_experiment, read_object
from scale_rae.scaling.records import Batch, seal, unseal
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store

if TYPE_CHECKING:
    import torch

    from scale_rae.encoder import Encoder
    from scale_rae.hub import Source
    from scale_rae.memory import MemoryErrors
    from scale_rae.rewards import Reward

# Of metadata.jsonl: what comes from the reward.
_FIELDS = ("reward", "all_ir_scores", "top_ir_scores", "top_ir_indices")


@dataclass(frozen=True)
class ScoreOptions:
    """How an experiment is scored.

    What is None is as the experiment was drawn; `device` None is the best there is.
    """

    reward: str
    reward_path: str | None = None
    model_path: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None


@dataclass
class ScoringSummary:
    """How a run ended.

    `scored` images were scored in this run; `incomplete` has the prompts without scores, and why.
    """

    folder: Path
    reward: dict[str, Any]  # its identity
    prompts: int
    images: int
    scored: int = 0
    incomplete: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Images:
    """A prompt's images in the batches they are scored in, and their SHA-256 by name."""

    index: int
    text: str
    batches: list[list[Path]]
    files: dict[str, str]
    yes: int = 0  # images that the model says yes to


class EncoderOnly:
    """What rewards use of a `ScaleRAE` (`rewards.parts.Host`); only the encoder is loaded."""

    def __init__(self, choice: ModelChoice) -> None:
        """Finds the model's files; the encoder loads when a reward first uses it.

        Raises:
            OptionError, ConfigError, CheckpointError, HubError, DeviceError: as `ScaleRAE.from_pretrained`.
        """
        source = find_model(choice)
        from scale_rae.config import load_config
        from scale_rae.memory import pick_device, pick_dtype
        from scale_rae.residency import Residency

        self.source, self.config = source, load_config(source.config_folder)
        self.device = pick_device(choice.device)
        self.dtype = pick_dtype(choice.dtype, self.device)
        self.residency = Residency("none", self.device)
        self.encoder_source: Source | None = None
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """The model's own encoder."""
        if self._encoder is None:
            from scale_rae.hub import find
            from scale_rae.loading import load_encoder

            self.encoder_source = find(self.config.encoder_name, "encoder", self.source.folder)
            self._encoder = load_encoder(self.encoder_source, self.config, self.dtype, self.device)
        return self._encoder

    def memory_errors(self, what: str, remedy: str = "fewer at once") -> MemoryErrors:
        """As `ScaleRAE.memory_errors`."""
        from scale_rae.memory import MemoryErrors

        return MemoryErrors(self.device, self.dtype, what, remedy)


class _Recorded:
    """An experiment with experiment.json: its images are scored in the batches they were drawn in."""

    def __init__(self, store: Store, recorded: dict[str, Any], options: ScoreOptions) -> None:
        self.path, self.recorded = store.folder / "experiment.json", recorded
        values = recorded.get("settings")
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: has no settings, so it is not known what drew the images")
        if values.get("search") == "adaptive":
            raise InputError(
                f"{store.folder}: was searched adaptively, by the verdicts it has; another reward would have searched "
                "otherwise. Draw it with that reward, or with --search best-of-n"
            )
        try:
            self.settings = from_record(Settings, {**values, "reward": None, "reward_path": None})
        except (TypeError, ValueError) as e:
            raise InputError(f"{self.path}: settings cannot be used ({e})") from e
        self.reward = values.get("reward")
        self.device = recorded.get("device")
        self._unscored = store.with_settings(self.settings)
        scored = dataclasses.replace(self.settings, reward=options.reward, reward_path=options.reward_path)
        self._scored = store.with_settings(scored)

    def choice(self, options: ScoreOptions) -> ModelChoice:
        """The model that drew the images, as far as `options` name no other."""
        return ModelChoice(
            options.model_path or self.settings.model_path,
            revision=options.revision if options.model_path else options.revision or self.settings.revision,
            device=options.device,
            dtype=options.dtype or self.settings.dtype,
        )

    def check_reward(self, identity: dict[str, Any]) -> None:
        """Raises InputError when the reward is the encoder of another model than the images'."""
        if identity["name"] == "siglip" and (found := differences(self.recorded, {"encoder": identity["weights"]})):
            raise InputError(
                f"{self._unscored.folder}: was drawn with another model: {'; '.join(found)}; name that model with --model-path"
            )

    def look(self, scored_already: Callable[[_Images], bool]) -> Iterator[tuple[str, _Images | str]]:
        """Each prompt folder's name and images, or why the prompt cannot be scored."""
        for folder in sorted(p for p in self._unscored.folder.iterdir() if p.name.isdecimal() and p.is_dir()):
            try:
                metadata = read_object(folder / "metadata.jsonl", "metadata.jsonl")
                prompt = _prompt_of(metadata, int(folder.name))
            except FileNotFoundError:
                yield folder.name, "is not finished"
                continue
            except ValueError as e:
                yield folder.name, f"metadata.jsonl {e}"
                continue
            batches = self._batches(prompt.index)
            images = _Images(
                prompt.index,
                prompt.prompt,
                [[self._sample(prompt.index, i) for i in batch.samples] for batch in batches],
                {name: digest for batch in batches for name, digest in batch.files.items()},
                sum(entry["answer"] == "yes" for batch in batches for entry in batch.judged),
            )
            if not scored_already(images):  # whose records may have scores, after a kill
                finished, problems = self._unscored.check(prompt)
                if not finished:
                    yield folder.name, "; ".join(problems) or "is not finished"
                    continue
            yield folder.name, images

    def _sample(self, index: int, i: int) -> Path:
        return self._unscored.prompt_folder(index) / "samples" / f"{i:05}.png"

    def _batches(self, index: int) -> list[Batch]:
        """A prompt's batches, those whose record has scores already and those without."""
        return sorted(self._unscored.batches(index)[0] + self._scored.batches(index)[0], key=lambda batch: batch.start)

    def add(self, images: _Images, rewards: list[float]) -> None:
        """Writes a prompt's scores into its batch records and its metadata.jsonl."""
        path = self._unscored.prompt_folder(images.index) / "metadata.jsonl"
        prompt = _prompt_of(read_object(path, "metadata.jsonl"), images.index)
        if self._scored.check(prompt)[0]:
            return
        for batch in self._batches(images.index):
            if batch.rewards is None:
                some = rewards[batch.start : batch.samples.stop]
                self._scored.save_batch(images.index, dataclasses.replace(batch, rewards=some), {})
        self._scored.finish(prompt)

    def finish(self, identity: dict[str, Any]) -> None:
        """Writes the reward into experiment.json, unless a run was killed after it had."""
        if self.reward is not None:
            self._scored.keep_copy(self.recorded)
            return
        settings = self.recorded["settings"]
        chosen = self._scored.settings
        settings |= {"reward": chosen.reward, "reward_path": chosen.reward_path}
        value = {**self.recorded, "settings": settings, "reward": {"name": chosen.reward, **identity}}
        self._scored.replace_experiment(json.loads(dump_json(value)))


class _Unrecorded:
    """A folder without experiment.json, as the official code leaves it: the scores go into metadata.jsonl."""

    device = None

    def __init__(self, store: Store, options: ScoreOptions) -> None:
        self._store, self._options = store, options
        self._experiment = read_experiment(store.folder)
        with_scores = [p.metadata for p in self._experiment.prompts if p.metadata.get("all_ir_scores") is not None]
        self.reward = str(with_scores[0].get("reward") or "a reward") if with_scores else None
        self._prompts = {int(p.name): p for p in self._experiment.prompts}

    def choice(self, options: ScoreOptions) -> ModelChoice:
        """The model that is named, else the one that the records name."""
        recorded = next((p.metadata.get("model_path") for p in self._experiment.prompts), None)
        name = options.model_path or (recorded if isinstance(recorded, str) else None)
        if name is None:
            raise InputError(
                f"{self._store.folder}: has no experiment.json, and no metadata.jsonl names a model_path; name the model "
                "with --model-path"
            )
        return ModelChoice(name, revision=options.revision, device=options.device, dtype=options.dtype)

    def check_reward(self, identity: dict[str, Any]) -> None:
        """Does nothing: what drew the images is not recorded."""

    def look(self, scored_already: Callable[[_Images], bool]) -> Iterator[tuple[str, _Images | str]]:
        """Each prompt folder's name and images, or why the prompt cannot be scored."""
        for prompt in self._experiment.prompts:
            files = {path.name: sha256(path) for path in prompt.images}
            yes = sum(prompt.answer(i) == "yes" for i in range(len(prompt.images)))
            yield prompt.name, _Images(int(prompt.name), prompt.text, [prompt.images], files, yes)
        for incomplete in self._experiment.incomplete:
            yield incomplete.folder.name, incomplete.reason

    def add(self, images: _Images, rewards: list[float]) -> None:
        """Writes a prompt's scores into its metadata.jsonl; the other fields stay."""
        prompt = self._prompts[images.index]
        value = {**prompt.metadata, **_reward_fields(prompt, self._options.reward, rewards)}
        self._store.write(prompt.file, json_bytes(value) + b"\n")

    def finish(self, identity: dict[str, Any]) -> None:
        """Does nothing: there is no experiment.json."""


_Target: TypeAlias = _Recorded | _Unrecorded


def score_experiment(folder: Path, options: ScoreOptions, listen: Listener = lambda event: None) -> ScoringSummary:
    """Scores an experiment's images with a reward and writes the scores into its records.

    A complete prompt's records are then what drawing with the reward would have written. Prompts that are not complete
    stay as they are; `scale t2i` goes on with them, with the reward. Images are scored in the batches they were drawn in,
    on a CPU one at a time, unless `options.batch_size` says otherwise.

    Raises:
        InputError: when the folder is no experiment, has a reward already, or was searched adaptively; when the reward
            cannot be used, or is not the one that a killed run was adding.
        OutputError: when another run has the folder, or something cannot be written; what is scored is kept.
        ScaleRAEError: when the reward cannot be loaded.
    """
    start = time.perf_counter()
    folder = local_folder(folder)
    store = Store(folder, Settings("", ""), "score")
    _check_folder(store)
    with contextlib.closing(store.lock_run()):
        target = _target(store, options, listen)
        scores = _Scores(store)
        begun = scores.begun()
        _check_begun(target, begun, options, folder)
        host, reward = _load(target, options)
        identity = json.loads(dump_json(reward.identity()))
        target.check_reward(identity)
        if begun is not None and reward_differs(begun, identity):
            raise InputError(
                f"{folder}: a run that was stopped is adding {options.reward} from other files; give those"
            )
        device = host.device.type
        if target.device not in (None, device):
            listen(Message(f"note: drawn on {target.device}, scored on {device}: rounding may differ"))
        scores.begin(identity)
        listen(WorkerLoaded(0, str(host.device)))
        done, todo, incomplete = _looked(target, scores)
        complete = [*done, *todo]
        if not complete:
            scores.clear()
            raise InputError(f"{folder}: no prompt is complete; {_first(incomplete)}")
        images = sum(len(prompt.files) for prompt in complete)
        summary = ScoringSummary(folder, identity, len(complete), images, incomplete=incomplete)
        listen(Planned(len(todo), len(done), max(len(prompt.files) for prompt in complete), 1))
        with _threads(host.device) as pool:
            for prompt in todo:
                scores.write(prompt, _rewards(prompt, reward, pool, options.batch_size, listen))
                count = len(prompt.files)
                summary.scored += count
                listen(PromptFinished(prompt.index, prompt.text, count, prompt.yes, count))
        for prompt in complete:
            rewards = scores.read(prompt)
            if rewards is None:
                raise OutputError(f"{folder}: changed while it was scored; start again: what is scored is kept")
            target.add(prompt, rewards)
        target.finish(identity)
        scores.clear()
    summary.seconds = time.perf_counter() - start
    return summary


def _check_begun(target: _Target, begun: dict[str, Any] | None, options: ScoreOptions, folder: Path) -> None:
    """Raises InputError where there are scores, or a stopped run was adding another reward's."""
    if target.reward is not None and begun is None:
        raise InputError(
            f"{folder}: has the scores of {target.reward} already, which stay as they are; rank by them with "
            "`scale-rae select DIR --metric image_reward`"
        )
    if begun is not None and begun.get("name") != options.reward:
        raise InputError(
            f"{folder}: a run that was stopped is adding the reward {begun.get('name')}; let it finish with --reward "
            f"{begun.get('name')}"
        )


def _looked(target: _Target, scores: _Scores) -> tuple[list[_Images], list[_Images], dict[str, str]]:
    """(prompts with scores, prompts without, why other prompts cannot be scored)."""
    done: list[_Images] = []
    todo: list[_Images] = []
    incomplete: dict[str, str] = {}
    for name, images in target.look(lambda images: scores.read(images) is not None):
        if isinstance(images, str):
            incomplete[name] = images
        else:
            (todo if scores.read(images) is None else done).append(images)
    return done, todo, incomplete


def _check_folder(store: Store) -> None:
    """Raises InputError for what is no experiment, before anything is made in it."""
    folder = store.folder
    if not (folder / "experiment.json").exists():
        read_experiment(folder)
        if any((folder / ".work" / "batches").glob("*/*.json")):
            store.read_experiment()  # raises, since experiment.json is missing


def _target(store: Store, options: ScoreOptions, listen: Listener) -> _Target:
    """What is scored, an experiment.json that is damaged having been restored."""
    if not (store.folder / "experiment.json").exists():
        return _Unrecorded(store, options)
    if problem := store.restore_experiment():
        listen(Message(problem))
    recorded = store.read_experiment()
    if recorded is None:
        raise InputError(f"{store.folder}: has no results yet")
    return _Recorded(store, recorded, options)


def _load(target: _Target, options: ScoreOptions) -> tuple[EncoderOnly, Reward]:
    """The reward, and the model whose encoder it may use."""
    choice = target.choice(options)
    silence_libraries()
    host = EncoderOnly(choice)
    from scale_rae.rewards import load_reward

    return host, load_reward(options.reward, host, options.reward_path)


class _Scores:
    """The files of .work/scoring."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.folder / ".work" / "scoring"
        self._identity: dict[str, Any] = {}

    def begun(self) -> dict[str, Any] | None:
        """The identity of the reward that a run which did not end was adding; None when there is none."""
        return self._read("reward.json")

    def begin(self, identity: dict[str, Any]) -> None:
        """Notes which reward is being added: from now on, scores of another one do not count."""
        self._identity = identity
        if self.begun() is None:
            self._store.write(self._folder / "reward.json", seal(identity))

    def read(self, images: _Images) -> list[float] | None:
        """A prompt's scores by the reward that is being added; None if there are none of these images."""
        value = self._read(f"{images.index:05}.json")
        if value is None or value.get("files") != images.files or not images.files:
            return None
        return None if reward_differs(value.get("reward"), self._identity) else cast("list[float]", value["rewards"])

    def write(self, images: _Images, rewards: list[float]) -> None:
        """Keeps a prompt's scores."""
        path = self._folder / f"{images.index:05}.json"
        self._store.write(path, seal({"reward": self._identity, "rewards": rewards, "files": images.files}))

    def clear(self) -> None:
        """Removes the files, the note on the reward first.

        Without the note, no later start goes on with this run, some of whose scores are gone.
        """
        names = sorted(self._folder.glob("*.json"), key=lambda path: path.name != "reward.json")
        with contextlib.suppress(OSError):  # scores that are left do no harm
            for path in names:
                path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        try:
            return unseal(read_bytes(path, MOST_BYTES, "file"))
        except (InputError, ValueError):  # missing, or damaged: scored again
            return None


@contextlib.contextmanager
def _threads(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """For a `with`: the threads that score one image each, on a CPU; None on other devices."""
    if not worker.draws_on_threads(device):
        yield None
        return
    import torch

    from scale_rae.cpu import one_thread

    with (
        one_thread() as threads,
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool


def _rewards(
    images: _Images, reward: Reward, pool: ThreadPoolExecutor | None, batch_size: int | None, listen: Listener
) -> list[float]:
    """The rewards of a prompt's images, in the batches that drawing scores them in.

    Raises:
        InputError: when a reward is not finite.
    """
    parts = []
    for batch in images.batches:
        size = batch_size or (len(batch) if pool is None else 1)
        parts += [batch[i : i + size] for i in range(0, len(batch), size)]
    rewards: list[float] = []
    for found in (map if pool is None else pool.map)(partial(_rewards_of, reward, images.text), parts):
        rewards += found
        listen(ImagesDrawn(len(found)))
    return rewards


def _rewards_of(reward: Reward, text: str, paths: Sequence[Path]) -> list[float]:
    """The rewards of some images, scored together."""
    from scale_rae.images import load_image
    from scale_rae.rewards import scores_of

    rewards = scores_of(reward, [load_image(path) for path in paths], text)
    check_finite([], rewards)
    return rewards


def _prompt_of(metadata: dict[str, Any], index: int) -> PromptRecord:
    """The prompt whose metadata.jsonl it is: `prompt_record` backwards.

    Raises:
        ValueError: when it is no prompt's record.
    """
    text = metadata.get("prompt")
    if not isinstance(text, str):
        raise ValueError("has no prompt")
    own = prompt_record(Settings("", ""), PromptRecord(0, "", 0), "", [], [], None).keys()
    clashing = metadata.get("prompt_fields")
    if not (isinstance(clashing, dict) and clashing and clashing.keys() <= own):
        clashing = None  # a field of the prompt file
    extra = {}
    for name, value in metadata.items():
        if clashing and name in clashing:
            extra[name] = clashing[name]
        elif name not in own and not (clashing and name == "prompt_fields"):
            extra[name] = value
    return PromptRecord(0, text, index, extra)


def _reward_fields(prompt: Prompt, reward: str, rewards: list[float]) -> dict[str, Any]:
    """What a reward adds to metadata.jsonl."""
    keep = prompt.metadata.get("n_samples")
    settings = Settings("", "", n_samples=keep if isinstance(keep, int) else len(rewards), reward=reward)
    made = prompt_record(settings, PromptRecord(0, prompt.text, 0), "", [], [], rewards)
    return {name: made[name] for name in _FIELDS}


def _first(incomplete: dict[str, str]) -> str:
    name, reason = next(iter(incomplete.items()), ("it", "has no prompts"))
    return f"{name} {reason}"
