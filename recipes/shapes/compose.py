"""Stage 5: the language model learns to put conditions together, for the velocity network as it is.

The velocity network draws pairs it never saw when their condition is the sum that seen prompts make: y(circle, d) +
y(c, diamond) - y(c, d). The language model's own condition for such a pair is another, since it learnt the few pairs by heart.
Here its conditions of seen prompts stay what they are, those of prompts that exchange names (`data.quad`, many of them made up) learn to
add up, one linear layer must tell the names apart, and the answers are kept up. No picture is drawn, nothing held out is said.

    python -m recipes.shapes.compose --out runs/shapes
"""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from recipes.shapes import common, data, joint, networks, pools
from recipes.shapes.decoder import frozen_encoder
from recipes.shapes.loop import Metrics, Trainer, loop_options, prepare_device, say
from recipes.shapes.optim import FlatModel
from scale_rae.shapes import world

KINDS = tuple(kind for kind in data.DRAW_KINDS if kind != "mixed")
ADDITIVE_WEIGHT = 0.3
ATTRIBUTE_WEIGHT = 0.3
TEXT_WEIGHT = 0.3


class Loss:
    """Draws a batch from the pools and computes the stage's loss."""

    def __init__(self, parts: joint.Loss, target: Tensor) -> None:
        """`target` [N, L, Z] are the conditions of the drawing pool's requests, to be kept."""
        self.parts, self.target = parts, target
        self.spread = target.float().var(0).mean()

    def __call__(self) -> tuple[Tensor, Metrics]:
        done, pools = self.parts.passed(), self.parts.pools
        target = self.target.index_select(0, done.draw).float()
        kept = (done.drawing.float() - target).square().mean() / self.spread
        told, known = self.parts.attributes(done.drawing, pools.attributes.index_select(0, done.draw))
        loss = kept + ADDITIVE_WEIGHT * done.additive + ATTRIBUTE_WEIGHT * (told + done.names) + TEXT_WEIGHT * done.text
        return loss, {"kept": kept, "known": known, **done.metrics}


@torch.no_grad()
def conditions(parts: joint.Loss, ids: Tensor, length: Tensor, chunk: int = 64) -> Tensor:
    """Conditions [N, L, Z] of sequences that end in queries."""
    made = []
    for start in range(0, len(ids), chunk):
        hidden = networks.hidden_states(parts.language, parts.embed(ids[start : start + chunk].long()), parts.rotary)
        made.append(parts.queried(hidden, length[start : start + chunk]))
    return torch.cat(made)


class HeldOut:
    """How far conditions of held-out prompts are from the sums that seen prompts make, kind by kind."""

    def __init__(self, parts: joint.Loss, words: common.Vocabulary, count: int) -> None:
        """Remembers the sums as they are now; `count` quads of each kind."""
        rng = random.Random(99)
        self.parts, self.sequences, self.sums = parts, {}, {}
        for kind in sorted({*KINDS} - {"single_object"}):
            told = [prompt for _ in range(count) for prompt in data.quad(rng, (kind,), 0.0, held_out=True)]
            rows = [(words.encoder.request(world.request(data.DEFAULT_WORDING, text)), 0) for text, _ in told]
            texts, made = data.as_texts(rows, words.pad), parts.pools
            queries = tuple(range(words.size, words.size + made.tokens))
            sequences = joint.Sequences.of(texts, parts.device, words.pad, made.width, tail=queries)
            _, q, r, s = conditions(parts, sequences.ids, sequences.length).view(count, 4, made.tokens, -1).unbind(1)
            self.sequences[kind] = sequences
            self.sums[kind] = r + s - q

    def far(self) -> str:
        """The mean square distance of each kind's conditions from its sums, of the sums' variance."""
        shares = []
        for kind, sequences in self.sequences.items():
            own = conditions(self.parts, sequences.ids[::4], sequences.length[::4])
            share = (own - self.sums[kind]).square().mean() / self.sums[kind].var(0).mean()
            shares.append(f"{kind} {float(share):.3f}")
        return "  ".join(shares)


