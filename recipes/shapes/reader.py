"""Stage 5: the language model learns to see the velocity network's errors, to read in other words, and to decline.

It starts from an exported model. Only the language model, its queries and projectors are trained: the velocity network stays as it
is, and the conditions that it gets stay those of the exported model (a loss holds them there). The language model learns from:

- its own drawings, with true answers by the judge's verdicts (`own.py`), and those of earlier models (`--earlier`), which draw worse:
  who draws well has no errors to learn from;
- scenes, spoilt ones too, asked about in hundreds of wordings, in any case of letters;
- requests in other words, whose conditions are to be those of the usual words;
- requests for what the world does not have, small talk, and questions where no picture is shown, with their replies.

The tokenizer gets every word of the world as a title and in capital letters, if it lacks them (`tokenizer.cased_words`).

    python -m recipes.shapes.reader --start-from scale_rae/bundled/shapes --out runs/shapes
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import multiprocessing.pool
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.shapes import common, data, export, invented, joint, lessons, networks, own, pools, settings, spoilt
from recipes.shapes.common import Vocabulary
from recipes.shapes.lessons import Rows, Writer
from recipes.shapes.loop import (
    Metrics,
    Trainer,
    compile_forward,
    loop_options,
    prepare_device,
    process_seconds,
    restore_forward,
    say,
)
from recipes.shapes.settings import Preset
from scale_rae.config import ScaleRAEConfig
from scale_rae.decoder import PixelDecoder
from scale_rae.dit import DiT
from scale_rae.language import LanguageModel
from scale_rae.layout import keeps_float32
from scale_rae.shapes import world
from scale_rae.shapes.world import SceneBatch
from scale_rae.training import passes
from scale_rae.training.optim import FlatModel, OptimizerOptions

CHUNK = 2_000
CONDITION_WEIGHT = 1.5
# Of the scenes to read: what is held out is read as surely as the rest only if names mean each for itself.
INVENTED = 0.65
COMPILING = 8.0  # seconds that --end-after leaves for compiling
COMPILE_FROM = 40_000  # own drawings, from which compiling the velocity network saves time
REQUESTS_EACH = 4  # wordings of each prompt
FLOAT32 = ("diff_head.data_mean", "diff_head.data_std")


@dataclass(frozen=True)
class Batch:
    """Rows of each kind in a step, in the order of the step: those with queries, those with a picture, the others."""

    draw: int = 192
    follow: int = 48  # requests after a picture
    read: int = 304
    own: int = 304
    shown: int = 48  # what is declined although a picture is shown
    outside: int = 144
    blind: int = 40  # questions without a picture
    talk: int = 40


# Data, made by processes that are forked before CUDA starts ---------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Chunks of all streams but the own drawings."""

    scenes: SceneBatch
    second: SceneBatch
    prompts: Rows
    """The requests in usual words whose conditions are kept."""
    rows: dict[str, Rows]

    def save(self, file: Path) -> None:
        """Writes all arrays to an npz file."""
        parts: dict[str, SceneBatch | Rows] = {"scenes": self.scenes, "second": self.second, "prompts": self.prompts}
        parts |= self.rows
        arrays = {f"{name}/{f.name}": getattr(part, f.name) for name, part in parts.items() for f in fields(part)}
        np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, file: Path) -> Made:
        """What `save` wrote."""
        parts: dict[str, dict[str, Any]] = {}
        with np.load(file) as arrays:
            for key in arrays:
                name, _, field = key.partition("/")
                parts.setdefault(name, {})[field] = arrays[key]
        scenes, second = (SceneBatch(**parts.pop(name)) for name in ("scenes", "second"))
        rows = {name: Rows(**columns) for name, columns in parts.items()}
        return cls(scenes, second, rows.pop("prompts"), rows)


def _rng(seed: int, stream: str, number: int) -> random.Random:
    return random.Random(f"{seed}/reader/{stream}/{number}")


def _scenes(
    seed: int, code: int, number: int, count: int, kinds: Sequence[str]
) -> tuple[SceneBatch, np.random.Generator]:
    generator = np.random.default_rng([seed, 100 + code, number])
    return world.sample(generator, count, kinds, "exclude"), generator


