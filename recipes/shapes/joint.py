"""Stage 4: language model, latent queries and velocity network together, on the frozen encoder's latents.

A step runs three groups of sequences through the language model at once:

- drawing: chat(request) + reply + <im_start> + the L latent queries. Text loss on the reply; the hidden states at the queries
  are the condition of `copies` noisy latents each, for the flow loss. Some such requests follow a picture, which they ignore.
- naming: requests in quads that exchange names, some of them made up (`data.quad`), with queries but no picture.
- reading: chat with a picture's latents and a question, and the answer, which is learnt.
- small talk: text only.

Two auxiliary losses shape the condition. One holds those of drawing and naming to what the prompt says: from each token's
condition, one linear layer (dropped after training) tells shapes, colours, relation and number. Without it the early velocity
network, which cannot use the condition yet, presses the differences between prompts out of it. The other makes conditions add
up: y(p) + y(q) = y(r) + y(s) in a quad. A velocity network draws pairs it never saw from such sums; a language model left to
itself learns the few pairs of names by heart.

Flow loss: |v - (noise - data)|² at x_t = (1 - t) data + t noise, t = shift(sigmoid(normal)), on latents normalised channel by
channel. A tenth of the conditions is replaced by the null embedding, for guidance.

    python -m recipes.shapes.joint --out runs/shapes
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.shapes import common, data, networks, pools
from recipes.shapes.common import Vocabulary
from recipes.shapes.data import Chunk, Texts
from recipes.shapes.decoder import frozen_encoder
from recipes.shapes.loop import Metrics, Trainer, loop_options, prepare_device, say, warn
from recipes.shapes.settings import CLASS_DROPOUT, Preset
from scale_rae.config import ScaleRAEConfig
from scale_rae.dit import DiT
from scale_rae.fast_weights import crop_swiglu, grown_swiglu
from scale_rae.language import LanguageModel
from scale_rae.layout import keeps_float32
from scale_rae.shapes import world
from scale_rae.training import passes
from scale_rae.training.losses import flow_errors, sample_times, training_shift
from scale_rae.training.optim import FlatModel, OptimizerOptions

READING_NOISE = 0.3  # as encoder.NOISE, on half of the latents that are read: generated ones are never clean
TEXT_WEIGHT = 0.3
ATTRIBUTE_WEIGHT = 0.1
ADDITIVE_WEIGHT = 0.03
# Of the conditions' deviation: conditions of new names are a little off what the network was shown.
CONDITION_NOISE = 0.25
PREFIX = "diff_head.model."


@dataclass(frozen=True)
class Batch:
    """Rows of each kind in a step; `copies` noisy latents for each drawing condition."""

    draw: int = 480
    follow: int = 32  # drawings asked for after a picture was shown
    name: int = 64
    read: int = 384
    chat: int = 16
    copies: int = 2


class Sequences:
    """N token sequences on the device, completed to a common length with queries or image places.

    Ids from `vocabulary` on stand for the latent queries in order. An image's places hold padding; `Loss` puts the
    projected latents there.
    """

    def __init__(self, ids: Tensor, length: Tensor, answer: Tensor) -> None:
        self.ids, self.length, self.answer = ids, length, answer

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls,
        texts: Texts,
        device: torch.device,
        pad: int,
        width: int,
        head: tuple[int, ...] = (),
        tail: tuple[int, ...] = (),
    ) -> Sequences:
        """`head` is put before every text and counts in `answer`; `tail` right after its last token, and does not count in
        `length`."""
        ids = torch.full((len(texts), width), pad, dtype=torch.int16, device=device)
        body = torch.from_numpy(texts.ids).to(device)
        length = torch.from_numpy(texts.length).to(device).long()
        ids[:, : len(head)] = torch.tensor(head, dtype=torch.int16, device=device)
        ids[:, len(head) : len(head) + body.shape[1]] = body
        if tail:
            places = len(head) + length[:, None] + torch.arange(len(tail), device=device)
            ids.scatter_(1, places, torch.tensor(tail, dtype=torch.int16, device=device).expand(len(ids), -1))
        return cls(ids, length + len(head), torch.from_numpy(texts.answer).to(device).long() + len(head))


def shared_width(preset: Preset, words: Vocabulary, requests: tuple[Texts, ...], reads: Texts) -> int:
    """Length that every sequence fits in, a multiple of 8."""
    head = len(words.encoder.image_head)
    longest = max(*(int(texts.length.max()) for texts in requests), head + int(reads.length.max())) + preset.tokens
    return -(-longest // 8) * 8


class Pools:
    """All training data on the device."""

    def __init__(
        self,
        preset: Preset,
        words: Vocabulary,
        draws: Chunk,
        names: Chunk,
        reads: Chunk,
        latents: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> None:
        """`latents` of the drawing and the reading scenes: [N, L·C] bfloat16."""
        self.width = shared_width(preset, words, (draws.texts, names.texts), reads.texts)
        self.draw_latents, self.read_latents = latents
        self.tokens, self.channels, self.side = preset.tokens, preset.channels, preset.side
        encoder, pad = words.encoder, words.pad
        self.image_place = len(encoder.image_head)
        queries = tuple(range(words.size, words.size + preset.tokens))
        self.draw = Sequences.of(draws.texts, device, pad, self.width, tail=queries)
        self.name = Sequences.of(names.texts, device, pad, self.width, tail=queries)
        head = (*encoder.image_head, *(pad,) * preset.tokens)
        self.read = Sequences.of(reads.texts, device, pad, self.width, head=head)
        self.attributes, self.name_attributes = (
            torch.from_numpy(chunk.attributes).to(device).long() for chunk in (draws, names)
        )  # [N, 10]
        # What stands before a request that follows a picture, in the place of `text_head` tokens.
        self.text_head = len(encoder.head)
        self.shown_head = torch.tensor([*head, *encoder.image_between], device=device)
        self.chat = Sequences.of(data.chats(encoder), device, pad, self.width)
        self.answer_width = int((self.read.length - self.read.answer).max())
        self.chat_width = int((self.chat.length - self.chat.answer).max())
        self.reply = torch.tensor(encoder.reply, device=device)
        yes, no = (words.tokenizer.plain(word)[0] for word in (world.YES, world.NO))
        self.yes_no = (yes, no)
        # Mean and deviation of each channel, for the flow: [C] float32.
        sample = self.draw_latents[:50_000].float().view(-1, self.channels)
        self.mean, self.std = sample.mean(0), sample.std(0)


class Loss:
    """Draws a batch from the pools and computes the stage's loss."""

    def __init__(
        self,
        config: ScaleRAEConfig,
        language: LanguageModel,
        dit: DiT,
        pools: Pools,
        batch: Batch,
        dtype: torch.dtype,
        noise: float = CONDITION_NOISE,
    ) -> None:
        """`noise` is the conditions', in their standard deviations between prompts."""
        self.noise = noise
        self.language, self.dit, self.pools, self.batch, self.dtype = language, dit, pools, batch, dtype
        self.further = len(pools.shown_head) - pools.text_head  # places by which a picture shifts a request
        self.shown_width = -(-(pools.width + self.further) // 8) * 8
        self.rotary = passes.positions(language, pools.width, dtype)
        self.shown_rotary = passes.positions(language, self.shown_width, dtype)
        self.vocabulary = config.vocab_size
        self.table_size = -(-(config.vocab_size + pools.tokens) // 8) * 8
        self.shift = training_shift(config)
        self.device = language.device

    def __call__(self) -> tuple[Tensor, Metrics]:
        pools, batch = self.pools, self.batch
        draw, follow, quads, read, chat = (
            torch.randint(size, (count,), device=self.device)
            for size, count in (
                (len(pools.draw), batch.draw),
                (len(pools.draw), batch.follow),
                (len(pools.name) // 4, batch.name // 4),
                (len(pools.read), batch.read),
                (len(pools.chat), batch.chat),
            )
        )
        name = (quads[:, None] * 4 + torch.arange(4, device=self.device)).flatten()
        draw_ids, name_ids, read_ids, chat_ids = (
            sequences.ids.index_select(0, rows).long()
            for sequences, rows in ((pools.draw, draw), (pools.name, name), (pools.read, read), (pools.chat, chat))
        )
        embeds = self.embed(torch.cat([draw_ids, name_ids, read_ids, chat_ids]))
        asked = batch.draw + batch.name
        end = asked + batch.read
        reading = self._with_image(embeds[asked:end], self._read_latents(read))
        hidden = passes.hidden_states(self.language, torch.cat([embeds[:asked], reading, embeds[end:]]), self.rotary)
        latents = self._read_latents(torch.randint(len(self.pools.read), (len(follow),), device=self.device))
        shown = passes.hidden_states(self.language, self.after_pictures(follow, latents), self.shown_rotary)

        length = pools.draw.length.index_select(0, draw)
        shown_length = pools.draw.length.index_select(0, follow) + self.further
        rows = torch.cat([draw, follow])
        drawing = torch.cat([self.queried(hidden[: batch.draw], length), self.queried(shown, shown_length)])
        naming = self.queried(hidden[batch.draw : asked], pools.name.length.index_select(0, name))
        flow = self._flow(rows, drawing)
        told, known = self.attributes(drawing, pools.attributes.index_select(0, rows))
        names, named = self.attributes(naming, pools.name_attributes.index_select(0, name))
        additive = self.additive(naming)
        replies = self.replies(hidden[: batch.draw], length)
        replies_shown = self.replies(shown, shown_length)
        answers, right = self._answers(hidden[asked:end], read_ids, pools.read, read, pools.answer_width)
        talk, _ = self._answers(hidden[end:], chat_ids, pools.chat, chat, pools.chat_width)
        text = replies + answers + 0.1 * (talk + replies_shown)
        loss = flow + TEXT_WEIGHT * text + ATTRIBUTE_WEIGHT * (told + names) + ADDITIVE_WEIGHT * additive
        metrics = {"flow": flow, "attributes": told, "known": known, "reply": replies, "answer": answers, "talk": talk}
        return loss, metrics | {"yes_no": right, "names": names, "named": named, "additive": additive}

    def additive(self, condition: Tensor) -> Tensor:
        """How far quads of conditions [4 Q, L, Z] are from adding up: the mean square of what is left over, of the mean square
        of the differences that were exchanged (both follow the scale: conditions do not add up better by being alike)."""
        p, q, r, s = condition.float().view(-1, 4, *condition.shape[1:]).unbind(1)  # each [Q, L, Z]
        left: Tensor = (p + q - r - s).square().mean() / (p - r).square().mean()
        return left

    def _with_image(self, embeds: Tensor, latents: Tensor) -> Tensor:
        """Embeddings [B, T, H] with the projected latents [B, L, C] in the image's places."""
        place, tokens = self.pools.image_place, self.pools.tokens
        image = self.language.model.mm_projector(latents.to(self.dtype))
        return torch.cat([embeds[:, :place], image, embeds[:, place + tokens :]], dim=1)

    def after_pictures(self, rows: Tensor, latents: Tensor) -> Tensor:
        """Embeddings [B, T, H] of requests of the drawing pool, each after a picture, of which `latents` [B, L, C] are given."""
        pools = self.pools
        request = pools.draw.ids.index_select(0, rows).long()[:, pools.text_head :]
        ids = torch.cat([pools.shown_head.expand(len(rows), -1), request], dim=1)
        ids = F.pad(ids, (0, self.shown_width - ids.shape[1]))
        return self._with_image(self.embed(ids), latents)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [B, T, H] of ids [B, T] that may stand for latent queries."""
        model = self.language.model
        table = torch.cat([model.embed_tokens.weight, model.latent_queries])
        table = F.pad(table, (0, 0, 0, self.table_size - len(table)))
        return networks.one_hot(ids, self.table_size, self.dtype) @ table

    def queried(self, hidden: Tensor, length: Tensor) -> Tensor:
        """Condition [B, L, Z] of hidden states [B, T, H] whose queries begin at `length` [B]."""
        places = length[:, None] + torch.arange(self.pools.tokens, device=self.device)
        return self.language.condition(self._at(hidden, places))

    def _at(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Hidden states [B, n, H] at places [B, n]."""
        return torch.bmm(networks.one_hot(places, hidden.shape[1], self.dtype), hidden)

    def _read_latents(self, rows: Tensor) -> Tensor:
        """Latents [B, L, C] float32 to be read, half of them noisy."""
        latents = self.pools.read_latents.index_select(0, rows).float().view(-1, self.pools.tokens, self.pools.channels)
        noisy = (torch.rand(len(rows), 1, 1, device=self.device) < 0.5).float()
        sigma = noisy * READING_NOISE * torch.rand(len(rows), 1, 1, device=self.device)
        return latents + sigma * torch.randn_like(latents)

    def _flow(self, rows: Tensor, condition: Tensor) -> Tensor:
        pools, copies = self.pools, self.batch.copies
        latents = pools.draw_latents.index_select(0, rows).float().view(-1, pools.tokens, pools.channels)
        latents = ((latents - pools.mean) / pools.std).transpose(1, 2)  # [B, C, L]
        latents = latents.reshape(-1, pools.channels, pools.side, pools.side).repeat(copies, 1, 1, 1)  # [K·B, C, S, S]
        condition = self._noisy(condition.repeat(copies, 1, 1))
        count = len(latents)
        dropped = torch.rand(count, 1, 1, device=self.device) < CLASS_DROPOUT
        assert self.dit.null_condition is not None
        condition = torch.where(dropped, self.dit.null_condition, condition)
        t = sample_times(count, self.shift, device=self.device)
        noise = torch.randn_like(latents)
        return flow_errors(self.dit, latents, condition, t, noise).mean()

    def _noisy(self, condition: Tensor) -> Tensor:
        """Conditions [B, L, Z] with noise, half of it common to an image's tokens."""
        deviation = self.noise * condition.detach().float().std(0).mean()
        common = torch.randn(len(condition), 1, condition.shape[-1], device=self.device)
        noise = (common + torch.randn(condition.shape, device=self.device)) / 2**0.5
        return condition + (deviation * noise).to(condition.dtype)

    def attributes(self, condition: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of what the prompt says [B, 10] at every token's condition [B, L, Z], and how often the last is all
        right."""
        head = self.language.get_submodule("attribute_head")
        logits = head(condition).float().split(list(data.ATTRIBUTES), dim=-1)
        losses, right = [], []
        for i, part in enumerate(logits):
            target = told[:, i : i + 1].expand(-1, part.shape[1])
            losses.append(F.cross_entropy(part.flatten(0, 1), target.flatten()))
            right.append(part[:, -1].argmax(-1) == told[:, i])
        return torch.stack(losses).mean(), torch.stack(right).all(0).float().mean()

    def replies(self, hidden: Tensor, length: Tensor) -> Tensor:
        """Cross-entropy of the reply before the picture, which is the same for every request."""
        count = len(self.pools.reply)
        places = length[:, None] - count - 1 + torch.arange(count, device=self.device)
        logits = self.language.lm_head(self._at(hidden, places)).float()
        return F.cross_entropy(logits.flatten(0, 1), self.pools.reply.repeat(len(hidden)))

    def _answers(
        self, hidden: Tensor, ids: Tensor, sequences: Sequences, rows: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of answers, each token weighing 1/sqrt(length of its answer), and how many yes and no are right."""
        answer = sequences.answer.index_select(0, rows)
        length = sequences.length.index_select(0, rows)
        places = answer[:, None] + torch.arange(width, device=self.device)  # [B, width]
        real = (places < length[:, None]).float()
        places = places.clamp(max=ids.shape[1] - 1)
        targets = ids.gather(1, places)
        logits = self.language.lm_head(self._at(hidden, places - 1)).float()  # [B, width, V]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(real)
        weight = real / real.sum(1, keepdim=True).sqrt()
        yes, no = self.pools.yes_no
        asked = ((targets[:, 0] == yes) | (targets[:, 0] == no)).float()
        right = (logits[:, 0].argmax(-1) == targets[:, 0]).float() * asked
        return (losses * weight).sum() / weight.sum(), right.sum() / asked.sum().clamp(min=1)


def flops(preset: Preset, model: FlatModel, pools: Pools, batch: Batch) -> float:
    """Floating-point operations of a step: 6 a matrix element and token, and attention."""
    sizes = {name: t.numel() for name, t in model.tensors().items() if t.dim() == 2 and "embed_tokens" not in name}
    sequences = batch.draw + batch.name + batch.read + batch.chat
    tokens = sequences * pools.width + batch.follow * (pools.width + preset.tokens)
    drawn = (batch.draw + batch.follow) * batch.copies
    language = sum(n for name, n in sizes.items() if ".layers." in name) * tokens
    dit = sum(n for name, n in sizes.items() if ".dit_blocks." in name or ".final_layer." in name)
    dit *= drawn * preset.tokens
    attention = preset.language_depth * tokens * pools.width * preset.language_width
    attention += 2 * preset.dit_depth * drawn * preset.tokens**2 * preset.dit_width
    return 6.0 * (language + dit + attention)


# The stage --------------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Scenes and texts, before the device is touched."""

    draw: Chunk
    name: Chunk
    read: Chunk


def make_data(args: argparse.Namespace, words: Vocabulary) -> Data:
    """Scenes and texts of all pools."""
    start = time.perf_counter()
    chunks = Data(
        data.make("draw", args.draw_pool, args.seed, words.encoder, data.DRAW_KINDS, args.workers),
        data.make("name", args.name_pool, args.seed, words.encoder, data.DRAW_KINDS, args.workers),
        data.make("read", args.read_pool, args.seed, words.encoder, data.READ_KINDS, args.workers),
    )
    say(f"{args.draw_pool} + {args.name_pool} + {args.read_pool} scenes and texts: {time.perf_counter() - start:.1f} s")
    return chunks


def make_pools(
    args: argparse.Namespace, chunks: Data, words: Vocabulary, preset: Preset, device: torch.device
) -> Pools:
    """Latents of all scenes on the device. A benchmark without an encoder gets random ones."""
    start = time.perf_counter()
    if args.bench and not (args.out / "encoder" / "encoder.safetensors").is_file():
        shape = preset.tokens * preset.channels
        latents = tuple(torch.randn(len(c.texts), shape, device=device).bfloat16() for c in (chunks.draw, chunks.read))
    else:
        siglip = frozen_encoder(args, words, preset, device)
        latents = tuple(
            pools.latent_pool(siglip, c.scenes, preset, device, c.second) for c in (chunks.draw, chunks.read)
        )
    made = Pools(preset, words, chunks.draw, chunks.name, chunks.read, (latents[0], latents[1]), device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    size = sum(t.nbytes for t in latents) / 1e9
    say(f"latents, {size:.1f} GB, sequences of {made.width}: {time.perf_counter() - start:.1f} s")
    return made


def build(
    words: Vocabulary, preset: Preset, device: torch.device, dtype: torch.dtype, options: OptimizerOptions, steps: int
) -> tuple[ScaleRAEConfig, LanguageModel, DiT, FlatModel]:
    """Fresh networks in a `FlatModel`."""
    config, language, dit = networks.build_joint(words.model_config(preset))
    language.attribute_head = nn.Linear(config.dit.condition_width, sum(data.ATTRIBUTES))  # training only
    model = FlatModel({"": language, PREFIX: dit}, device, dtype, options, steps, keeps_float32)
    return config, language, dit, model


def weights(model: FlatModel) -> dict[str, Tensor]:
    """Averaged parameters under their published names."""
    tensors = {name: t for name, t in model.tensors().items() if not name.startswith("attribute_head.")}
    return crop_swiglu(tensors)


def start_from(model: FlatModel, folder: Path) -> None:
    """Takes the weights of an exported model; what it lacks (the attribute head) stays as initialised."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= common.load_weights(file)
    fresh = model.tensors(averaged=False)
    model.set_tensors(
        {name: grown_swiglu(stored[name], t) if name in stored else t.clone() for name, t in fresh.items()}
    )


def finish(model: FlatModel, pools: Pools, folder: Path) -> None:
    """Writes model.safetensors: the averaged weights in bfloat16 and the latents' statistics in float32."""
    statistics = {"diff_head.data_mean": pools.mean[None], "diff_head.data_std": pools.std[None]}
    common.save_weights(folder / "model.safetensors", {**weights(model), **statistics}, tuple(statistics))


def arguments() -> argparse.ArgumentParser:
    """The stage's arguments."""
    parser = common.parser(__doc__, steps=45_000, seconds=1055, lr=1.5e-3, muon_lr=0.02, ema=0.9995, decay=0.4)
    default = Batch()
    parser.add_argument("--draw-batch", type=int, default=default.draw)
    parser.add_argument("--follow-batch", type=int, default=default.follow, help="drawings asked for after a picture")
    parser.add_argument("--name-batch", type=int, default=default.name, help="requests in quads, a multiple of 4")
    parser.add_argument("--read-batch", type=int, default=default.read)
    parser.add_argument("--chat-batch", type=int, default=default.chat)
    parser.add_argument("--copies", type=int, default=default.copies, help="noisy latents for each condition")
    parser.add_argument("--condition-noise", type=float, default=CONDITION_NOISE)
    parser.add_argument("--draw-pool", type=int, default=1_000_000, help="scenes to draw")
    parser.add_argument("--name-pool", type=int, default=300_000, help="requests in quads, a multiple of 4")
    parser.add_argument("--read-pool", type=int, default=1_000_000, help="scenes to read")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="begin with the weights of an exported model")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 on the CPU too")
    parser.add_argument("--compact", type=Path, metavar="DIR", help="also save a small state there, in files of 15 MB")
    parser.add_argument("--from-compact", type=Path, metavar="DIR", help="begin from such a state")
    parser.add_argument(
        "--variants",
        nargs="*",
        metavar="OPTIMIZER:DRAW:READ:COPIES",
        help="with --bench: settings to compare, for instance muon:1024:512:2 adamw:1024:512:2",
    )
    parser.add_argument("--profile", action="store_true", help="with --bench: also list the slowest kernels")
    return parser


def batch_of(args: argparse.Namespace) -> Batch:
    """`Batch` of parsed arguments."""
    return Batch(args.draw_batch, args.follow_batch, args.name_batch, args.read_batch, args.chat_batch, args.copies)


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    args = arguments().parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "joint"
    words = common.vocabulary(args.out)
    chunks = make_data(args, words)
    device, dtype = prepare_device(args.device)
    dtype = torch.bfloat16 if args.bfloat16 else dtype
    common.set_seed(args.seed)
    made = make_pools(args, chunks, words, preset, device)
    if args.bench:
        bench(args, words, preset, made, device, dtype)
        return False
    batch = batch_of(args)
    common.set_seed(args.seed)  # the same start whatever the pools took
    config, language, dit, model = build(words, preset, device, dtype, common.optimizer_options(args), args.steps)
    if args.start_from:
        start_from(model, args.start_from)
    loss = Loss(config, language, dit, made, batch, dtype, args.condition_noise)
    settings = common.fingerprint(
        preset,
        model.options,
        batch=vars(batch),
        pools=[args.draw_pool, args.name_pool, args.read_pool],
        condition_noise=args.condition_noise,
        seed=args.seed,
    )
    compiled = [] if args.no_compile else networks.compiled_parts(language, dit)
    trainer = Trainer(model, loss, loop_options(args), folder, settings, compiled, lambda: finish(model, made, folder))
    if args.from_compact and not (folder / "state.pt").is_file():
        trainer.load_compact(args.from_compact)
    outcome = trainer.run()
    finish(model, made, folder)
    if args.compact:
        trainer.save_compact(args.compact)
    if outcome == "finished":
        (folder / "finished").touch()
    return outcome == "finished"


def bench(
    args: argparse.Namespace, words: Vocabulary, preset: Preset, made: Pools, device: torch.device, dtype: torch.dtype
) -> None:
    """Times `--bench` steps of each variant."""
    own = f"{args.optimizer}:{args.draw_batch}:{args.read_batch}:{args.copies}"
    rows = []
    for variant in args.variants or [own]:
        kind, draw, read, copies = variant.split(":")
        batch = dataclasses.replace(batch_of(args), draw=int(draw), read=int(read), copies=int(copies))
        args.optimizer = kind
        config, language, dit, model = build(words, preset, device, dtype, common.optimizer_options(args), args.steps)
        loss = Loss(config, language, dit, made, batch, dtype, args.condition_noise)
        compiled = [] if args.no_compile else networks.compiled_parts(language, dit)
        trainer = Trainer(model, loss, loop_options(args), args.out / "bench", "", compiled)
        try:
            trainer.run()
        except torch.OutOfMemoryError as error:
            warn(f"{variant}: {error}")
            continue
        work = flops(preset, model, made, batch)
        row = f"{variant:24s} {trainer.pace * 1000:8.2f} ms a step  {work / trainer.pace / 1e12:7.1f} TFLOP/s"
        if device.type == "cuda":
            row += f"  peak {torch.cuda.max_memory_allocated() / 1e9:.0f} GB  graph {trainer.graph is not None}"
            torch.cuda.reset_peak_memory_stats()
        rows.append(row)
        say(row)
        if args.profile and device.type == "cuda":
            profile(trainer)
        del trainer, loss, model, language, dit
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say("\n".join(["", *rows]))


def profile(trainer: Trainer) -> None:
    """Lists the kernels that take the most time in three steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    try:
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(3):
                trainer._one()
            torch.cuda.synchronize()
        averages = recorded.key_averages()
        say(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80))
    except Exception as error:  # a profile is not worth losing the benchmark for
        warn(f"profiling failed: {error}")


if __name__ == "__main__":
    main()
