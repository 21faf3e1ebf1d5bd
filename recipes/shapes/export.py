"""Stage 6: the trained parts as one folder in the published layout.

DIR/config.json, model-0000x-of-0000y.safetensors, model.safetensors.index.json, tokenizer files
DIR/shapes/siglip-patch16-128/   the encoder with its image processor and tokenizer
DIR/decoder/config.json, model.pt

python -m recipes.shapes.export --out runs/shapes --export exported/shapes

With `--read-alike DIR`, `--export` is the exported model DIR with an embedding in which names mean the same wherever they stand
(`read_alike`).

With `--parts-of`, only the language model and the velocity network are those of the run (of the reader stage); all else is taken from
an exported model. With `--dit`, the velocity network is that of another exported model; the language model is then that of `--parts-of`,
unless a run is named by `--out`. With `--along F`, the velocity network goes on along the line from that of `--parts-of`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.shapes import common, settings
from recipes.shapes.common import Vocabulary
from recipes.shapes.loop import say
from recipes.shapes.settings import FULL, TINY, Preset
from recipes.shapes.tokenizer import write_tokenizer
from scale_rae.publishing import in_shards, write_index
from scale_rae.shapes import world

RUN = Path("runs/shapes")
SHARD_BYTES = 14_500_000
LIMIT_BYTES = 32_000_000
DIT = "diff_head."
CASED = "cased"
"""Folder under a run's: the model that the reader stage begins with, its tokenizer grown by `in_cases`."""
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def export(out: Path, target: Path, preset: Preset) -> int:
    """Assembles `target` from the stages' weights under `out`; returns the bytes of all its files.

    Raises:
        SystemExit: when a stage's weights are missing.
    """
    parts = {
        "model": out / "joint" / "model.safetensors",
        "encoder": out / "reward" / "encoder.safetensors",
        "decoder": out / "decoder" / "decoder.safetensors",
    }
    weights = {name: common.load_weights(path) for name, path in parts.items()}
    words = common.vocabulary(out)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_tokenizer(fresh)
    _write_json(fresh / "config.json", words.model_config(preset))
    write_shards(fresh, weights["model"])

    encoder = fresh / settings.ENCODER_NAME
    write_tokenizer(encoder, settings.CAPTION_TOKENS, padding=True)
    _write_json(encoder / "config.json", words.encoder_config(preset))
    _write_json(encoder / "preprocessor_config.json", settings.preprocessor_config(preset))
    common.save_weights(encoder / "model.safetensors", weights["encoder"])

    decoder = fresh / "decoder"
    decoder.mkdir()
    _write_json(decoder / "config.json", settings.decoder_config(preset))
    torch.save({name: tensor.clone() for name, tensor in weights["decoder"].items()}, decoder / "model.pt")

    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)
    sizes = {str(path.relative_to(target)): path.stat().st_size for path in sorted(target.rglob("*")) if path.is_file()}
    for name, size in sizes.items():
        say(f"{size:12,d}  {name}")
    total = sum(sizes.values())
    say(f"{total:12,d}  bytes in all (limit {LIMIT_BYTES:,d})")
    if total > LIMIT_BYTES:
        raise SystemExit(f"{target}: {total:,d} bytes are more than {LIMIT_BYTES:,d}")
    return total


def joined(language: Path, dit: Path) -> dict[str, Tensor]:
    """The language model of one folder of safetensors files with the velocity network of another."""
    own = {name: tensor for name, tensor in stored(language).items() if not name.startswith(DIT)}
    return own | {name: tensor for name, tensor in stored(dit).items() if name.startswith(DIT)}


def moved_on(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], along: float) -> dict[str, Tensor]:
    """The tensors with the velocity network start + `along` · (own - start): 1 leaves it as it is."""

    def moved(name: str, own: Tensor) -> Tensor:
        return start[name].float().lerp(own.float(), along).to(own.dtype) if name.startswith(DIT) else own

    return {name: moved(name, own) for name, own in tensors.items()}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files.

    Raises:
        SystemExit: when it has none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder}: no safetensors file is there")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= common.load_weights(file)
    return tensors


EMBEDDING = "model.embed_tokens.weight"
_NEAR = 0.8  # a word in another case begins a little smaller, so that no answer is a tie of two cases


def grown(tensors: Mapping[str, Tensor], before: Vocabulary, after: Vocabulary) -> dict[str, Tensor]:
    """The tensors with rows of the embedding for the vocabulary `after`: those of the same tokens; for a new word, near that of its
    small letters; for a part of a word, the mean of what it was."""
    table = tensors[EMBEDDING]
    if before.size == after.size:
        return dict(tensors)
    old, new = before.tokenizer, after.tokenizer
    rows = []
    for number in range(after.size):
        if number >= after.pad:
            rows.append(table[before.pad + number - after.pad])
        elif number < before.pad:
            rows.append(table[number])
        else:
            text = new.decode([number])
            small = old.plain(text.lower())
            ids = small if len(small) == 1 else old.plain(text)
            rows.append((_NEAR * table[ids].float().mean(0)).to(table.dtype))
    return {**tensors, EMBEDDING: torch.stack(rows)}


