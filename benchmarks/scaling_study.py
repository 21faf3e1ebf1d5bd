"""Does drawing many and choosing help? Held-out prompts of the world of shapes, judged from pixels: JSON, table, plot.

    python benchmarks/scaling_study.py --out runs/scaling                                   # all of it
    python benchmarks/scaling_study.py --out runs/scaling --only draw --device cuda         # needs the model
    python benchmarks/scaling_study.py --results runs/scaling/results.jsonl --only analyse  # needs results.jsonl alone
    … --json docs/scaling.json --markdown docs/scaling-study.md --plot docs/scaling.png --into docs/scaling.md

Drawing runs `scale t2i` (4 x 8 images of each prompt, latent questions, siglip reward), then reads every picture: the judge from
its pixels, the model's questions again in image mode, further rewards whose weights are given. What is known of the images goes
to results.jsonl, a line a prompt. Stopped at any moment, the same command goes on; with more --prompts too.

Analysis asks what would have been kept had only the first 4, 8, 12 or 32 images been drawn, for every metric. Intervals are
95 %, by bootstrap over prompts. Errors removed: 1 - (share of wrong images among the kept) / (among all drawn).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.jsonio import dump_json
from scale_rae.promptfile import PromptRecord, read_prompts
from scale_rae.scaling.experiment import Settings, judgement
from scale_rae.scaling.select import METRICS, Prompt, rank

PER_KIND = 100  # of the prompt file; --prompts takes the first of it, kind after kind
MODES = ("latent", "image")
NEED_REWARD = ("combined", "image_reward")
JUDGE = "the judge itself"  # the most that any choice can do
RESAMPLES = 4000
TEXT = ("question", "reply")  # the same for all images, or told by the answer

Floats = NDArray[np.float64]


# Drawing -------------------------------------------------------------------------------------------------------------


def write_prompts(path: Path) -> None:
    """The held-out prompts, kinds in turn, so that the first N are of all kinds; the same whatever N is."""
    from scale_rae.shapes import world

    lines = world.prompts(PER_KIND, "only", seed=0)
    kinds = [lines[i : i + PER_KIND] for i in range(0, len(lines), PER_KIND)]
    mixed = [line for group in zip(*kinds, strict=True) for line in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(dump_json(line | {"index": i}) + "\n" for i, line in enumerate(mixed)))


def draw(args: argparse.Namespace) -> None:
    """Draws and scores what is missing of the experiment, then reads the pictures of every finished prompt."""
    from scale_rae.cli.progress import Bars, ScalingDisplay
    from scale_rae.scaling.launch import default_devices, run

    if not (args.out / "prompts.jsonl").exists():
        write_prompts(args.out / "prompts.jsonl")
    prompts = read_prompts(args.out / "prompts.jsonl")
    settings = Settings(
        metadata_file=str(args.out / "prompts.jsonl"),
        model_path=args.model_path,
        dtype=args.dtype,
        n_samples=args.n_samples,
        scaling_rounds=args.rounds,
        seed=args.seed,
        guidance_level=args.guidance,
        steps=args.steps,
        solver=args.solver,
        batch_size=args.batch_size,
        reward="siglip",
    )
    devices = args.devices.split(",") if args.devices else default_devices(args.device)
    display, seconds = ScalingDisplay(), args.out / "seconds.jsonl"

    def listen(event: dict[str, Any]) -> None:
        display(event)
        if event["event"] == "prompt" and event["drawn"] == settings.total:  # else it was begun in an earlier run
            with seconds.open("a") as file:
                file.write(json.dumps({"index": event["index"], "seconds": event["seconds"]}) + "\n")

    try:
        outcome = run(settings, prompts, args.out, devices, args.prompts, listen, bars=Bars())
    finally:
        display.stop()
    print(f"{outcome.drawn} images drawn in {outcome.seconds:.0f} s; {len(outcome.failed)} prompts failed", flush=True)
    if outcome.unfinished:
        raise ScaleRAEError(f"{len(outcome.unfinished)} prompts are unfinished; the same command goes on with them")
    experiment = json.loads((outcome.folder / "experiment.json").read_text())
    study = {name: experiment[name] for name in ("settings", "model", "encoder", "decoder", "reward", "versions")}
    study |= {"workers": len(devices), "device": _device_name(devices[0])}
    read_pictures(args, outcome.folder, prompts[: args.prompts], outcome.failed, study)


def _device_name(device: str | None) -> str:
    import platform

    import torch

    from scale_rae.memory import pick_device

    found = pick_device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else f"{found.type} ({platform.machine()})"


def read_pictures(
    args: argparse.Namespace,
    folder: Path,
    prompts: Sequence[PromptRecord],
    failed: dict[int, str],
    study: dict[str, Any],
) -> None:
    """Writes results.jsonl: what the study is, then a line for each prompt; lines that are there stay."""
    first, *rest = _read_lines(args.results) or [{"study": study}]
    if _what_counts(first.get("study", {})) != _what_counts(study):
        raise InputError(f"{args.results}: holds another study's results; choose another --out")
    rest = [line for line in rest if "failed" not in line]  # tried again by now
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text("".join(dump_json(line) + "\n" for line in (first, *rest)))
    known = {line["index"] for line in rest}
    todo = [p for p in prompts if p.index not in known and p.index not in failed]
    with args.results.open("a") as file:
        for line in _read(args, folder, todo) if todo else ():
            file.write(dump_json(line) + "\n")
            file.flush()
        for p in prompts:
            if p.index in failed:
                line = {"index": p.index, "tag": p.extra["tag"], "prompt": p.prompt, "failed": failed[p.index]}
                file.write(dump_json(line) + "\n")


def _what_counts(study: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in study.get("settings", {}).items() if k != "metadata_file"}
    return {"settings": settings} | {part: study.get(part) for part in ("model", "encoder", "decoder")}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one without its end was being written when the study was stopped."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _read(args: argparse.Namespace, folder: Path, prompts: Sequence[PromptRecord]) -> Iterator[dict[str, Any]]:
    import scale_rae
    from scale_rae.images import to_rgb
    from scale_rae.rewards import load_reward

    device = args.devices.split(",")[0] if args.devices else args.device
    model = scale_rae.load(args.model_path, device=device, dtype=args.dtype)
    paths = {"imagereward": args.imagereward, "pickscore": args.pickscore}
    rewards = {name: load_reward(name, model, path) for name, path in paths.items() if path is not None}
    settings = Settings("", args.model_path)
    timed: dict[int, dict[str, float]] = {
        line["index"]: line["seconds"] for line in _read_lines(args.out / "seconds.jsonl")
    }
    places = [folder / f"{p.index:05}" for p in prompts]
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.judges, context) as pool:
        verdicts = pool.map(_judged, places, [p.extra for p in prompts], chunksize=4)
        for done, (prompt, place, verdict) in enumerate(zip(prompts, places, verdicts, strict=True), start=1):
            record = json.loads((place / "metadata.jsonl").read_text())
            pictures = [to_rgb(image) for image in _pictures(place)]
            begun = time.perf_counter()
            latents = model.encode(pictures)
            encoding = time.perf_counter() - begun
            request = settings.request(prompt.prompt)
            scores = model.score(latents, prompt.prompt, request=request)
            line: dict[str, Any] = {
                "index": prompt.index,
                "tag": prompt.extra["tag"],
                "prompt": prompt.prompt,
                "correct": "".join("1" if reason is None else "0" for reason in verdict),
                "reasons": {i: reason for i, reason in enumerate(verdict) if reason is not None},
                "rewards": {"siglip": _short(record["all_ir_scores"])}
                | {name: _short(reward.score(pictures, prompt.prompt)) for name, reward in rewards.items()},
                "latent": _columns([record["text_responses"][str(i)] for i in range(len(pictures))]),
                "image": _columns([judgement(score) for score in scores]),
                "seconds": timed.get(prompt.index, {}) | {"encoding": encoding},
            }
            line["seconds"] = {name: round(value, 4) for name, value in line["seconds"].items()}
            if done % 25 == 0 or done == len(prompts):
                left = (time.perf_counter() - start) / done * (len(prompts) - done)
                print(f"pictures of {done}/{len(prompts)} prompts read, {left:.0f} s left", flush=True)
            yield line


def _pictures(place: Path) -> list[Any]:
    from PIL import Image

    return [Image.open(file) for file in sorted((place / "samples").glob("*.png"))]


def _judged(place: Path, metadata: dict[str, Any]) -> list[str | None]:
    """What is wrong with each picture, None if nothing."""
    from scale_rae.shapes.judge import judge

    verdicts = [judge(image, metadata) for image in _pictures(place)]
    return [None if verdict.correct else verdict.reason for verdict in verdicts]


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in entries[0] if name not in (*TEXT, "answer", "score")]
    answers = "".join({"yes": "y", "no": "n"}.get(entry["answer"], "u") for entry in entries)
    return {"answer": answers} | {name: _short([entry[name] for entry in entries]) for name in names}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


# Analysis ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A way to choose: a metric, on the model's answers of a mode, with a reward if the metric needs one."""

    metric: str
    mode: str = "latent"
    reward: str | None = None

    def __str__(self) -> str:
        return (
            self.metric + (f", {self.reward}" if self.reward else "") + (", image mode" if self.mode == "image" else "")
        )


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "–" if self.value is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def choices(lines: Sequence[dict[str, Any]]) -> list[Choice]:
    """Every metric on every mode and reward that the results hold."""
    rewards = list(next((line["rewards"] for line in lines if "rewards" in line), {}))
    found = []
    for mode in MODES:
        for metric in METRICS:
            if metric == "image_reward" and mode == "image":
                continue  # does not ask the model
            found += [Choice(metric, mode, r) for r in (rewards if metric in NEED_REWARD else [None])]
    return found


