"""What the stages share: folders, arguments, the tokenizer, and reading and writing weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.shapes import settings
from recipes.shapes.data import WordEncoder
from recipes.shapes.loop import add_loop_arguments
from recipes.shapes.settings import FULL, TINY, Preset
from recipes.shapes.tokenizer import SPECIAL, words, write_tokenizer
from scale_rae.checkpoint import save_tensors
from scale_rae.prompt import ChatTokenizer
from scale_rae.training.optim import OptimizerOptions


def parser(description: str | None, steps: int, seconds: float | None, **optimizer: Any) -> argparse.ArgumentParser:
    """The arguments of every stage; `optimizer` overrides defaults of OptimizerOptions."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/shapes"), help="folder of the whole run")
    options.add_argument("--tiny", action="store_true", help="the tests' small sizes")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device")
    options.add_argument("--workers", type=int, default=0, help="processes that make data (0: cores less two)")
    add_loop_arguments(options, steps, seconds)
    default = OptimizerOptions(**optimizer)
    options.add_argument("--optimizer", choices=("muon", "adamw"), default=default.kind)
    options.add_argument("--lr", type=float, default=default.lr, help="AdamW's")
    options.add_argument("--muon-lr", type=float, default=default.muon_lr)
    options.add_argument("--weight-decay", type=float, default=default.weight_decay)
    options.add_argument("--warmup", type=int, default=default.warmup, help="steps")
    options.add_argument("--decay", type=float, default=default.decay, help="last share of the steps, to rate zero")
    options.add_argument("--ema", type=float, default=default.ema)
    return options


def preset_of(args: argparse.Namespace) -> Preset:
    """The sizes asked for."""
    return TINY if args.tiny else FULL


def optimizer_options(args: argparse.Namespace) -> OptimizerOptions:
    """`OptimizerOptions` of parsed arguments."""
    return OptimizerOptions(
        kind=args.optimizer,
        lr=args.lr,
        muon_lr=args.muon_lr,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        decay=args.decay,
        ema=args.ema,
    )


def fingerprint(preset: Preset, options: OptimizerOptions, **more: Any) -> str:
    """What a continued run must have in common with its beginning."""
    return json.dumps({**dataclasses.asdict(preset), **dataclasses.asdict(options), **more}, sort_keys=True)


def set_seed(seed: int) -> None:
    """Seeds every generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries that still use the global one)
    torch.manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer and its numbers."""

    tokenizer: ChatTokenizer
    encoder: WordEncoder
    size: int
    pad: int
    start: int
    end: int

    def encoder_config(self, preset: Preset) -> dict[str, Any]:
        """config.json of the encoder."""
        return settings.encoder_config(preset, self.size, self.pad, self.end)

    def model_config(self, preset: Preset) -> dict[str, Any]:
        """config.json of the model."""
        return settings.model_config(preset, self.size, self.start, self.end, self.pad)


def vocabulary(out: Path, cased: bool = False) -> Vocabulary:
    """The tokenizer in out/tokenizer (`cased`: out/cased-tokenizer), written if it is not there."""
    folder = out / ("cased-tokenizer" if cased else "tokenizer")
    if not (folder / "tokenizer_config.json").is_file():
        write_tokenizer(folder, cased=cased)
    return vocabulary_of(folder)


def vocabulary_of(folder: Path) -> Vocabulary:
    """The tokenizer in a folder of one of `write_tokenizer`'s."""
    tokenizer = ChatTokenizer(folder, image_markers=True)
    start = tokenizer.chat_start
    pad = start - 1  # SPECIAL's order: <|endoftext|> comes just before <|im_start|>
    return Vocabulary(
        tokenizer, WordEncoder(tokenizer, words(), pad), pad + len(SPECIAL), pad, start, tokenizer.chat_end
    )


def save_weights(path: Path, tensors: Mapping[str, Tensor], keep_float32: tuple[str, ...] = ()) -> None:
    """Writes a safetensors file in bfloat16 (float32 for the names in `keep_float32`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {
        name: tensor.detach().to("cpu", torch.float32 if name in keep_float32 else torch.bfloat16).contiguous().clone()
        for name, tensor in tensors.items()
    }
    temporary = path.with_suffix(".tmp")
    save_tensors(ready, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU as stored."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise SystemExit(f"{path}: not there; run the stage that makes it first")
    return load_file(path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies weights into a module, all of them, by name."""
    module.load_state_dict(tensors, strict=False)
    missing = {name for name, _ in module.named_parameters()} ^ set(tensors)
    if missing:
        raise SystemExit(f"weights do not fit: {sorted(missing)[:5]}")
