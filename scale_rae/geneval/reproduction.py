"""`reproduce`: GenEval of a model and of test-time scaling, as a table beside the paper's figures.

Best of 4 x 1, 4 x 2, 4 x 4 and 4 x 8 images come from one experiment: an image depends on its number, not on how many are drawn, so
the first 8 of 32 are those of 4 x 2. Only adaptive search is an experiment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import InputError, counted
from scale_rae.geneval.evaluation import Evaluation
from scale_rae.geneval.page import judge_words, note_on, percent, percents
from scale_rae.geneval.policies import chosen, ranked, searched
from scale_rae.geneval.results import Result
from scale_rae.geneval.summary import Summary, summarise
from scale_rae.jsonio import dump_json
from scale_rae.options import ModelChoice, SamplingOptions, default_batch_size
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.replacing import write_file
from scale_rae.scaling.settings import Settings
from scale_rae.student import own_options
from scale_rae.templates import fill_template

if TYPE_CHECKING:
    from scale_rae.inspection import Inspection

GENEVAL_PROMPTS = 553
KEEP = 4
ROUNDS = (1, 2, 4, 8)
METRICS = ("answer_logits", "combined")  # the paper's, and this program's
# GenEval, %, by images drawn per prompt; 4 are kept by the answer's logit. Language model 1.5B, DiT 5.5B (arXiv:2601.16208).
PAPER = {4: 53.2, 8: 59.6, 16: 62.5, 32: 64.3}
PAPER_MODEL = "1.5B language model, 5.5B DiT, answer logits"
# Adaptive search against 4 x 8, measured (docs/scaling.md): images drawn to the end, and time.
_ADAPTIVE_IMAGES, _ADAPTIVE_TIME = 0.25, 1 / 2.8
_PNG_SHARE = 0.7  # bytes of a PNG of a photo against those of its pixels
_RECORD_BYTES = 3000  # per image: scores, verdict, journal
_LARGE_SIDE = 512  # pixels, where the decoder's size is not known (a VAE)
_JUDGED_TOGETHER = 8  # images that a GPU reads in the time of one
_SHAPES_SECONDS = 0.03
# Of Mask2Former with Swin-S on 1333 x 800 pixels (its paper counts 313 billion multiply-adds), and what the CPU does for an image.
_DETECTOR_OPERATIONS, _DETECTOR_SECONDS = 626e9, 0.02


@dataclass(frozen=True)
class Row:
    """A line of the table; `paper` is the paper's score in %. `summary` None: not drawn or not ranked."""

    name: str
    pictures: str
    metric: str
    summary: Summary | None
    paper: float | None = None
    why_none: str = ""

    def record(self) -> dict[str, Any]:
        """The line as JSON values."""
        found = {"policy": self.name, "pictures": self.pictures, "metric": self.metric or None, "paper": self.paper}
        return found | (self.summary.record() if self.summary is not None else {"missing": self.why_none})