def read_chunk(number: int, count: int, seed: int, write: Writer) -> tuple[SceneBatch, SceneBatch, Rows]:
    """Scenes, the same with some spoilt, and a lesson about each."""
    scenes, generator = _scenes(seed, 0, number, count, data.READ_KINDS)
    scenes, other = invented.put_in(generator, scenes, INVENTED, counted=True)
    second = spoilt.recolored(generator, scenes, ~other)
    ruined = spoilt.which(scenes, second)
    made = lessons.read_lessons(
        _rng(seed, "read", number), write, invented.named(scenes), other, ruined, number * CHUNK
    )
    return scenes, second, Rows.of(made, write.pad)


def draw_chunk(number: int, count: int, seed: int, pictures: int, write: Writer) -> tuple[Rows, Rows, Rows]:
    """Requests in usual words, the same in other words, and others after a picture."""
    scenes, generator = _scenes(seed, 1, number, count, data.DRAW_KINDS)
    scenes, _ = invented.put_in(generator, scenes)
    rng = _rng(seed, "draw", number)
    asks = lessons.asks(rng, invented.named(scenes))[:count]
    first = number * CHUNK
    usual = [write.drawn(data.DEFAULT_WORDING.format(prompt=ask.text), 0, learns=False) for ask in asks]
    keeps = [one for one in usual if one is not None]
    assert len(keeps) == len(asks)
    plain = lessons.draw_lessons(rng, write, asks, first, REQUESTS_EACH)
    follow = lessons.draw_lessons(rng, write, asks, first, 1, pictures)
    return Rows.of(keeps, write.pad), Rows.of(plain, write.pad), Rows.of(follow, write.pad)