def order(line: dict[str, Any], choice: Choice, count: int) -> list[int]:
    """The first `count` images of a prompt as `scale-rae select` would rank them, best first."""
    columns = line[choice.mode]
    words = {"y": "yes", "n": "no", "u": "uncertain"}
    responses = {
        str(i): {name: words[column[i]] if name == "answer" else column[i] for name, column in columns.items()}
        for i in range(count)
    }
    rewards = line["rewards"][choice.reward][:count] if choice.reward else None
    metadata = {"prompt": line["prompt"], "all_ir_scores": rewards, "text_responses": responses}
    return rank(Prompt(Path(f"{line['index']:05}"), metadata, [Path()] * count), choice.metric).order


def kept_correct(lines: Sequence[dict[str, Any]], choice: Choice | None, count: int, keep: int) -> Floats:
    """[P] share of correct images among the `keep` best of each prompt's first `count`; by the judge itself for None."""
    shares = np.zeros(len(lines))
    for p, line in enumerate(lines):
        if "failed" in line:
            continue  # no image, so none that is correct
        right = [mark == "1" for mark in line["correct"][:count]]
        best = sorted(range(count), key=lambda i: not right[i]) if choice is None else order(line, choice, count)
        shares[p] = np.mean([right[i] for i in best[:keep]])
    return shares


