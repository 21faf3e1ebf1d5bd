"""Fine-tuning of networks of the published sizes with made-up weights: peak memory, seconds a step, share of the ceiling.

    python benchmarks/train.py --json train.json                    all rows, about 8 minutes on one H100
    python benchmarks/train.py --rows lora lora-int8 --batch 8
    python benchmarks/train.py --size tiny --device cpu             tries the benchmark itself

| row | what learns |
| --- | --- |
| lora | a LoRA of the 2.4B DiT, bfloat16 (target: <= 24 GiB, >= 45 % of the ceiling) |
| lora-ckpt | the same with activations computed twice |
| lora-int8 | the same with int8 weights (target: <= 12 GiB) |
| lora-both | a LoRA of DiT and language model |
| full | all weights of the DiT, activations computed twice (target: fits 78 GiB) |

The share of the ceiling counts the products that learning needs (forward, and backward once for a LoRA or twice for all weights), not
those that are computed twice.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.bench import Bench
from benchmarks.gpu_ceilings import ceilings
from benchmarks.made_up import DIT_NAME, made_config, made_dit, made_language
from scale_rae.compiling import attention_kernels
from scale_rae.fast_weights import quantize_blocks
from scale_rae.footprint import flops as dit_flops
from scale_rae.prompt import IMAGE
from scale_rae.quantization import Place
from scale_rae.training.batches import Sample
from scale_rae.training.learner import Learner, make_repeatable
from scale_rae.training.objective import FineTune, Totals
from scale_rae.training.sequences import QUERIES, TokenSequence
from scale_rae.training.settings import TrainingOptions

TEXT = 64  # tokens of a request and its reply


@dataclass(frozen=True)
class Row:
    """One measurement."""

    train: str = "dit"
    full: bool = False
    quantize: str | None = None
    checkpointing: bool = False
    target: str = ""


ROWS = {
    "lora": Row(target="<= 24 GiB, share >= 45 %"),
    "lora-ckpt": Row(checkpointing=True),
    "lora-int8": Row(quantize="int8", checkpointing=True, target="<= 12 GiB"),
    "lora-both": Row(train="both", checkpointing=True),
    "full": Row(full=True, checkpointing=True, target="fits 78 GiB"),
}


def samples_of(size: str, count: int, with_text: bool) -> list[Sample]:
    """Made-up records: latents, and conditions or sequences."""
    config = made_config(size)
    generator = torch.Generator().manual_seed(0)
    ids = (*torch.randint(0, 256, (TEXT,), generator=generator).tolist(), QUERIES, 1)
    assert IMAGE not in ids
    sequence = TokenSequence(ids, tuple(i != QUERIES for i in ids))
    made = []
    for number in range(count):
        latent = torch.randn(config.tokens, config.channels, generator=generator).bfloat16()
        condition = torch.randn(1, config.tokens, config.dit.condition_width, generator=generator).bfloat16()
        made.append(Sample(f"{number}", sequence, (latent,), (), None if with_text else condition, number))
    return made


def needed_flops(size: str, row: Row, batch: int) -> float:
    """Floating-point operations that a step needs."""
    config = made_config(size)
    times = 3 if row.full else 2
    total = dit_flops(config.dit) * batch * times
    if row.train != "dit":
        sizes = config.language
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
        layer = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * inner
        places = batch * (TEXT + 1 + config.tokens)
        total += (
            times * 2.0 * (layer * sizes["num_hidden_layers"] * places + hidden * sizes["vocab_size"] * batch * TEXT)
        )
    return total


def measure(b: Bench, size: str, name: str, row: Row, batch: int, compile: str) -> None:
    """Seconds and peak memory of steps of a row."""
    b.peak_gib(reset=True)
    options = TrainingOptions(
        train=row.train,
        full=row.full,
        gradient_checkpointing=row.checkpointing,
        train_batch_size=batch,
        compile=compile,
    )
    dit = made_dit(size, b.device, b.dtype)
    if row.quantize is not None:
        quantize_blocks(dit, row.quantize, Place(b.device, b.device, b.dtype))
    language = made_language(size, b.device, b.dtype) if row.train != "dit" else None
    learner = Learner(options, language, dit, b.device, b.dtype, steps=1000)
    objective = FineTune(made_config(size), language, dit, None, dropout=0.1)
    samples = samples_of(size, batch, language is not None)
    b.peak_gib(reset=True)  # loading made copies
    losses: list[float] = []

    def step() -> None:
        with attention_kernels(b.device):
            loss, _ = objective(samples, Totals(batch, batch * TEXT, 0))
            parameters = learner.flat.parameters
            learner.flat.collect(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
        norm = learner.flat.gradient_norm()
        losses.append(float(loss.detach()))  # waits, as training does
        learner.flat.apply(norm)

    first, seconds = b.seconds(step)
    network = f"{DIT_NAME[size]}, {name}, batch {batch}"
    share = needed_flops(size, row, batch) / seconds / b.ceiling
    sustained = needed_flops(size, row, batch) / seconds / b.sustained
    peak = b.peak_gib()
    b.add(
        "train",
        network,
        seconds,
        "s/step",
        row.target,
        first=first,
        share=share,
        share_sustained=sustained,
        peak_gib=peak,
    )
    b.add("train", f"{network}: images a second", batch / seconds, "images/s")
    b.add("train", f"{network}: loss of the first and last step", losses[0] - losses[-1], "less")


def main(argv: list[str] | None = None) -> None:
    """Measures the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("1.5b", "tiny"), default="1.5b")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no row is begun")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    b = Bench(device, dtype, args.repeat, args.budget, args.json, args.size == "tiny")
    make_repeatable(device)
    with b.stage("ceilings"):
        ceilings(b)
    for name in args.rows:
        if not b.over(name):
            with b.stage(name):
                measure(b, args.size, name, ROWS[name], args.batch, args.compile)


if __name__ == "__main__":
    main()
