"""Writes a model in the published layout: config, tokenizer, sharded weights, bundled encoder and decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scale_rae.checkpoint import TensorReader, save_tensors, writing
from scale_rae.config import load_config
from scale_rae.errors import OutputError
from scale_rae.files import replacing_folder
from scale_rae.hub import Source, find_folder, own_folders
from scale_rae.jsonio import read_json
from scale_rae.student import FIELD

SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def write_model(
    source: Source,
    reader: TensorReader,
    target: Path,
    dtype: torch.dtype | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the model of `source` with the weights of `reader` into the new folder `target`, which it returns.

    Weights keep the dtype in which they are stored, or get `dtype`. `replaced` are weights to write instead, by name.
    `progress(done, total)` counts tensors.

    Raises:
        OutputError: naming the folder, when it exists already or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: exists already; give another --out")
    with writing(target), replacing_folder(target) as fresh:
        _copy_files(source, fresh)
        _write_weights(fresh, reader, dtype, replaced or {}, progress or (lambda done, total: None))
        if target.is_dir():
            target.rmdir()  # fails where something came into the folder meanwhile
    return target


def _copy_files(source: Source, target: Path) -> None:
    """Copies all but the weights; an encoder and a decoder that lie inside or beside the model's folder come inside."""
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, target / file.name)
    if source.student is not None:
        raw = read_json(source.config_folder / "config.json")
        student = {name: value for name, value in raw[FIELD].items() if not name.startswith("base")}
        (target / "config.json").write_text(json.dumps(raw | {FIELD: student}, indent=1) + "\n", encoding="utf-8")
    config = load_config(source.config_folder)
    encoder = find_folder(config.encoder_name, "encoder", source.folder)
    if encoder is not None and encoder.own:
        shutil.copytree(encoder.folder, target / config.encoder_name)
    for name in ("decoder", "vae"):
        for folder in own_folders(source.folder, name)[:1]:
            shutil.copytree(folder, target / name)


def _write_weights(
    folder: Path,
    reader: TensorReader,
    dtype: torch.dtype | None,
    replaced: Mapping[str, Tensor],
    progress: Callable[[int, int], None],
) -> None:
    names = sorted({*reader.tensors, *replaced})

    def written(name: str) -> torch.dtype:
        stored = reader.tensors[name].dtype if name in reader.tensors else replaced[name].dtype
        is_float = stored is not None and stored.is_floating_point
        return dtype if dtype is not None and is_float else stored or torch.float32

    shapes = {name: reader.tensors[name].shape if name in reader.tensors else replaced[name].shape for name in names}
    sizes = {name: torch.Size(shape).numel() * written(name).itemsize for name, shape in shapes.items()}
    parts = in_shards(sizes, SHARD_BYTES)
    files = shard_names(len(parts))
    done = 0
    for file, part in zip(files, parts, strict=True):
        tensors: dict[str, Tensor] = {}
        for name in part:
            tensors[name] = torch.empty(shapes[name], dtype=written(name))
            if name in replaced:
                tensors[name].copy_(replaced[name])
            else:
                reader.read_into(name, tensors[name])
            done += 1
            progress(done, len(names))
        save_tensors(tensors, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        write_index(folder, dict(zip(files, parts, strict=True)), sum(sizes.values()))


def in_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in their order, in groups of at most `most` bytes each; a larger tensor is alone in its group."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """The names of a model's weight files: model.safetensors for one, else model-00001-of-00002.safetensors, …"""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, list[str]], total: int) -> None:
    """Writes model.safetensors.index.json: the file of each tensor, and the bytes of all."""
    weights = {name: file for file, names in shards.items() for name in names}
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