def drawn_correct(lines: Sequence[dict[str, Any]], count: int) -> Floats:
    """[P] share of correct images among each prompt's first `count`."""
    return np.array([np.mean([mark == "1" for mark in line.get("correct", "0")[:count]]) for line in lines])


class Bootstrap:
    """Resamples of P prompts, the same for every figure."""

    def __init__(self, prompts: int) -> None:
        rng = np.random.default_rng(0)
        self._weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts  # [B, P]

    def share(self, values: Floats) -> Estimate:
        """Mean of values [P]."""
        return _estimate(float(values.mean()), self._weights @ values)

    def removed(self, kept: Floats, drawn: Floats) -> Estimate:
        """1 - (wrong among the kept) / (wrong among all drawn), of shares [P] that are right."""
        wrong = 1 - drawn.mean()
        if wrong <= 0:
            return Estimate(None, None, None)
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = 1 - (1 - self._weights @ kept) / (1 - self._weights @ drawn)
        return _estimate(float(1 - (1 - kept.mean()) / wrong), resampled[np.isfinite(resampled)])


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _without_folder(part: Any) -> Any:
    """Of a model, or part of one, in a folder of this machine, the folder's own name alone: figures are for others to read."""
    if isinstance(part, dict) and Path(str(part.get("name", ""))).is_absolute():
        return part | {"name": Path(part["name"]).name}
    return part


