"""The drawing half of scaling_study.py: runs the experiment, reads every picture, writes results.jsonl.

A picture is read by the judge, from its pixels; by the model, asked again in image mode; and by further rewards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bench import prompts_in_turn
from benchmarks.study_analysis import letters, read_lines
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.jsonio import dump_json
from scale_rae.options import SamplingOptions
from scale_rae.promptfile import PromptRecord, read_prompts
from scale_rae.scaling.settings import Settings

PER_KIND = 100  # prompts of each kind in the prompt file
TEXT = ("question", "reply")  # columns left out: the same for all images, or implied by the answer


def write_prompts(path: Path) -> None:
    """Writes the held-out prompts, kinds in turn, so that the first N, for any N, are of all kinds."""
    mixed = prompts_in_turn(6 * PER_KIND)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(dump_json(line | {"index": i}) + "\n" for i, line in enumerate(mixed)))


def draw(args: argparse.Namespace) -> None:
    """Draws and scores the images that the experiment still lacks, then reads the pictures of every finished prompt."""
    from scale_rae.cli.progress import Bars, ScalingDisplay
    from scale_rae.scaling.events import Event, PromptFinished
    from scale_rae.scaling.launch import run
    from scale_rae.scaling.local import Local, default_devices

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
        options=SamplingOptions(guidance=args.guidance, steps=args.steps, solver=args.solver),
        batch_size=args.batch_size,
        reward="siglip",
    )
    devices = args.devices.split(",") if args.devices else default_devices(args.device)
    display, seconds = ScalingDisplay(), args.out / "seconds.jsonl"

    def listen(event: Event) -> None:
        display(event)
        if isinstance(event, PromptFinished) and event.drawn == settings.total:  # otherwise an earlier run started it
            with seconds.open("a") as file:
                file.write(json.dumps({"index": event.index, "seconds": event.seconds}) + "\n")

    try:
        outcome = run(settings, prompts, args.out, Local(devices, Bars()), args.prompts, listen)
    finally:
        display.stop()
    print(f"{outcome.drawn} images drawn in {outcome.seconds:.0f} s; {len(outcome.failed)} prompts failed", flush=True)
    if outcome.unfinished:
        raise ScaleRAEError(f"{len(outcome.unfinished)} prompts are unfinished; run the same command again to continue")
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
    """Writes results.jsonl: a description of the study, then one line per prompt; existing lines stay."""
    first, *rest = read_lines(args.results) or [{"study": study}]
    if _what_counts(first.get("study", {})) != _what_counts(study):
        raise InputError(f"{args.results}: holds results of another study; choose another --out")
    rest = [line for line in rest if "failed" not in line]  # the experiment has tried them again
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
        line["index"]: line["seconds"] for line in read_lines(args.out / "seconds.jsonl")
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
                "latent": columns([record["text_responses"][str(i)] for i in range(len(pictures))]),
                "image": columns([score.judgement() for score in scores]),
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
    """Why each picture is wrong; None if it is right."""
    from scale_rae.shapes.judge import judge

    verdicts = [judge(image, metadata) for image in _pictures(place)]
    return [None if verdict.correct else verdict.reason for verdict in verdicts]


def columns(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the model says of each image: its answers as letters, and a list of each number."""
    names = [name for name in entries[0] if name not in (*TEXT, "answer", "score")]
    answers = letters(entry["answer"] for entry in entries)
    return {"answer": answers} | {name: _short([entry[name] for entry in entries]) for name in names}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
