"""Evaluation of a model in the world of shapes: `draw` (judged from pixels), `read`, `ask`, `decline`, `reconstruct`.

    python -m scale_rae.shapes.evaluate draw --guidance 1 --guidance 3 --output-dir runs/evaluation
    python -m scale_rae.shapes.evaluate read
    python -m scale_rae.shapes.evaluate ask
    python -m scale_rae.shapes.evaluate decline
    python -m scale_rae.shapes.evaluate reconstruct

Prompts and scenes are held out of training (`world.HELD_OUT_…`) unless --scenes says otherwise. Shares come with 95 % Wilson
intervals.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import scale_rae
from scale_rae.errors import OptionError, missing_package, need, printable
from scale_rae.shares import Share

try:
    import numpy as np
    import typer
    from PIL import Image

    from scale_rae.cli.signature import given_options
    from scale_rae.config import load_config
    from scale_rae.opening import find_model
    from scale_rae.options import DEFAULT_STEPS, ModelChoice, SamplingOptions, check_count
    from scale_rae.prompt import SYSTEM, Turn
    from scale_rae.shapes import asking, world
    from scale_rae.student import own_options
except ModuleNotFoundError as e:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"error: {missing_package(e)}") from None

if TYPE_CHECKING:
    from torch import Tensor

    from scale_rae.hub import Source
    from scale_rae.language import Reply as LanguageReply

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=(__doc__ or "").replace("\n\n    python", "\n\n\b\n    python"),
    rich_markup_mode=None,
)

DRAWN_AT_ONCE, ASKED_AT_ONCE = 50, 100
REPLY_TOKENS = 60  # more than any reply of the world has
Wording = Literal["default", "training", "held-out"]
WORDINGS = {
    "default": ("Can you generate {prompt}",),  # what the scaling experiment says
    "training": world.REQUEST_WORDINGS,
    "held-out": world.HELD_OUT_WORDINGS,
}


@dataclass(frozen=True)
class Drawn:
    """One judged drawing."""

    metadata: dict[str, Any]
    latent: Tensor | None  # [L, C]; None of a reply without a drawing
    image: Image.Image
    correct: bool
    reason: str


def draw_prompts(
    model: scale_rae.ScaleRAE,
    prompts: Sequence[dict[str, Any]],
    seed: int = 0,
    wordings: Sequence[str] = WORDINGS["default"],
    **options: Any,
) -> list[Drawn]:
    """One judged drawing of each prompt (GenEval metadata). `options` go to `ScaleRAE.generate`.

    The noise of prompt i is seeded by `image_seed(seed, i)`, however many are drawn at once. A reply without a drawing counts as wrong, with
    a white picture.
    """
    from scale_rae.noise import image_seed
    from scale_rae.shapes.judge import judge

    results: list[Drawn] = []
    for start in range(0, len(prompts), DRAWN_AT_ONCE):
        part = prompts[start : start + DRAWN_AT_ONCE]
        indices = range(start, start + len(part))
        requests = [world.request(wordings[i % len(wordings)], p["prompt"]) for i, p in zip(indices, part, strict=True)]
        seeds = [[image_seed(seed, i)] for i in indices]
        for metadata, generation in zip(
            part, model.generate(requests, image_seeds=seeds, batch_size=DRAWN_AT_ONCE, **options), strict=True
        ):
            if not generation.images:
                blank = Image.new("RGB", (world.SIZE, world.SIZE), "white")
                results.append(Drawn(metadata, None, blank, False, f"answered without drawing: {generation.text!r}"))
                continue
            image = generation.images[0].image
            assert image is not None
            verdict = judge(image, metadata)
            results.append(Drawn(metadata, generation.images[0].latent, image, verdict.correct, verdict.reason))
    return results


def by_kind(drawn: Sequence[Drawn]) -> dict[str, Share]:
    """The share of correct drawings of each kind of prompt, and of all as "overall"."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for item in drawn:
        groups[item.metadata["tag"]].append(item.correct)
        groups["overall"].append(item.correct)
    order = [*(kind for kind in world.KINDS if kind in groups), "overall"]
    return {kind: Share(sum(groups[kind]), len(groups[kind])) for kind in order}


def agreement(model: scale_rae.ScaleRAE, drawn: Sequence[Drawn]) -> dict[str, Share]:
    """How often the model's yes or no about its own latents equals the judge's verdict, separately for right and wrong drawings."""
    shown = [item for item in drawn if item.latent is not None]
    latents = [item.latent for item in shown if item.latent is not None]
    said_yes = align(model, latents, [item.metadata["prompt"] for item in shown])
    agreed = [yes == item.correct for yes, item in zip(said_yes, shown, strict=True)]
    right = [a for a, item in zip(agreed, shown, strict=True) if item.correct]
    wrong = [a for a, item in zip(agreed, shown, strict=True) if not item.correct]
    return {
        "all": Share(sum(agreed), len(agreed)),
        "judged correct": Share(sum(right), len(right)),
        "judged wrong": Share(sum(wrong), len(wrong)),
    }