def analyse(path: Path) -> dict[str, Any]:
    """All figures of a results file.

    Raises:
        InputError: when there is no such file or it holds no results.
    """
    if not path.exists():
        raise InputError(f"{path}: no such results")
    first, *lines = _read_lines(path) or [{}]
    if "study" not in first or not lines:
        raise InputError(f"{path}: holds no results of a scaling study")
    study, settings = first["study"], first["study"]["settings"]
    keep, most = settings["n_samples"], settings["scaling_rounds"]
    bootstrap = Bootstrap(len(lines))
    rounds = {}
    for r in sorted({1, 2, 3, most} - set(range(most + 1, 4))):
        drawn = drawn_correct(lines, keep * r)
        chosen: dict[str, Any] = {}
        for choice in (*choices(lines), None):
            kept = kept_correct(lines, choice, keep * r, keep)
            chosen[str(choice or JUDGE)] = {
                "kept": bootstrap.share(kept).__dict__,
                "errors_removed": bootstrap.removed(kept, drawn).__dict__,
                "first": bootstrap.share(kept_correct(lines, choice, keep * r, 1)).__dict__,
                "kinds": {kind: float(kept[which].mean()) for kind, which in _kinds(lines).items()},
            }
        kinds = {kind: float(drawn[which].mean()) for kind, which in _kinds(lines).items()}
        rounds[f"{keep}x{r}"] = {"drawn": bootstrap.share(drawn).__dict__ | {"kinds": kinds}, "chosen": chosen}
    return {
        "study": {name: _without_folder(part) for name, part in study.items()},
        "prompts": len(lines),
        "images": sum(len(line.get("correct", "")) for line in lines),
        "failed": sum("failed" in line for line in lines),
        "rounds": rounds,
        "prompts_by_correct": alike(lines),
        "answers": {mode: answers(lines, mode) for mode in MODES},
        "seconds": seconds(lines, study["workers"]),
    }