@dataclass(frozen=True)
class Estimate:
    """What a reproduction takes: images, seconds, bytes of results on disk, bytes to `download`."""

    prompts: int
    images: int
    adaptive_images: int
    drawing: float
    evaluating: float
    results: int
    download: int

    def record(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {name: round(value) for name, value in vars(self).items()}


def check_prompts(prompts: Sequence[PromptRecord], path: Path, check: Callable[[Mapping[str, Any]], None]) -> None:
    """Raises InputError, naming the line, for a prompt whose metadata cannot be evaluated."""
    for prompt in prompts:
        try:
            check({**prompt.extra, "prompt": prompt.prompt})
        except InputError as e:
            raise InputError(f"{path}: line {prompt.line}: {str(e).removeprefix('metadata: ')}") from e


def both(settings: Settings, rounds: int = ROUNDS[-1]) -> tuple[Settings, Settings]:
    """The settings of both experiments, best of 4 x `rounds` and adaptive search, alike in all else."""
    return (
        replace(settings, n_samples=KEEP, scaling_rounds=rounds, search="best-of-n"),
        replace(settings, n_samples=KEEP, scaling_rounds=Settings("", "").scaling_rounds, search="adaptive"),
    )


def estimate(
    found: Inspection, choice: ModelChoice, options: SamplingOptions, judge: str, prompts: int, rounds: int = ROUNDS[-1]
) -> Estimate:
    """What a reproduction takes on the chosen device, whose speed is measured in about a second.

    Raises:
        DeviceError: when the device is not there.
    """
    import torch

    from scale_rae.footprint import Footprint, Way, published_decoder
    from scale_rae.machine import describe, measure
    from scale_rae.memory import pick_device, pick_dtype

    device = pick_device(choice.device)
    dtype = pick_dtype(choice.dtype, device)
    machine = describe(device, dtype)
    decoder = found.decoder or (published_decoder(found.config.channels) if found.config.vae is None else None)
    footprint = Footprint(found.config, decoder, machine.kind, str(dtype).removeprefix("torch."), machine.kernels)
    batch = min(default_batch_size(machine.kind), KEEP * rounds)
    options = own_options(found.config.student, options)
    parts = footprint.seconds(Way(choice.quantize, choice.offload, batch), measure(device, dtype), options.steps)
    branches = 1 if options.guidance == 1 or found.config.student else 2
    scoring = parts.reply / (1 if machine.kind == "cpu" else _JUDGED_TOGETHER)
    each = (parts.reply + parts.copies + branches * parts.sampling + parts.decoding) / batch + scoring
    if judge == "shapes":
        judging = _SHAPES_SECONDS
    else:
        judging = _DETECTOR_OPERATIONS / (0.4 * measure(device, torch.float32).products) + _DETECTOR_SECONDS
    side = decoder.patches * decoder.patch if decoder is not None else _LARGE_SIDE
    images = prompts * KEEP * rounds
    adaptive = round(prompts * KEEP * ROUNDS[-1] * _ADAPTIVE_IMAGES)
    drawing = each * (images + prompts * KEEP * ROUNDS[-1] * _ADAPTIVE_TIME)
    results = round((images + adaptive) * (3 * side**2 * _PNG_SHARE + _RECORD_BYTES))
    download = sum(files.download for files in found.files)
    return Estimate(prompts, images, adaptive, drawing, (images + adaptive) * judging, results, download)


def table(best_of: Evaluation, adaptive: Evaluation | None) -> list[Row]:
    """The table's lines: the first 4 images; 4 of 8, 16, 32 by each of METRICS; adaptive search."""
    prompts, results = best_of.folder.prompts, best_of.by_name
    first = summarise(chosen(prompts, results, lambda p: range(KEEP)))
    drawn = max((len(p.samples) for p in prompts), default=0)
    rows = [Row(f"{KEEP}×1", f"the first {KEEP}, not chosen", "", first, PAPER[KEEP])]
    for rounds in [rounds for rounds in ROUNDS[1:] if KEEP * rounds <= drawn]:
        for metric in METRICS:
            paper = PAPER[KEEP * rounds] if metric == METRICS[0] else None
            rows.append(_best(best_of, results, metric, rounds, paper))
    if adaptive is not None:
        summary = summarise(chosen(adaptive.folder.prompts, adaptive.by_name, searched))
        rows.append(Row("adaptive", f"{KEEP} kept by the search", "", summary))
    return rows


def _best(best_of: Evaluation, results: Mapping[str, Result], metric: str, rounds: int, paper: float | None) -> Row:
    name, pictures = f"{KEEP}×{rounds}", f"{KEEP} of {KEEP * rounds}"
    try:
        orders = {p.name: ranked(p, metric, KEEP, first=KEEP * rounds)[:KEEP] for p in best_of.folder.prompts}
    except InputError as e:
        return Row(name, pictures, metric, None, paper, str(e).replace(f"{best_of.folder.folder}/", ""))
    return Row(
        name, pictures, metric, summarise(chosen(best_of.folder.prompts, results, lambda p: orders[p.name])), paper
    )


def write_reproduction(
    folder: Path, model: str, settings: Settings, best_of: Evaluation, adaptive: Evaluation | None, prompts: int
) -> tuple[list[Row], list[Path]]:
    """The table, and the paths of reproduction.html and reproduction.json, once they are written.

    `adaptive` is None while that experiment is not there.

    Raises:
        OutputError: when one cannot be written.
    """
    rows = table(best_of, adaptive)
    whole = [row for row in rows if row.summary is not None]
    notes = notes_on(best_of, adaptive, prompts)
    record = {
        "model": model,
        "prompts": prompts,
        "judge": best_of.judge,
        "seed": settings.seed,
        "steps": settings.options.steps,
        "guidance_level": settings.options.guidance,
        "paper_model": PAPER_MODEL,
        "notes": notes,
        "rows": [row.record() for row in rows],
    }
    tags = list(dict.fromkeys(tag for row in whole if row.summary is not None for tag in row.summary.tags))
    page = fill_template(
        "reproduction.html",
        title=f"GenEval of {model}",
        judge=judge_words(best_of.judge),
        settings={"seed": settings.seed, "steps": settings.options.steps, "guidance": settings.options.guidance},
        rows=[_row(row, tags) for row in rows],
        tags=tags,
        notes=notes,
        paper_model=PAPER_MODEL,
        experiments=[e.folder.folder.name for e in (best_of, adaptive) if e is not None],
    )
    paths = [folder / "reproduction.html", folder / "reproduction.json"]
    contents = (page.encode("utf-8", "replace"), (dump_json(record, indent=1, ascii_only=True) + "\n").encode())
    for path, content in zip(paths, contents, strict=True):
        write_file(path, content, best_of.folder.folder, "--output-dir")
    return rows, paths


def _row(row: Row, tags: Sequence[str]) -> dict[str, Any]:
    found = row.summary
    return {
        "name": row.name,
        "pictures": row.pictures,
        "metric": row.metric or "–",
        "overall": "–" if found is None else f"{100 * found.overall:.1f}",
        "interval": row.why_none if found is None else percents(found.overall_interval),
        "paper": "" if row.paper is None else f"{row.paper:.1f}",
        "any": "–" if found is None else percent(found.prompts),
        "tags": ["–" if found is None or tag not in found.tags else percent(found.tags[tag]) for tag in tags],
    }


def notes_on(best_of: Evaluation, adaptive: Evaluation | None, prompts: int) -> list[str]:
    """What keeps the table from being compared with the paper's, and what is missing."""
    notes = []
    if prompts != GENEVAL_PROMPTS:
        notes.append(
            f"{counted(prompts, 'prompt')}, not GenEval's {GENEVAL_PROMPTS}: the scores cannot be compared with published ones."
        )
    if note := note_on(best_of.judge):
        notes.append(note)
    for evaluation in (best_of, adaptive):
        if evaluation is not None and evaluation.missing:
            where = evaluation.folder.folder.name
            notes.append(f"{where}: {len(evaluation.missing)} missing, first {evaluation.missing[0]}.")
    if adaptive is None:
        notes.append("The adaptive search is not drawn yet.")
    return notes