def align(model: scale_rae.ScaleRAE, latents: Sequence[Tensor], prompts: Sequence[str]) -> list[bool]:
    """Whether the model says yes to "Does this image align with the prompt: …?"; anything but yes is no."""
    answers: list[bool] = []
    for start in range(0, len(latents), ASKED_AT_ONCE):
        part = slice(start, start + ASKED_AT_ONCE)
        asked = [world.ALIGN.format(prompt=prompt) for prompt in prompts[part]]
        replies = model.answer(asked, latents=latents[part], max_new_tokens=8)
        answers += [answer.text.strip().lower().startswith("yes") for answer in replies]
    return answers


def pictures(scenes: world.SceneBatch) -> list[Image.Image]:
    """Drawn scenes as images."""
    from scale_rae.shapes.draw import draw

    return [Image.fromarray(array) for array in draw(scenes).permute(0, 2, 3, 1).numpy()]


def alignment(model: scale_rae.ScaleRAE, count: int, seed: int, held_out: world.HeldOut) -> dict[str, Share]:
    """Yes/no accuracy on drawn scenes, balanced between true prompts and prompts with one thing changed, by kind."""
    rng = random.Random(seed)
    scenes = world.sample(np.random.default_rng(seed), count // 2, world.KINDS, held_out)
    true = [next(p for p in world.true_prompts(scene) if p.tag == scene.kind) for scene in scenes]
    latents = model.encode(pictures(scenes))
    false = [world.changed(rng, prompt, "any") for prompt in true]
    yes = align(model, [*latents, *latents], [prompt.text for prompt in (*true, *false)])
    truth = [True] * len(true) + [False] * len(false)
    groups: dict[str, list[bool]] = defaultdict(list)
    for prompt, said, is_true in zip((*true, *false), yes, truth, strict=True):
        for group in (prompt.tag, "true prompts" if is_true else "false prompts", "overall"):
            groups[group].append(said == is_true)
    order = [*world.KINDS, "true prompts", "false prompts", "overall"]
    return {name: Share(sum(groups[name]), len(groups[name])) for name in order if name in groups}


def description(model: scale_rae.ScaleRAE, count: int, seed: int, held_out: world.HeldOut) -> Share:
    """How often "Describe this image." names every object of a drawn scene with its colour, in order, and nothing else."""
    scenes = world.sample(np.random.default_rng(seed), count, world.SCENE_KINDS, held_out)
    latents = model.encode(pictures(scenes))
    right = 0
    for start in range(0, count, ASKED_AT_ONCE):
        part = slice(start, start + ASKED_AT_ONCE)
        answers = model.answer(world.DESCRIBE, latents=latents[part], max_new_tokens=48)
        for answer, scene in zip(answers, scenes[part], strict=True):
            said = world.parse_description(answer.text)
            right += said is not None and said == world.parse_description(world.describe(scene))
    return Share(right, count)


@dataclass(frozen=True)
class Reply:
    """A question or request, what the model replied, and whether that is right."""

    kind: str
    text: str
    reply: str
    wanted: str
    right: bool


def _replies(
    model: scale_rae.ScaleRAE, messages: Sequence[str], systems: Sequence[str], latents: Sequence[Tensor]
) -> list[LanguageReply]:
    """Replies to messages, the i-th after `systems[i % len(systems)]` and about `latents[i]`, if there are any."""
    from scale_rae.language import Conversation

    replies: list[LanguageReply] = []
    for start in range(0, len(messages), ASKED_AT_ONCE):
        conversations = []
        for place, message in enumerate(messages[start : start + ASKED_AT_ONCE], start):
            turn = Turn("user", message, int(bool(latents)))
            ids = model.tokenizer.conversation([turn], systems[place % len(systems)])
            conversations.append(Conversation(ids, model.check_latent(latents[place]) if latents else None))
        replies += model.converse(conversations, [REPLY_TOKENS] * len(conversations), draw=not latents)
    return replies


def asked(
    model: scale_rae.ScaleRAE, count: int, seed: int, held_out: world.HeldOut, systems: Sequence[str] = (SYSTEM,)
) -> list[Reply]:
    """Replies to `asking.paraphrases` about drawn scenes, each after one of `systems` in turn.

    A reply is right if it is the true answer, word for word.
    """
    scenes = world.sample(np.random.default_rng(seed), count, world.SCENE_KINDS, held_out)
    latents = model.encode(pictures(scenes))
    questions = asking.paraphrases(seed, list(scenes))
    replies = []
    answers = _replies(model, [text for text, _ in questions], systems, latents)
    for (text, question), answer in zip(questions, answers, strict=True):
        said = model.tokenizer.decode(answer.ids).strip()
        replies.append(Reply(question.kind, text, said, question.answer, said == question.answer))
    return replies


def requested(model: scale_rae.ScaleRAE, count: int, seed: int, systems: Sequence[str] = (SYSTEM,)) -> list[Reply]:
    """Replies to `count` requests of each kind, each after one of `systems` in turn.

    "outside" is to be declined in one sentence, "inside" to be drawn, and "blind", yes/no questions where no picture is shown, to be
    answered without drawing.
    """
    rng = random.Random(f"blind/{seed}")
    scenes = world.sample(np.random.default_rng(seed), count, ("colors",), "any")
    blind = []
    for scene in scenes:
        one = asking.question(rng, scene, rng.choice(("there", "any", "it_color", "it_shape", "color_is")))
        assert one is not None
        blind.append(asking.varied(rng, asking.worded(rng, rng.choice(asking.WORDINGS[one.kind]), one.parts)))
    texts = {
        "outside": asking.outside_requests(seed, count),
        "inside": [text for text, _ in asking.inside_requests(seed, count)],
        "blind": blind,
    }
    wanted = {"outside": world.OUTSIDE_REPLY, "inside": "a picture", "blind": world.NO_PICTURE}
    replies = []
    for kind, messages in texts.items():
        for text, reply in zip(messages, _replies(model, messages, systems, []), strict=True):
            said = model.tokenizer.decode(reply.ids).strip()
            drawn = reply.condition is not None
            right = {"outside": said == world.OUTSIDE_REPLY, "inside": drawn, "blind": not drawn}[kind]
            replies.append(Reply(kind, text, "a picture" if drawn else said, wanted[kind], right))
    return replies


def shares(replies: Sequence[Reply]) -> dict[str, Share]:
    """The share of right replies of each kind."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for reply in replies:
        groups[reply.kind].append(reply.right)
    return {kind: Share(sum(right), len(right)) for kind, right in groups.items()}


def reconstruction(model: scale_rae.ScaleRAE, count: int, seed: int, held_out: world.HeldOut) -> float:
    """Mean PSNR, dB, of encode → decode of drawn scenes."""
    images = pictures(world.sample(np.random.default_rng(seed), count, world.SCENE_KINDS, held_out))
    values = []
    for image, back in zip(images, model.decode(model.encode(images)), strict=True):
        error = np.mean((np.asarray(image, np.float64) - np.asarray(back, np.float64)) ** 2)
        values.append(10 * math.log10(255**2 / error))
    return float(np.mean(values))


# Commands ------------------------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Option("--model-path", help="checkpoint to evaluate")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … (default: the best there is)")]
Scenes = Annotated[world.HeldOut, typer.Option("--scenes", help="held out only, without what is held out, or any")]
Count = Annotated[int, typer.Option(min=2, help="scenes")]
Seed = Annotated[int, typer.Option(help="seed of prompts, scenes and noise")]
Show = Annotated[bool, typer.Option("--show", help="also print what was wrong")]
OtherSystems = Annotated[bool, typer.Option("--other-systems", help="after 16 other system messages, in turn")]


def _load(choice: ModelChoice, source: Source | None = None) -> scale_rae.ScaleRAE:
    """The chosen model, after the checks that need no torch. `source` are its files, where they have been found already."""
    source = source or find_model(choice)
    from scale_rae.networks import load

    return scale_rae.ScaleRAE(load(choice, source))


def _table(title: str, rows: dict[str, Share]) -> None:
    print(title)
    for name, share in rows.items():
        print(f"  {name:15} {share}")


@app.command("draw")
def draw_command(
    ctx: typer.Context,
    guidance: Annotated[list[float], typer.Option(help="guidance levels, each evaluated")] = [1.0],  # noqa: B006
    model_path: Model = "shapes",
    per_kind: Annotated[int, typer.Option(help="prompts of each kind")] = 100,
    steps: Annotated[int, typer.Option(help="steps of the solver")] = DEFAULT_STEPS,
    solver: Annotated[str, typer.Option(help="solver")] = "euler",
    guidance_interval: Annotated[tuple[float, float], typer.Option(help="where in t guidance acts")] = (0.0, 1.0),
    wordings: Annotated[Wording, typer.Option(help="how requests are worded")] = "default",
    scenes: Scenes = "only",
    seed: Seed = 0,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 (default: as the device likes)")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8, nf4, …: what it costs in accuracy")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="adapter, as in DIR or DIR:WEIGHT")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="keep pictures and results.jsonl here")] = None,
    self_judge: Annotated[bool, typer.Option(help="also ask the model about its own latents")] = True,
) -> None:
    """Draw prompts, judge the pictures; ask the model about its own latents."""
    need("shapes", "python -m scale_rae.shapes.evaluate draw", "skimage", "scipy")
    check_count("prompts of each kind", per_kind)
    interval = None if guidance_interval == (0.0, 1.0) else guidance_interval
    samplings = [SamplingOptions(guidance=level, interval=interval, steps=steps, solver=solver) for level in guidance]
    for options in samplings:
        options.check()
    choice = ModelChoice(model_path, device=device, dtype=dtype, quantize=quantize, lora=tuple(lora or ()))
    source = find_model(choice)
    given = {"guidance_level" if name == "guidance" else name for name in given_options(ctx)}
    student = load_config(source.config_folder).student
    samplings = [own_options(student, options, given) for options in samplings]
    model = _load(choice, source)
    prompts = world.prompts(per_kind, scenes, seed)
    for level, options in zip(guidance, samplings, strict=True):
        start = time.perf_counter()
        drawn = draw_prompts(model, prompts, seed, WORDINGS[wordings], options=options)
        seconds = time.perf_counter() - start
        name = f"guidance {options.guidance:g}, {options.solver} {options.steps} steps, wordings {wordings}, scenes {scenes}, seed {seed}"
        _table(f"{name}: correct, judged from pixels ({seconds:.0f} s)", by_kind(drawn))
        if self_judge:
            _table("  agreement of the model's yes/no about its own latents with the judge", agreement(model, drawn))
        if output_dir is not None:
            write_results(output_dir / f"guidance_{level:g}", drawn)


def write_results(folder: Path, drawn: Sequence[Drawn]) -> None:
    """Pictures and results.jsonl in GenEval's result format: filename, tag, prompt, correct, reason, metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, item in enumerate(drawn):
        file = folder / f"{i:05}.png"
        item.image.save(file)
        lines.append(
            {
                "filename": str(file),
                "tag": item.metadata["tag"],
                "prompt": item.metadata["prompt"],
                "correct": item.correct,
                "reason": item.reason,
                "metadata": json.dumps(item.metadata),
            }
        )
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@app.command("read")
def read_command(
    model_path: Model = "shapes",
    count: Count = 1000,
    scenes: Scenes = "only",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Yes/no alignment and descriptions of drawn scenes."""
    model = _load(ModelChoice(model_path, device=device))
    _table(f"alignment, scenes {scenes}, seed {seed}", alignment(model, count, seed, scenes))
    described = description(model, count, seed + 1, scenes)
    print(f"Describe this image., fully right, scenes {scenes}: {described}")


@app.command("ask")
def ask_command(
    model_path: Model = "shapes",
    count: Annotated[int, typer.Option(min=2, help="questions")] = 500,
    scenes: Scenes = "any",
    seed: Seed = 0,
    device: Device = None,
    show: Show = False,
    other_systems: OtherSystems = False,
) -> None:
    """Questions of all kinds in wordings that training did not see, in any case of letters, about drawn scenes."""
    model = _load(ModelChoice(model_path, device=device))
    replies = asked(model, count, seed, scenes, _systems(other_systems))
    rows = shares(replies) | {"overall": Share(sum(one.right for one in replies), len(replies))}
    _table(f"answered truly, scenes {scenes}, seed {seed}", rows)
    _wrong(replies, show)


@app.command("decline")
def decline_command(
    model_path: Model = "shapes",
    count: Annotated[int, typer.Option(min=2, help="requests of each kind")] = 500,
    seed: Seed = 0,
    device: Device = None,
    show: Show = False,
    other_systems: OtherSystems = False,
) -> None:
    """Requests outside the world (declined), inside it (drawn), and yes/no questions without a picture (not drawn)."""
    model = _load(ModelChoice(model_path, device=device))
    replies = requested(model, count, seed, _systems(other_systems))
    _table(f"replied rightly, seed {seed}", shares(replies))
    _wrong(replies, show)


def _systems(others: bool) -> Sequence[str]:
    return asking.SYSTEMS if others else (SYSTEM,)


def _wrong(replies: Sequence[Reply], show: bool) -> None:
    for one in replies:
        if show and not one.right:
            print(f"  {one.kind}: {one.text!r} -> {one.reply!r}, not {one.wanted!r}")


@app.command("reconstruct")
def reconstruct_command(
    model_path: Model = "shapes", count: Count = 500, scenes: Scenes = "any", seed: Seed = 0, device: Device = None
) -> None:
    """PSNR of encode → decode of drawn scenes."""
    model = _load(ModelChoice(model_path, device=device))
    print(f"encode -> decode, {count} scenes: {reconstruction(model, count, seed, scenes):.2f} dB PSNR")


def main() -> None:
    """The command line."""
    try:
        app()
    except scale_rae.ScaleRAEError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, OptionError) else 1) from None


if __name__ == "__main__":
    main()