def alike(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many prompts have none, up to half, most, or all of their images correct."""
    shares = [line.get("correct", "0").count("1") / len(line.get("correct", "0")) for line in lines]
    return {
        "none": sum(share == 0 for share in shares),
        "up to half": sum(0 < share <= 0.5 for share in shares),
        "most": sum(0.5 < share < 1 for share in shares),
        "all": sum(share == 1 for share in shares),
    }


def _kinds(lines: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.bool_]]:
    tags = list(dict.fromkeys(line["tag"] for line in lines))
    return {tag: np.array([line["tag"] == tag for line in lines]) for tag in tags}


def answers(lines: Sequence[dict[str, Any]], mode: str) -> dict[str, Any]:
    """How often the model says yes to right and to wrong images, by kind and in all."""
    found: dict[str, Any] = {}
    for kind, which in (*_kinds(lines).items(), ("overall", np.ones(len(lines), bool))):
        pairs = [
            pair
            for line, chosen in zip(lines, which, strict=True)
            if chosen and "failed" not in line
            for pair in zip(line["correct"], line[mode]["answer"], strict=True)
        ]
        right = [answer == "y" for correct, answer in pairs if correct == "1"]
        wrong = [answer == "y" for correct, answer in pairs if correct == "0"]
        found[kind] = {"right": len(right), "yes_to_right": sum(right), "wrong": len(wrong), "yes_to_wrong": sum(wrong)}
    return found


def seconds(lines: Sequence[dict[str, Any]], workers: int) -> dict[str, float]:
    """Seconds a prompt, all images drawn, and of work in each stage: the mean over prompts drawn in one go, over workers."""
    timed = [line["seconds"] for line in lines if "total" in line.get("seconds", {})]
    stages = dict.fromkeys(name for times in timed for name in times)
    found = {stage: float(np.mean([times.get(stage, 0.0) for times in timed])) for stage in stages}
    return {stage: value / (1 if stage == "encoding" else workers) for stage, value in found.items()}


# Showing -------------------------------------------------------------------------------------------------------------


def markdown(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    settings, rounds = figures["study"]["settings"], figures["rounds"]
    names = list(rounds)
    last, reward = names[-1], next(iter(_rewards(figures)))
    lines = [
        f"{figures['prompts']} held-out prompts, {figures['images']} images; guidance {settings['guidance_level']:g}, "
        f"{settings['solver']} {settings['steps']} steps, {settings['dtype']}, seed {settings['seed']}; "
        f"{figures['study']['device']}. Brackets: 95 % intervals, bootstrap over prompts."
        + (f" {figures['failed']} prompts failed and count as wrong." if figures["failed"] else ""),
        "",
        "Prompts by how many of their images are correct: "
        + ", ".join(f"{name} {count}" for name, count in figures["prompts_by_correct"].items())
        + ". No choice can do better than the judge itself, which keeps the correct ones there are.",
        "",
        f"Share of correct images among all drawn, and among the {settings['n_samples']} kept:",
        "",
        *_table_head("", names),
        _row("all drawn", [_text(rounds[n]["drawn"]) for n in names]),
    ]
    labels = list(rounds[last]["chosen"])
    lines += [_row(label, [_text(rounds[n]["chosen"][label]["kept"]) for n in names]) for label in labels]
    lines += [
        "",
        "Share of errors removed (target for combined: 0.40 at 4x2, 0.70 at 4x8):",
        "",
        *_table_head("", names[1:]),
    ]
    lines += [_row(x, [_text(rounds[n]["chosen"][x]["errors_removed"]) for n in names[1:]]) for x in labels]
    lines += ["", "Share of prompts whose first-ranked image is correct:", "", *_table_head("", names)]
    lines += [_row(x, [_text(rounds[n]["chosen"][x]["first"]) for n in names]) for x in labels]
    combined = f"combined, {reward}"
    kinds = list(rounds[last]["drawn"]["kinds"])
    lines += [
        "",
        f"By kind of prompt, all drawn and kept by {combined}:",
        "",
        *_table_head("", ["all drawn", *names[1:]]),
    ]
    for kind in kinds:
        cells = [rounds[last]["drawn"]["kinds"][kind]]
        cells += [rounds[n]["chosen"][combined]["kinds"][kind] for n in names[1:]]
        lines.append(_row(kind, [f"{value:.3f}" for value in cells]))
    lines += ["", "The model's own answer, by what the judge says of the image:", ""]
    lines += _table_head("", [f"{what} ({mode})" for mode in MODES for what in ("yes to right", "yes to wrong")])
    for kind in (*kinds, "overall"):
        cells = []
        for mode in MODES:
            count = figures["answers"][mode][kind]
            cells += [_share(count["yes_to_right"], count["right"]), _share(count["yes_to_wrong"], count["wrong"])]
        lines.append(_row(kind, [str(cell) for cell in cells]))
    lines += ["", *_seconds_table(figures)]
    return "\n".join(lines) + "\n"


def summary(figures: dict[str, Any], links: str = "") -> str:
    """A short table for a page on scaling: what is kept, errors removed in brackets."""
    rounds = figures["rounds"]
    names = list(rounds)
    settings = figures["study"]["settings"]
    rows = [f"combined, {reward}" for reward in _rewards(figures)] + ["answer_conf", "answer_logits"]
    rows += [f"image_reward, {reward}" for reward in _rewards(figures)]
    rows += [f"combined, {reward}, image mode" for reward in _rewards(figures)] + [JUDGE]
    lines = [
        f"{figures['prompts']} held-out prompts, guidance {settings['guidance_level']:g}, {settings['solver']} "
        f"{settings['steps']} steps, {figures['study']['device']}: share of correct images among the "
        f"{settings['n_samples']} kept, and of errors removed (shares kept are known "
        f"to ± {_widest([rounds[n]['chosen'][row]['kept'] for n in names for row in rows]):.3f} or better, 95 %).",
        "",
        *_table_head("kept by", names),
        _row("nobody (all drawn)", [f"{rounds[n]['drawn']['value']:.3f}" for n in names]),
    ]
    for row in rows:
        cells = []
        for n in names:
            kept, removed = (rounds[n]["chosen"][row][field]["value"] for field in ("kept", "errors_removed"))
            cells.append(f"{kept:.3f}" + (f" ({removed:.2f})" if removed is not None and n != names[0] else ""))
        lines.append(_row(row, cells))
    return "\n".join([*lines, *(["", links] if links else [])]) + "\n"


def _widest(values: Sequence[dict[str, Any]]) -> float:
    return max(float(max(v["high"] - v["value"], v["value"] - v["low"])) for v in values)


def write_into(path: Path, text: str) -> None:
    """Puts text between the marks of a page.

    Raises:
        InputError: when the page has no marks.
    """
    page = path.read_text()
    found = re.fullmatch(r"(.*<!-- study: begin[^\n]*-->\n).*(<!-- study: end -->.*)", page, re.DOTALL)
    if not found:
        raise InputError(f"{path}: has no marks <!-- study: begin --> and <!-- study: end -->")
    path.write_text(found[1] + text + found[2])


def _seconds_table(figures: dict[str, Any]) -> list[str]:
    stages, rounds = figures["seconds"], list(figures["rounds"])
    if "total" not in stages:
        return ["Seconds were not recorded: every prompt was drawn in more than one go."]
    settings = figures["study"]["settings"]
    whole = settings["scaling_rounds"]
    once = stages["reply"]
    each = stages["total"] - once
    workers = figures["study"]["workers"]
    lines = [
        f"Seconds a prompt ({workers} worker{'s' if workers > 1 else ''}; measured with {whole} rounds, fewer in proportion):",
        "",
        *_table_head("", rounds),
    ]
    for name, more in (("latent mode", 0.0), ("image mode", stages["encoding"])):
        cells = [f"{once + (each + more) * int(n.split('x')[1]) / whole:.2f}" for n in rounds]
        lines.append(_row(name, cells))
    return lines


def _rewards(figures: dict[str, Any]) -> list[str]:
    labels = next(iter(figures["rounds"].values()))["chosen"]
    return [x.split(", ")[1] for x in labels if x.startswith("image_reward, ")]


def _table_head(first: str, names: Sequence[str]) -> list[str]:
    return [_row(first, names), "|" + "---|" * (len(names) + 1)]


def _row(first: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join((first, *cells)) + " |"


def _text(value: dict[str, Any]) -> str:
    return str(Estimate(value["value"], value["low"], value["high"]))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f} ({part}/{whole})" if whole else "–"


def plot(figures: dict[str, Any], path: Path) -> None:
    """Left: share of correct images against images drawn, by metric. Right: errors removed by combined."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rounds = figures["rounds"]
    x = [int(n.split("x")[0]) * int(n.split("x")[1]) for n in rounds]
    kept, removed = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=150)[1]
    names = [f"{n.split('x')[0]}×{n.split('x')[1]}" for n in rounds]

    def line(axes: Any, label: str, field: str, band: bool, **style: Any) -> None:
        values = [rounds[n]["chosen"][label][field] for n in rounds]
        if any(v["value"] is None for v in values):
            return
        (drawn,) = axes.plot(x, [v["value"] for v in values], marker="o", markersize=4, label=label, **style)
        if band:
            axes.fill_between(
                x, [v["low"] for v in values], [v["high"] for v in values], color=drawn.get_color(), alpha=0.15
            )

    labels = [x for x in next(iter(rounds.values()))["chosen"] if x != JUDGE]
    for label in labels:
        if not label.endswith("image mode"):
            line(kept, label, "kept", label.startswith("combined"), linewidth=2 if label.startswith("combined") else 1)
        if label.startswith("combined"):
            line(removed, label, "errors_removed", True)
    for axes, field in ((kept, "kept"), (removed, "errors_removed")):
        line(axes, JUDGE, field, False, color="black", linestyle=":")
    kept.plot(x, [rounds[n]["drawn"]["value"] for n in rounds], color="black", linestyle="--", label="all drawn")
    kept.set_ylabel(f"correct among the {figures['study']['settings']['n_samples']} kept")
    for target, place in ((0.4, "4x2"), (0.7, f"4x{figures['study']['settings']['scaling_rounds']}")):
        if place in rounds:
            removed.plot(x[list(rounds).index(place)], target, marker="_", markersize=16, color="black")
    removed.set_ylabel("share of errors removed (bars: targets)")
    for axes in (kept, removed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, names)
        axes.minorticks_off()
        axes.set_xlabel("images drawn of each prompt")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    kept.figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.figure.savefig(path)