def other_chunk(number: int, count: int, seed: int, pictures: int, write: Writer) -> dict[str, Rows]:
    """What is said without drawing or reading."""
    rng = _rng(seed, "other", number)
    scenes, _ = _scenes(seed, 2, number, count // 2, data.READ_KINDS)
    made = {
        "outside": lessons.outside_lessons(rng, write, count),
        "shown": [
            *lessons.outside_lessons(rng, write, count // 4, pictures),
            *lessons.talk_lessons(rng, write, count // 4, pictures),
        ],
        "blind": lessons.blind_lessons(rng, write, list(scenes)),
        "talk": lessons.talk_lessons(rng, write, count // 2),
    }
    return {name: Rows.of(rows, write.pad) for name, rows in made.items()}


EARLIER = 1_000_000  # numbers of chunks of the next model's drawings begin so much later


def wish_chunk(number: int, count: int, seed: int, write: Writer) -> tuple[list[own.Wish], Rows]:
    """Prompts to draw, and their requests in usual words."""
    scenes, _ = _scenes(seed, 3, number, count, own.KINDS)
    wished = own.wishes(_rng(seed, "wish", number), list(scenes))
    asked = [write.drawn(data.DEFAULT_WORDING.format(prompt=wish.text), 0, learns=False) for wish in wished]
    return wished, Rows.of([one for one in asked if one is not None], write.pad)


def own_chunk(
    number: int, wished: Sequence[own.Wish], pictures: Any, first: int, seed: int, write: Writer
) -> tuple[Rows, dict[str, tuple[int, int]]]:
    """Lessons about drawings of these wishes, the first of which has the number `first`; and by kind, how many are right of how
    many."""
    seen = own.look(pictures)
    counts: dict[str, tuple[int, int]] = {}
    for wish, found in zip(wished, seen, strict=True):
        kind = wish.prompt.tag if wish.prompt else "mixed"
        right, total = counts.get(kind, (0, 0))
        counts[kind] = (right + (found.clear and wish.is_granted(found.objects)), total + 1)
    return Rows.of(lessons.own_lessons(_rng(seed, "own", number), write, wished, seen, first), write.pad), counts


_write: Writer | None = None


def _call(work: Any, *arguments: Any) -> Any:
    """A chunk function with the writer that this process inherited."""
    return work(*arguments, write=_write)


class Makers:
    """Processes that make chunks; `workers` 1 works in this process."""

    def __init__(self, workers: int, write: Writer) -> None:
        global _write
        _write = write
        workers = workers or max(1, len(os.sched_getaffinity(0)) - 2)
        self.pool = multiprocessing.get_context("fork").Pool(workers) if workers > 1 else None

    def ask(self, work: Any, *arguments: Any) -> Any:
        """A chunk to come: call what is returned."""
        if self.pool is None:
            return functools.partial(_call, work, *arguments)
        return self.pool.apply_async(_call, (work, *arguments)).get

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.close()
            self.pool.join()


def _sizes(count: int, first: int = 0) -> list[tuple[int, int]]:
    return [(number, min(CHUNK, count - start)) for number, start in enumerate(range(0, count, CHUNK), first)]


# Pools and loss -----------------------------------------------------------------------------------------------------------------


class OnDevice:
    """Rows on the device."""

    def __init__(self, rows: Rows, device: torch.device, first_picture: int = 0) -> None:
        self.ids = torch.from_numpy(rows.ids).to(device)
        self.length, self.answer, self.image, self.picture, self.wish = (
            torch.from_numpy(column).to(device).long()
            for column in (rows.length, rows.answer, rows.image, rows.picture, rows.wish)
        )
        self.picture += first_picture

    def __len__(self) -> int:
        return len(self.ids)


GROUPS = ("draw", "follow", "read", "own", "shown", "outside", "blind", "talk")


class Reading:
    """The language model's pass over rows with queries and pictures."""

    def __init__(
        self, language: LanguageModel, preset: Preset, vocabulary: int, width: int, dtype: torch.dtype
    ) -> None:
        self.language, self.tokens, self.channels, self.dtype = language, preset.tokens, preset.channels, dtype
        self.rotary = passes.positions(language, width, dtype)
        self.width, self.vocabulary = width, vocabulary
        self.table_size = -(-(vocabulary + preset.tokens) // 8) * 8

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [B, T, H] of ids [B, T], from `vocabulary` on the latent queries."""
        model = self.language.model
        table = torch.cat([model.embed_tokens.weight, model.latent_queries])
        table = F.pad(table, (0, 0, 0, self.table_size - len(table)))
        return networks.one_hot(ids, self.table_size, self.dtype) @ table

    def with_queries(self, ids: Tensor, length: Tensor) -> Tensor:
        """Ids [B, T] with the latent queries after the first `length` [B]."""
        place = torch.arange(self.width, device=ids.device) - length[:, None]
        return torch.where((place >= 0) & (place < self.tokens), self.vocabulary + place, ids)

    def with_pictures(self, embeds: Tensor, latents: Tensor, image: Tensor) -> Tensor:
        """Embeddings [B, T, H] with the projected latents [B, L, C] from the places `image` [B] on; none where it is -1."""
        projected = self.language.model.mm_projector(latents.to(self.dtype))  # [B, L, H]
        place = torch.arange(self.width, device=embeds.device) - image[:, None]
        there = (place >= 0) & (place < self.tokens) & (image >= 0)[:, None]
        index = place.clamp(0, self.tokens - 1)[:, :, None].expand(-1, -1, projected.shape[-1])
        return torch.where(there[:, :, None], projected.gather(1, index), embeds)

    def hidden(self, embeds: Tensor) -> Tensor:
        """Hidden states [B, T, H]."""
        return passes.hidden_states(self.language, embeds, self.rotary)

    def at(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Hidden states [B, n, H] at places [B, n]."""
        return torch.bmm(networks.one_hot(places, hidden.shape[1], self.dtype), hidden)

    def condition(self, hidden: Tensor, length: Tensor) -> Tensor:
        """Conditions [B, L, Z] of hidden states whose queries begin at `length` [B]."""
        return self.language.condition(self.states(hidden, length))

    def states(self, hidden: Tensor, length: Tensor) -> Tensor:
        """Hidden states [B, L, H] at the queries, which begin at `length` [B]."""
        return self.at(hidden, length[:, None] + torch.arange(self.tokens, device=hidden.device))


@torch.no_grad()
def states_of(
    language: LanguageModel, preset: Preset, vocabulary: int, rows: Rows, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Hidden states [N, L, H] at the queries of requests in rows, part by part; the projector makes the conditions of them."""
    width = -(-(int(rows.length.max()) + preset.tokens) // 8) * 8
    reading = Reading(language, preset, vocabulary, width, dtype)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        ids = torch.from_numpy(rows.ids[part, :width]).to(language.device).long()
        length = torch.from_numpy(rows.length[part]).to(language.device).long()
        yield reading.states(reading.hidden(reading.embed(reading.with_queries(ids, length))), length)


@torch.no_grad()
def conditions_of(language: LanguageModel, preset: Preset, vocabulary: int, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Conditions [N, L, Z] of requests in rows, in `dtype`."""
    states = states_of(language, preset, vocabulary, rows, dtype)
    return torch.cat([language.condition(part).to(dtype) for part in states])


class Loss:
    """Draws a batch of rows and computes the stage's loss."""

    def __init__(
        self,
        reading: Reading,
        rows: dict[str, OnDevice],
        latents: Tensor,
        conditions: Tensor,
        batch: Batch,
        yes_no: tuple[int, int],
    ) -> None:
        """`latents` [P, L·C] of all pictures, `conditions` [W, L, Z] of all prompts of requests."""
        self.reading, self.rows, self.latents, self.batch, self.yes_no = reading, rows, latents, batch, yes_no
        self.conditions = conditions.flatten(1)
        self.variance = conditions[:8192].float().var(0).mean()  # between prompts
        self.answer_width = max(int((one.length - one.answer).max()) for one in rows.values())
        self.device = latents.device

    def __call__(self) -> tuple[Tensor, Metrics]:
        reading, batch = self.reading, self.batch
        counts = [getattr(batch, name) for name in GROUPS]
        chosen = [
            torch.randint(len(self.rows[name]), (count,), device=self.device)
            for name, count in zip(GROUPS, counts, strict=True)
        ]

        def column(field: str) -> Tensor:
            parts = [
                getattr(self.rows[name], field).index_select(0, row) for name, row in zip(GROUPS, chosen, strict=True)
            ]
            return torch.cat(parts)

        ids, length, answer = column("ids").long(), column("length"), column("answer")
        queries = batch.draw + batch.follow
        first, last = batch.draw, queries + batch.read + batch.own + batch.shown
        asked = torch.cat([reading.with_queries(ids[:queries], length[:queries]), ids[queries:]])
        embeds = reading.embed(asked)
        shown = reading.with_pictures(
            embeds[first:last], self._latents(column("picture")[first:last]), column("image")[first:last]
        )
        hidden = reading.hidden(torch.cat([embeds[:first], shown, embeds[last:]]))
        condition = reading.condition(hidden[:queries], length[:queries])
        wanted = self.conditions.index_select(0, column("wish")[:queries]).view_as(condition)
        off = (condition.float() - wanted.float()).square().mean() / self.variance
        losses, weight, right = self._answers(hidden, ids, length, answer)
        text = (losses * weight).sum() / weight.sum()
        metrics: Metrics = {"text": text, "condition": off}
        start = 0
        for name, count in zip(GROUPS, counts, strict=True):
            part = slice(start, start + count)
            metrics[name] = (losses[part] * weight[part]).sum() / weight[part].sum().clamp(min=1e-6)
            if name in ("read", "own"):
                is_asked, is_right = right[0][part], right[1][part]
                metrics[f"{name}_yes_no"] = (is_asked * is_right).sum() / is_asked.sum().clamp(min=1)
            start += count
        return text + CONDITION_WEIGHT * off, metrics

    def _latents(self, pictures: Tensor) -> Tensor:
        """Latents [B, L, C] float32 of pictures, half of them noisy."""
        shape = (-1, self.reading.tokens, self.reading.channels)
        latents = self.latents.index_select(0, pictures).float().view(shape)
        noisy = (torch.rand(len(pictures), 1, 1, device=self.device) < 0.5).float()
        sigma = noisy * joint.READING_NOISE * torch.rand(len(pictures), 1, 1, device=self.device)
        return latents + sigma * torch.randn_like(latents)

    def _answers(
        self, hidden: Tensor, ids: Tensor, length: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Cross-entropies [B, A] of answers, the weight of each token, 1 / sqrt(length of its answer), and which [B] rows are answered
        by yes or no, and rightly."""
        places = answer[:, None] + torch.arange(self.answer_width, device=self.device)
        real = (places < length[:, None]).float()
        places = places.clamp(max=self.reading.width - 1)
        targets = ids.gather(1, places)
        logits = self.reading.language.lm_head(self.reading.at(hidden, places - 1)).float()  # [B, A, V]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(real)
        weight = real / real.sum(1, keepdim=True).sqrt().clamp(min=1)
        yes, no = self.yes_no
        asked = ((targets[:, 0] == yes) | (targets[:, 0] == no)).float() * real[:, 0]
        return losses, weight, (asked, (logits[:, 0].argmax(-1) == targets[:, 0]).float())


class Held(FlatModel):
    """A model that each step pulls towards given weights, after `hold`.

    What the joint stage taught about all combinations of names, held-out ones too, is lost by degrees when only the world's own names are
    asked for; near the joint stage's weights it is kept.
    """

    anchor: Tensor | None = None
    pull = 0.0

    def hold(self, anchor: Mapping[str, Tensor], pull: float) -> None:
        """Pulls all weights to those of `anchor` from now on, `pull` of the way in a step at the full learning rate."""
        before = self.master.clone()
        self.set_tensors({name: anchor[name].to(self.device) for name in self.tensors()})
        self.anchor, self.pull = self.master.clone(), pull
        self.master.copy_(before)

    @torch.no_grad()
    def apply(self, norm: Tensor) -> None:
        """`FlatModel.apply` after the pull."""
        if self.anchor is not None:
            self.master.add_((self.anchor - self.master) * (self.pull * self.learning_rate()))
        super().apply(norm)


# The stage ----------------------------------------------------------------------------------------------------------------------


def finish(language: dict[str, Tensor], start: Path, folder: Path) -> None:
    """Writes model.safetensors: the language model's averaged weights, and the velocity network of the exported model `start`."""
    kept = {name: tensor for name, tensor in export.stored(start).items() if name.startswith(export.DIT)}
    common.save_weights(folder / "model.safetensors", kept | language, FLOAT32)


def arguments() -> argparse.ArgumentParser:
    """The stage's arguments."""
    parser = common.parser(__doc__, steps=12_000, seconds=200, lr=8e-4, muon_lr=0.01, ema=0.998, decay=0.5, warmup=100)
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR", required=True, help="exported model to begin with (it also draws)"
    )
    parser.add_argument("--language", type=Path, metavar="DIR", help="go on with the language model of these weights")
    parser.add_argument("--anchor", type=Path, metavar="DIR", help="stay near the language model of these weights")
    parser.add_argument(
        "--pull", type=float, default=0.002, help="share of the way to the anchor that a step goes, times the schedule"
    )
    parser.add_argument(
        "--begin-at", type=float, default=0.6, help="where to begin: 0 at the anchor, 1 at the weights to go on with"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="also make the folder of the new model")
    parser.add_argument(
        "--end-after",
        type=float,
        metavar="S",
        help="plan as many steps as end S seconds after the start of this process",
    )
    for name in GROUPS:
        parser.add_argument(f"--{name}-batch", type=int, default=getattr(Batch(), name))
    parser.add_argument("--read-pool", type=int, default=400_000, help="scenes to read")
    parser.add_argument("--draw-pool", type=int, default=60_000, help="prompts whose conditions are kept")
    parser.add_argument("--other-pool", type=int, default=200_000, help="outside requests")
    parser.add_argument("--own-pool", type=int, default=120_000, help="own drawings")
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="DIR",
        nargs="*",
        default=[],
        help="exported models that draw worse, as the joint stage's",
    )
    parser.add_argument("--earlier-pool", type=int, default=20_000, help="drawings of each of these models")
    parser.add_argument(
        "--pools",
        type=Path,
        metavar="DIR",
        help="keep all rows but those about own drawings here, for further runs of the same sizes",
    )
    parser.add_argument("--draw-at-once", type=int, default=4_000, help="own drawings of a batch")
    return parser


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    args = arguments().parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "reader"
    words = common.vocabulary(args.out, cased=True)
    write = Writer(words.tokenizer, words.pad, preset.tokens)
    start = time.perf_counter()
    makers = Makers(args.workers, write)
    amounts = [args.own_pool, *(args.earlier_pool for _ in args.earlier)]
    wished = [
        [makers.ask(wish_chunk, number, count, args.seed) for number, count in _sizes(amount, place * EARLIER)]
        for place, amount in enumerate(amounts)
    ]
    asked = _ask_for_pools(args, makers)

    args.start_from = _cased(args.start_from, words, args.out / export.CASED)
    device, dtype = prepare_device(args.device)
    common.set_seed(args.seed)
    folders = [
        args.start_from,
        *(_cased(earlier, words, args.out / f"earlier-{place}") for place, earlier in enumerate(args.earlier, 1)),
    ]
    models = [drawing_model(exported, words, preset, device, dtype) for exported in folders]
    drawn = []
    for place, draws in enumerate(models):
        first = sum(amounts[:place])
        drawn.append(_drawings(args, makers, words, preset, draws, wished[place], first, place * EARLIER))
    say(f"drawings: {time.perf_counter() - start:.1f} s")
    made = asked()
    rows = made.rows | {"own": Rows.joined([about for _, about in drawn])}
    conditions = conditions_of(models[0].language, preset, words.size, made.prompts, dtype)
    makers.close()
    say(
        f"all rows: {time.perf_counter() - start:.1f} s; "
        + ", ".join(f"{name} {len(r):,d}" for name, r in rows.items())
    )
    if empty := [name for name, part in rows.items() if not len(part)]:
        raise SystemExit(
            f"{args.start_from}: gives no rows of {', '.join(empty)} to learn from; draw more (--own-pool), or begin with a model that "
            "draws better"
        )
    siglip = networks.build_encoder(common.vocabulary(args.out).encoder_config(preset))
    common.fill(siglip, common.load_weights(args.start_from / settings.ENCODER_NAME / "model.safetensors"))
    siglip = siglip.requires_grad_(False).eval().to(device)
    of_scenes = pools.latent_pool(siglip, made.scenes, preset, device, made.second)
    latents = torch.cat([of_scenes, *(part for part, _ in drawn)])
    say(f"latents: {time.perf_counter() - start:.1f} s")
    del models, drawn, siglip
    if device.type == "cuda":
        torch.cuda.empty_cache()

    common.set_seed(args.seed)
    _, language, _ = networks.build_joint(words.model_config(preset))
    model = Held({"": language}, device, dtype, common.optimizer_options(args), args.steps, keeps_float32)
    begin = export.stored(args.start_from)
    if args.language:
        begin = export.grown(export.stored(args.language), common.vocabulary_of(args.language), words)
    if args.anchor:
        anchor = export.grown(export.stored(args.anchor), common.vocabulary_of(args.anchor), words)
        model.hold(anchor, args.pull)
        begin = {name: anchor[name].float().lerp(begin[name].float(), args.begin_at) for name in model.tensors()}
    model.set_tensors({name: begin[name].to(device) for name in model.tensors()})
    if args.end_after:
        args.seconds = max(1.0, args.end_after - process_seconds() - COMPILING)
    batch = Batch(**{name: getattr(args, f"{name}_batch") for name in GROUPS})
    reading = Reading(language, preset, words.size, lessons.WIDTH, dtype)
    on_device = {name: OnDevice(part, device, args.read_pool if name == "own" else 0) for name, part in rows.items()}
    yes, no = (words.tokenizer.plain(word)[0] for word in (world.YES, world.NO))
    loss = Loss(reading, on_device, latents, conditions, batch, (yes, no))
    compiled = [] if args.no_compile else [*language.model.layers, language.model.norm]
    trainer = Trainer(
        model,
        loss,
        loop_options(args),
        folder,
        common.fingerprint(
            preset,
            model.options,
            batch=vars(batch),
            pools=[args.read_pool, args.draw_pool, args.other_pool, *amounts],
            seed=args.seed,
        ),
        compiled,
        lambda: finish(model.tensors(), args.start_from, folder),
    )
    outcome = trainer.run()
    finish(model.tensors(), args.start_from, folder)
    if args.export:
        export.replaced(args.start_from, args.export, export.stored(folder))
    if outcome == "finished":
        (folder / "finished").touch()
    return outcome == "finished"


def _ask_for_pools(args: argparse.Namespace, makers: Makers) -> Callable[[], Made]:
    """Has the makers begin with all streams but the own drawings; call what is returned for them. They are read from `--pools` if they
    are there, else written there."""
    file = args.pools and args.pools / f"pools-{args.read_pool}-{args.draw_pool}-{args.other_pool}.npz"
    if file and file.is_file():
        return functools.partial(Made.load, file)
    drawn = [
        makers.ask(draw_chunk, number, count, args.seed, args.read_pool) for number, count in _sizes(args.draw_pool)
    ]
    read = [makers.ask(read_chunk, number, count, args.seed) for number, count in _sizes(args.read_pool)]
    other = [
        makers.ask(other_chunk, number, count, args.seed, args.read_pool) for number, count in _sizes(args.other_pool)
    ]

    def collect() -> Made:
        prompts, plain, follow = (Rows.joined(list(part)) for part in zip(*(chunk() for chunk in drawn), strict=True))
        chunks, others = [chunk() for chunk in read], [chunk() for chunk in other]
        scenes, second = (data.joined_scenes([chunk[i] for chunk in chunks]) for i in range(2))
        rows = {"draw": plain, "follow": follow, "read": Rows.joined([chunk[2] for chunk in chunks])}
        rows |= {name: Rows.joined([chunk[name] for chunk in others]) for name in others[0]}
        made = Made(scenes, second, prompts, rows)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            made.save(file)
        return made

    return collect


def _cased(folder: Path, words: Vocabulary, target: Path) -> Path:
    """The folder of an exported model, or `target`, made from it, if its tokenizer lacks titles and capitals."""
    if common.vocabulary_of(folder).size == words.size:
        return folder
    export.in_cases(folder, target)
    return target


@dataclass(frozen=True)
class DrawingModel:
    """An exported model on the device."""

    folder: Path
    config: ScaleRAEConfig
    language: LanguageModel
    dit: DiT
    device: torch.device
    dtype: torch.dtype


def drawing_model(
    folder: Path, words: Vocabulary, preset: Preset, device: torch.device, dtype: torch.dtype
) -> DrawingModel:
    """The exported model in `folder`, whose tokenizer has the vocabulary `words`."""
    config, language, dit = networks.build_joint(words.model_config(preset))
    everything = FlatModel({"": language, joint.PREFIX: dit}, device, dtype, OptimizerOptions(), 1, keeps_float32)
    joint.start_from(everything, folder)
    return DrawingModel(folder, config, language, dit, device, dtype)


def _drawings(
    args: argparse.Namespace,
    makers: Makers,
    words: Vocabulary,
    preset: Preset,
    model: DrawingModel,
    wished: Sequence[Any],
    first: int,
    chunk: int,
) -> tuple[Tensor, Rows]:
    """Latents [N, L·C] of a model's drawings, which count from `first`, and the lessons about them, whose chunks count from `chunk`."""
    chunks = [one() for one in wished]
    wishes = [wish for part, _ in chunks for wish in part]
    asked_for = Rows.joined([asked for _, asked in chunks])
    conditions = conditions_of(model.language, preset, words.size, asked_for, model.dtype)
    decoder = PixelDecoder(settings.decoder_sizes(preset))
    tensors = torch.load(model.folder / "decoder" / "model.pt", map_location="cpu", weights_only=True)
    common.fill(decoder, tensors)
    decoder = decoder.eval().to(model.device, model.dtype)
    stored = export.stored(model.folder)
    statistics = (stored["diff_head.data_mean"].flatten(), stored["diff_head.data_std"].flatten())
    fast = model.device.type == "cuda" and not args.no_compile and len(wishes) >= COMPILE_FROM
    compiled = [*model.dit.dit_blocks, model.dit.final_layer] if fast else []
    compile_forward(compiled)
    latents: list[Tensor] = []
    asked: list[Any] = []  # chunks to come
    done = 0
    drawn = own.drawings(model.config, model.dit, decoder, statistics, conditions, args.draw_at_once)
    for number, (part, pictures) in enumerate(drawn):
        latents.append(part)
        for start in range(0, len(pictures), 500):
            some = slice(start, start + 500)
            at = done + start
            of_these = wishes[at : at + len(pictures[some])]
            asked.append(makers.ask(own_chunk, chunk + len(asked), of_these, pictures[some], first + at, args.seed))
        done += len(pictures)
        if number % 5 == 0:
            say(f"drew {done} of {len(wishes)}")
    restore_forward(compiled)
    parts = [one() for one in asked]
    totals: dict[str, list[int]] = {}
    for _, counts in parts:
        for kind, (right, total) in counts.items():
            sums = totals.setdefault(kind, [0, 0])
            sums[0], sums[1] = sums[0] + right, sums[1] + total
    say(
        f"drawings of {model.folder}, right: " + ", ".join(f"{kind} {a}/{b}" for kind, (a, b) in sorted(totals.items()))
    )
    return torch.cat(latents), Rows.joined([rows for rows, _ in parts])


if __name__ == "__main__":
    main()