def main(argv: list[str] | None = None) -> bool:
    """Runs the stage; returns whether it is finished."""
    parser = common.parser(__doc__, steps=3_000, seconds=60, lr=5e-4, muon_lr=0.006, ema=0.995, decay=0.8, warmup=50)
    batch = joint.Batch(draw=96, follow=0, name=128, read=128, chat=4, copies=0)
    for name in ("draw", "name", "read", "chat"):
        parser.add_argument(f"--{name}-batch", type=int, default=getattr(batch, name))
    parser.add_argument("--draw-pool", type=int, default=40_000, help="requests whose conditions are kept")
    parser.add_argument("--name-pool", type=int, default=200_000, help="requests in quads, a multiple of 4")
    parser.add_argument("--read-pool", type=int, default=400_000, help="scenes to read")
    args = parser.parse_args(argv)
    preset, folder = common.preset_of(args), args.out / "compose"
    words = common.vocabulary(args.out)
    start = time.perf_counter()
    draws = data.make("draw", args.draw_pool, args.seed + 3, words.encoder, KINDS, args.workers)
    names = data.make("name", args.name_pool, args.seed + 3, words.encoder, KINDS, args.workers)
    reads = data.make("read", args.read_pool, args.seed + 3, words.encoder, world.SCENE_KINDS, args.workers)
    say(f"texts and scenes: {time.perf_counter() - start:.1f} s")

    device, dtype = prepare_device(args.device)
    common.set_seed(args.seed)
    start = time.perf_counter()
    latents = pools.latent_pool(frozen_encoder(args, words, preset, device), reads.scenes, preset, device)
    made = joint.Pools(preset, words, draws, names, reads, (latents, latents), device)
    config, language, dit, _ = joint.build(words, preset, device, dtype, common.optimizer_options(args), args.steps)
    trained = common.load_weights(args.out / "joint" / "model.safetensors")
    model = FlatModel({"": language}, device, dtype, common.optimizer_options(args), args.steps)
    fresh = model.tensors(averaged=False)
    model.set_tensors({name: trained[name].float() if name in trained else t.clone() for name, t in fresh.items()})
    sizes = joint.Batch(args.draw_batch, 0, args.name_batch, args.read_batch, args.chat_batch, 0)
    parts = joint.Loss(config, language, dit, made, sizes, dtype)
    target = conditions(parts, made.draw.ids, made.draw.length).bfloat16()
    held_out = HeldOut(parts, words, 4 if args.tiny else 40)
    say(f"latents and conditions: {time.perf_counter() - start:.1f} s")
    say(f"held-out conditions from sums of seen ones, before: {held_out.far()}")
    compiled = [] if args.no_compile else networks.compiled_parts(language, dit)[: len(language.model.layers) + 1]
    settings = common.fingerprint(
        preset, model.options, batch=vars(sizes), pools=[args.draw_pool, args.name_pool, args.read_pool], seed=args.seed
    )

    def finish() -> None:
        kept = {name: t for name, t in model.tensors().items() if not name.startswith("attribute_head.")}
        float32 = tuple(name for name, t in trained.items() if t.dtype == torch.float32)
        common.save_weights(folder / "model.safetensors", {**trained, **kept}, float32)

    trainer = Trainer(model, Loss(parts, target), loop_options(args), folder, settings, compiled, finish)
    outcome = trainer.run()
    if args.bench:
        say(f"compose: {trainer.pace * 1000:.2f} ms a step")
        return False
    if outcome == "finished":
        finish()
        model.set_tensors(model.tensors())
        say(f"held-out conditions from sums of seen ones, after: {held_out.far()}")
        (folder / "finished").touch()
    return outcome == "finished"


if __name__ == "__main__":
    main()