def main() -> None:
    """Draws, analyses, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder of the experiment")
    parser.add_argument("--results", type=Path, help="results file (default: results.jsonl in --out)")
    parser.add_argument("--only", choices=("draw", "analyse"), help="one half of the study")
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--prompts", type=int, default=6 * PER_KIND)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="ab2")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch-size", type=int, help="images drawn at once (default: as scale t2i)")
    parser.add_argument("--device")
    parser.add_argument("--devices", help="one worker each; cuda:0,cuda:0,cuda:0 are three on one GPU")
    parser.add_argument("--dtype")
    parser.add_argument("--judges", type=int, default=2, help="processes that judge pictures")
    parser.add_argument("--imagereward", help="folder with ImageReward's weights, to study that reward too")
    parser.add_argument("--pickscore", help="folder with PickScore's weights")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="draw the plot here")
    parser.add_argument("--into", type=Path, help="put a summary between this page's marks")
    args = parser.parse_args()
    args.results = args.results or args.out / "results.jsonl"
    if not 1 <= args.prompts <= 6 * PER_KIND:
        parser.error(f"--prompts {args.prompts}: must be 1 to {6 * PER_KIND}")
    try:
        if args.only != "analyse":
            draw(args)
        if args.only == "draw":
            return
        figures = analyse(args.results)
    except ScaleRAEError as error:
        raise SystemExit(f"error: {error}") from None
    text = markdown(figures)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)
    if args.plot:
        plot(figures, args.plot)
    if args.into:
        more = [f"[All metrics]({args.markdown.name})."] if args.markdown else []
        picture = [f"![Correct images and errors removed]({args.plot.name})"] if args.plot else []
        write_into(args.into, summary(figures, "\n\n".join(more + picture)))


if __name__ == "__main__":
    main()