_PART = "red"  # also the end of "colored" and other words


def read_alike(tensors: Mapping[str, Tensor], words: Vocabulary) -> dict[str, Tensor]:
    """The tensors with other rows of the embedding for names that the joint stage never reads: near those that it reads.

    A name after a space is another token than at the beginning of a text. The joint stage reads names in small letters after a space
    only; it writes "Red" and "Two", with which answers begin, but it reads no " Red", no " A" and no text that begins with "ring".
    """
    old = tensors[EMBEDDING].float()
    table = old.clone()

    def row(text: str) -> int:
        (number,) = words.tokenizer.plain(text)
        return number

    answers, shapes = (*world.COLORS, *world.NUMBERS[2:]), (*world.SHAPES, *map(world.plural, world.SHAPES))
    for name in (*answers, "a", "an"):
        table[row(f" {name.capitalize()}")] = _NEAR * old[row(f" {name}")]
    for name in (*answers, *shapes):
        if name != _PART:
            table[row(name)] = _NEAR * old[row(f" {name}")]
            table[row(name.upper())] = old[row(f" {name.upper()}")]
    for name in map(str.capitalize, shapes):
        table[row(name)] = old[row(f" {name}")]
    return {**tensors, EMBEDDING: table.to(tensors[EMBEDDING].dtype)}


def in_cases(source: Path, target: Path) -> None:
    """Makes `target`: the exported model `source`, whose tokenizer has every word in three cases (`grown`, `read_alike`)."""
    fresh = target.with_name(target.name + ".tokenizer")
    shutil.rmtree(fresh, ignore_errors=True)
    write_tokenizer(fresh, cased=True)
    words = common.vocabulary_of(fresh)
    tensors = read_alike(grown(stored(source), common.vocabulary_of(source), words), words)
    replaced(source, target, tensors)
    for name in TOKENIZER_FILES:
        shutil.copyfile(fresh / name, target / name)
    shutil.rmtree(fresh)
    numbers = {
        "vocab_size": words.size,
        "bos_token_id": words.start,
        "eos_token_id": words.end,
        "pad_token_id": words.pad,
    }
    _write_json(target / "config.json", json.loads((target / "config.json").read_text()) | numbers)


def replaced(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Makes `target`: the exported model `source` with the given tensors for language model and velocity network."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(
        source,
        fresh,
        ignore=lambda folder, names: [n for n in names if n.startswith("model") and Path(folder) == source],
    )
    write_shards(fresh, tensors)
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes model-0000x-of-0000y.safetensors of at most SHARD_BYTES each, and their index."""
    parts = in_shards({name: tensors[name].nbytes for name in sorted(tensors)}, SHARD_BYTES)
    files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    for file, names in zip(files, parts, strict=True):
        float32 = tuple(name for name in names if tensors[name].dtype == torch.float32)
        common.save_weights(folder / file, {name: tensors[name] for name in names}, keep_float32=float32)
    write_index(folder, dict(zip(files, parts, strict=True)), sum(tensor.nbytes for tensor in tensors.values()))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the whole run (default: runs/shapes)")
    parser.add_argument(
        "--export", type=Path, required=True, metavar="DIR", help="folder to make; replaced if it is there"
    )
    parser.add_argument("--parts-of", type=Path, metavar="DIR", help="exported model to take encoder and decoder from")
    parser.add_argument(
        "--read-alike", type=Path, metavar="DIR", help="exported model with titles and capitals to change"
    )
    parser.add_argument("--dit", type=Path, metavar="DIR", help="exported model to take the velocity network from")
    parser.add_argument(
        "--along",
        type=float,
        metavar="F",
        help="move on by F times the way from the velocity network of --parts-of to that of --dit (1: as it is)",
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if args.read_alike is not None:
        source = args.read_alike
        replaced(source, args.export, read_alike(stored(source), common.vocabulary_of(source)))
        return
    if args.parts_of is None:
        if args.dit is not None:
            parser.error("--dit needs --parts-of")
        if args.along is not None:
            parser.error("--along needs --parts-of and --dit")
        out = args.out or RUN
        export(out, args.export, TINY if args.tiny else FULL)
        if (out / "reader" / "model.safetensors").is_file():
            say(
                "this is the joint stage's model; --parts-of DIR puts the reader stage's into DIR, the model that it began with"
            )
        return
    if args.along is not None and args.dit is None:
        parser.error("--along needs --dit")
    reader = args.parts_of if args.dit is not None and args.out is None else (args.out or RUN) / "reader"
    tensors = joined(reader, args.dit or reader)
    if args.along is not None:
        tensors = moved_on(tensors, stored(args.parts_of), args.along)
    replaced(args.parts_of, args.export, tensors)


if __name__ == "__main__":
    main()
