"""Which of a prompt's drawings to keep: rank them by a metric, and write the best of them beside the experiment.

An experiment is a folder of prompt folders 00000, 00001, …, each with samples/00000.png … and one JSON object in
metadata.jsonl. `read_experiment` reads one and touches nothing; `select` ranks each prompt's images (ranking.py) and writes
`<dir>_<metric>_verified` and `<dir>_ref`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_rae.errors import InputError, OutputError, first_line
from scale_rae.files import check_file, check_name, exchange, read_bytes
from scale_rae.jsonio import MOST_BYTES, dump_json, parse_json
from scale_rae.ranking import Ranking, Verdicts, metric_as_given, metric_named, rank

_TOOL = "scale-rae select"
_SELECTION = "selection.json"


@dataclass(frozen=True)
class Prompt:
    """A complete prompt folder: its metadata, and its images in the order they were drawn."""

    folder: Path
    metadata: dict[str, Any]
    images: list[Path]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def text(self) -> str:
        return str(self.metadata["prompt"])

    @property
    def file(self) -> Path:
        return self.folder / "metadata.jsonl"

    @property
    def verdicts(self) -> Verdicts:
        """What the model and the reward said of the images."""
        return Verdicts.of(self.metadata, len(self.images), f"{self.file}: ")

    def answer(self, image: int) -> str | None:
        """yes, no or uncertain; None when the model was not asked about the image."""
        return self.verdicts.answer(image)

    def seed(self, image: int) -> Any:
        """The seed of an image's noise, None when it is not known."""
        seeds = self.metadata.get("image_seeds")
        return seeds[image] if isinstance(seeds, list) and image < len(seeds) else None


@dataclass(frozen=True)
class Incomplete:
    """A prompt folder that cannot be chosen from, and why."""

    folder: Path
    reason: str
    text: str | None = None  # the prompt, where it is known


@dataclass(frozen=True)
class Experiment:
    """Everything below an experiment's folder. `n_samples` is None where experiment.json is missing or has none."""

    folder: Path
    n_samples: int | None
    prompts: list[Prompt]
    incomplete: list[Incomplete] = field(default_factory=list)
    not_begun: int = 0  # prompts that experiment.json counts and that have no folder

    def keep_of(self, prompt: Prompt, keep: int | None = None) -> int:
        """How many of a prompt's images to keep: `keep`, else the experiment's n_samples; never more than it has.

        Folders of the official code have no n_samples; their top_ir_indices are as long.

        Raises:
            InputError: when nothing says how many.
        """
        value: Any = keep if keep is not None else self.n_samples
        if value is None:
            value = prompt.metadata.get("n_samples")
        if value is None and isinstance(prompt.metadata.get("top_ir_indices"), list):
            value = len(prompt.metadata["top_ir_indices"]) or None
        if value is None:
            raise InputError(f"{prompt.file}: has no n_samples, nor has experiment.json; say how many with --keep N")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{prompt.file}: n_samples is {value!r}, not a number of images")
        return min(value, len(prompt.images))


def read_experiment(folder: Path) -> Experiment:
    """Reads an experiment's folder; prompts that are not whole are set apart with the reason.

    Raises:
        InputError: when it is no experiment, or experiment.json is damaged.
    """
    check_name(folder, "experiment")
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - a name for `.`, without following links
    advice = "give one that `scale t2i` made"
    try:
        kind = _mended(folder).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{folder}: no such folder; {advice}") from e
    except OSError as e:  # no permission, or a name that no file system takes
        raise InputError(f"{_short(str(folder))}: cannot be read ({e.strerror}); {advice}") from e
    if not stat.S_ISDIR(kind):
        raise InputError(f"{folder}: is not a folder; {advice}")
    try:
        names = sorted((p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), key=_by_number)
        if not names:
            inner = sorted(p.parent for p in folder.glob("*/[0-9]*") if p.name.isdecimal() and p.is_dir())
            inner += sorted(p.parent for p in folder.glob("*/*/[0-9]*") if p.name.isdecimal() and p.is_dir())
            hint = f"; did you mean {inner[0]}?" if inner else ""
            raise InputError(f"{folder}: not an experiment, since it has no folders 00000, 00001, …{hint}")
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror})") from e
    prompts: list[Prompt] = []
    incomplete: list[Incomplete] = []
    for name in names:
        result = _read_prompt(name)
        if isinstance(result, Prompt):
            prompts.append(result)
        else:
            incomplete.append(result)
    n_samples, count = _settings(folder / "experiment.json")
    return Experiment(folder, n_samples, prompts, incomplete, max(0, count - len(names)))


def _mended(folder: Path) -> Path:
    """The folder; where a selection was killed on its way to replace it, what was there before is put back."""
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder) and os.path.lexists(_old(folder)):
            with _alone_in(folder.parent):  # one that is not dead puts its folder there by itself
                _recover(folder)
    return folder


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:60]}…{name[-30:]}"


def _by_number(path: Path) -> tuple[int, str]:
    return int(path.name), path.name


def _settings(path: Path) -> tuple[int | None, int]:
    """n_samples, None when there is none, and the number of prompts, 0 when it is not known."""
    try:
        value = _read_object(path, "experiment.json")
    except FileNotFoundError:
        return None, 0
    except ValueError as e:
        if path.is_file() and not path.stat().st_size:  # left by a crash; each prompt's record says what is needed
            return None, 0
        raise InputError(f"{path}: {e}") from e
    settings = value.get("settings")
    n_samples = settings.get("n_samples") if isinstance(settings, dict) else None
    prompts = value.get("prompts")
    count = prompts.get("count") if isinstance(prompts, dict) else None
    if not isinstance(count, int):
        count = 0
    if n_samples is None:
        return None, count
    if not isinstance(n_samples, int) or isinstance(n_samples, bool) or n_samples < 1:
        raise InputError(f"{path}: settings.n_samples is {n_samples!r}, not a number of images")
    return n_samples, count


def _read_object(path: Path, what: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: saying what is wrong with it, without its name.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    try:
        value = parse_json(read_bytes(path, most, what))
    except InputError as e:
        raise ValueError(str(e).removeprefix(f"{path}: ")) from e
    except ValueError as e:
        raise ValueError(f"is not valid JSON ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def _read_prompt(folder: Path) -> Prompt | Incomplete:
    file, error_file = folder / "metadata.jsonl", folder / "error.json"
    try:
        metadata = _read_object(file, "metadata.jsonl")
    except FileNotFoundError:
        if os.path.lexists(error_file):  # beside a result it is left over from an earlier run
            return Incomplete(folder, *_read_error(error_file))
        return Incomplete(folder, "has no metadata.jsonl")
    except ValueError as e:
        return Incomplete(folder, f"metadata.jsonl {e}")
    text = metadata.get("prompt")
    if not isinstance(text, str):
        return Incomplete(folder, "metadata.jsonl has no prompt")
    samples = folder / "samples"
    try:
        found = {
            int(m[1]): p for p in samples.iterdir() if (m := re.fullmatch(r"([0-9]+)\.png", p.name)) and len(m[1]) >= 5
        }
    except OSError:
        return Incomplete(folder, "has no samples folder", text)
    count = _expected_images(metadata)
    if count is None:
        count = max(found, default=-1) + 1
    if not count:
        return Incomplete(folder, "has no images", text)
    missing = [f"{i:05}.png" for i in range(count) if i not in found]
    if missing:
        return Incomplete(folder, f"samples lacks {_some(missing)}", text)
    if len(found) > count:
        return Incomplete(folder, f"samples holds {len(found)} images, metadata.jsonl tells of {count}", text)
    images = [found[i] for i in range(count)]
    for image in images:
        if reason := _unreadable(image):
            return Incomplete(folder, f"samples/{image.name} {reason}", text)
    return Prompt(folder, metadata, images)


def _read_error(path: Path) -> tuple[str, str | None]:
    try:
        value = _read_object(path, "error.json")
    except (OSError, ValueError):
        return "failed (error.json)", None
    message = next((value[key] for key in ("error", "message", "reason") if isinstance(value.get(key), str)), None)
    prompt = value.get("prompt")
    reason = f"failed: {' '.join(message.split())}" if message else "failed (error.json)"
    return reason, prompt if isinstance(prompt, str) else None


def _expected_images(metadata: dict[str, Any]) -> int | None:
    """How many images the metadata tells of; None when it does not say."""
    for name in ("original_indices", "image_seeds"):
        if isinstance(metadata.get(name), list):
            return len(metadata[name])
    n_samples, rounds = metadata.get("n_samples"), metadata.get("scaling_rounds")
    if isinstance(n_samples, int) and isinstance(rounds, int):
        return n_samples * rounds
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _unreadable(path: Path) -> str | None:
    from PIL import Image

    try:
        check_file(path, "image")  # opening a pipe would wait for ever
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
    except OSError as e:
        return f"cannot be read ({e.strerror})" if e.strerror else "is damaged or not an image"
    except Exception:  # Pillow's decoders raise SyntaxError, ValueError, struct.error, DecompressionBombError, …
        return "is damaged or not an image"
    return None


@dataclass(frozen=True)
class Selection:
    """What was kept of one prompt; `kept` and `ref` are numbers of images as they were drawn."""

    prompt: Prompt
    ranking: Ranking
    kept: list[int]
    ref: list[int]  # the first as many, unselected

    def answers(self) -> list[str | None]:
        return [self.prompt.answer(i) for i in range(len(self.prompt.images))]


def choose(experiment: Experiment, metric: str, keep: int | None, reward_weight: float) -> list[Selection]:
    """Ranks every complete prompt and takes the best of each.

    Raises:
        InputError: when there is no complete prompt, or one lacks what the metric needs.
    """
    if not experiment.prompts:
        first = experiment.incomplete[0]
        raise InputError(
            f"{experiment.folder}: no prompt is complete; {first.folder.name} {first.reason}"
            + (f", and {len(experiment.incomplete) - 1} more" if len(experiment.incomplete) > 1 else "")
        )
    selections = []
    for prompt in experiment.prompts:
        n = experiment.keep_of(prompt, keep)
        ranking = rank(prompt.verdicts, metric, reward_weight, at_least=n)
        selections.append(Selection(prompt, ranking, ranking.order[:n], list(range(n))))
    return selections


def yes_share(selections: Sequence[Selection], images: Callable[[Selection], Sequence[int]]) -> tuple[int, int]:
    """How many of the images the model says yes to, and how many of them it was asked about."""
    answers = [selection.prompt.answer(i) for selection in selections for i in images(selection)]
    return answers.count("yes"), len(answers) - answers.count(None)


def select(
    folder: Path, metric: str = "combined", keep: int | None = None, reward_weight: float = 0.5
) -> tuple[Experiment, list[Selection], dict[str, Any]]:
    """Keeps the best images of each prompt, in `<folder>_<metric>_verified`; the first as many go to `<folder>_ref`.

    The folder is named by the metric as it was given: `loss` and `prompt_loss` rank alike and have folders of their own.

    Both hold prompt folders as the experiment does, images renumbered (best first), and in metadata.jsonl
    "original_indices" beside all that was there, renumbered too; selection.json tells how they were chosen. Folders
    that are there from an earlier selection are replaced whole. The experiment's own folder is only read.

    The two ratios in selection.json are the shares of images that the model itself says yes to: of the kept, and of
    the unselected reference; of every image drawn there is a third.

    Raises:
        InputError: when the folder is no experiment or lacks what the metric needs.
        OutputError: when a result cannot be written, or would replace what this tool did not write.
    """
    named, metric = metric_as_given(metric), metric_named(metric)
    experiment = read_experiment(folder)
    selections = choose(experiment, metric, keep, reward_weight)
    source = experiment.folder
    record: dict[str, Any] = {
        "tool": _TOOL,
        "source": str(source),
        "metric": metric,
        "reward_weight": reward_weight if metric == "combined" else None,
        "keep": keep if keep is not None else experiment.n_samples,
        "yes_ratios": {
            "kept": _ratio(yes_share(selections, lambda s: s.kept)),
            "ref": _ratio(yes_share(selections, lambda s: s.ref)),
            "all": _ratio(yes_share(selections, lambda s: s.ranking.order)),
        },
        "verified": str(source.with_name(f"{source.name}_{named}_verified")),
        "ref": str(source.with_name(f"{source.name}_ref")),
        "prompts": [
            {
                "folder": s.prompt.name,
                "prompt": s.prompt.text,
                "images": len(s.prompt.images),
                "kept": s.kept,
                "ref": s.ref,
                "order": s.ranking.order,
                "scores": s.ranking.scores,
                "answers": s.answers(),
            }
            for s in selections
        ],
        "incomplete": [{"folder": p.folder.name, "reason": p.reason} for p in experiment.incomplete],
        "not_begun": experiment.not_begun,
    }
    targets: list[tuple[Path, Callable[[Selection], list[int]]]] = [
        (Path(record["verified"]), lambda s: s.kept),
        (Path(record["ref"]), lambda s: s.ref),
    ]
    try:
        with _alone_in(source.parent):
            for target, _ in targets:
                _recover(target)
                _check_ours(target)
            try:
                for target, images in targets:
                    _build(_new(target), selections, images, record | {"holds": _holds(selections, images)})
                for target, _ in targets:
                    _swap(target)
            finally:
                for target, _ in targets:
                    shutil.rmtree(_new(target), ignore_errors=True)
    except OSError as e:
        raise OutputError(
            f"{source.parent}: the selection cannot be written there ({e.strerror or e}); what was there before still is"
        ) from e
    return experiment, selections, record


def _holds(selections: Sequence[Selection], images: Callable[[Selection], list[int]]) -> dict[str, int]:
    return {s.prompt.name: len(images(s)) for s in selections}


def _ratio(count: tuple[int, int]) -> dict[str, Any]:
    yes, asked = count
    return {"yes": yes, "asked": asked, "share": yes / asked if asked else None}


def renumbered(metadata: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """Metadata of a folder that holds only `images`, in that order. What is not about single images stays as it is."""
    result = {name: value for name, value in metadata.items() if name != "original_indices"}
    earlier = metadata.get("original_indices")  # of a selection from a selection
    for name in ("image_seeds", "all_ir_scores"):
        values = metadata.get(name)
        if isinstance(values, list) and all(i < len(values) for i in images):
            result[name] = [values[i] for i in images]
    new = {old: i for i, old in enumerate(images)}
    best, best_scores = metadata.get("top_ir_indices"), metadata.get("top_ir_scores")
    if isinstance(best, list):
        left = [(place, i) for place, i in enumerate(best) if i in new]
        result["top_ir_indices"] = [new[i] for _, i in left]
        if isinstance(best_scores, list) and len(best_scores) == len(best):
            result["top_ir_scores"] = [best_scores[place] for place, _ in left]
    responses = metadata.get("text_responses")
    if isinstance(responses, dict):
        result["text_responses"] = {str(new[i]): responses[str(i)] for i in images if str(i) in responses}
    known = isinstance(earlier, list) and all(i < len(earlier) for i in images)
    result["original_indices"] = [earlier[i] for i in images] if known and earlier else list(images)
    return result


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.scale-rae-new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.scale-rae-old")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other selection writes beside this one; leaves no lock file, and none after a kill."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has neither; its folders are then as safe as its users are careful
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _recover(target: Path) -> None:
    """Undoes what a killed selection left half done."""
    for left in (_new(target), _old(target)):
        if left.is_symlink():
            raise OutputError(f"{left}: is a link, which no selection leaves; remove it")
    shutil.rmtree(_new(target), ignore_errors=True)
    if os.path.lexists(_old(target)):
        if os.path.lexists(target):
            shutil.rmtree(_old(target))
        else:
            _old(target).rename(target)


def _check_ours(target: Path) -> None:
    """Refuses to replace a folder that holds anything this tool did not write."""
    if not os.path.lexists(target):
        return
    advice = "move it away, or rename the experiment's folder"
    try:
        if target.is_symlink():
            raise ValueError
        record = _read_object(target / _SELECTION, _SELECTION, most=1 << 30)
        holds = record["holds"]
        if record.get("tool") != _TOOL:
            raise ValueError
        names = {p.name for p in target.iterdir()} - {_SELECTION}
        strange = [target / n for n in names - holds.keys()]
        for name in names & holds.keys():
            expected = {f"{i:05}.png" for i in range(holds[name])}
            strange += [p for p in (target / name).iterdir() if p.name not in ("samples", "metadata.jsonl")]
            strange += [p for p in (target / name / "samples").iterdir() if p.name not in expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise OutputError(f"{target}: is there and was not written by scale-rae select; {advice}") from e
    if strange:
        raise OutputError(
            f"{min(strange)}: was not written by scale-rae select, which would replace its folder; {advice}"
        )


def _build(
    folder: Path,
    selections: Sequence[Selection],
    images: Callable[[Selection], list[int]],
    record: Mapping[str, Any],
) -> None:
    folder.mkdir()
    for selection in selections:
        prompt, chosen = selection.prompt, images(selection)
        samples = folder / prompt.name / "samples"
        samples.mkdir(parents=True)
        for i, image in enumerate(chosen):
            shutil.copyfile(prompt.images[image], samples / f"{i:05}.png")
        _write_json(folder / prompt.name / "metadata.jsonl", renumbered(prompt.metadata, chosen), None)
    _write_json(folder / _SELECTION, record, 1)


def _write_json(path: Path, value: Mapping[str, Any], indent: int | None) -> None:
    text = dump_json(value, indent=indent)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only JSON's own escapes can carry
        data = json.dumps(value, indent=indent, allow_nan=False).encode()
    path.write_bytes(data + b"\n")


def _swap(target: Path) -> None:
    """Puts the new folder in the place of the old one, which is there until that moment.

    On file systems that cannot exchange two names there is a moment between two renames. A kill just then leaves the old
    folder beside, where `_recover` finds it: by the next selection, or the next that reads the folder.
    """
    if not os.path.lexists(target):
        _new(target).rename(target)
        return
    if exchange(_new(target), target):
        return  # what was old is now called new, and removed with that
    target.rename(_old(target))
    try:
        _new(target).rename(target)
    except OSError:
        _old(target).rename(target)
        raise
    shutil.rmtree(_old(target), ignore_errors=True)


def write_file(path: Path, data: bytes, source: Path) -> None:
    """Writes a report or sheet, whole or not at all, and never into the experiment it is about.

    Raises:
        OutputError: naming the file.
    """
    check_name(path, "output file")
    target = Path(os.path.abspath(path))  # noqa: PTH100
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if source.resolve() in target.resolve().parents:
            raise OutputError(f"{path}: is inside the experiment, which is only read; choose another -o")
        if target.is_dir():
            raise OutputError(f"{path}: is a folder; choose another -o")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staging.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{_short(str(path))}: cannot be written ({e.strerror or e}); choose another -o") from e
