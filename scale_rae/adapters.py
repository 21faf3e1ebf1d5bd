"""LoRA adapters in PEFT's file format, and a reader of weights with adapters merged in.

The format has two files: adapter_config.json and adapter_model.safetensors.
An adapter changes a linear's weight W [N, K] by `scale` B A, with A [r, K] and B [N, r]. `MergedReader` merges it while it
reads the weights, chunk by chunk. So a merged model runs as fast as without adapters, and can be quantised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_rae.checkpoint import TensorReader, save_tensors, writing
from scale_rae.errors import CheckpointError, OptionError
from scale_rae.files import replacing
from scale_rae.hub import ADAPTER_FILES, Source, find, weight_files
from scale_rae.jsonio import Fields, read_json
from scale_rae.options import lora_parts
from scale_rae.student import FIELD

FILES = CONFIG, WEIGHTS = ADAPTER_FILES
_PREFIX = "base_model.model."  # before the names of modules in PEFT's files
_NOT_READ = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "modules_to_save": None}
_NOT_READ |= dict.fromkeys(("use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"))
_NOT_READ |= dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config"))
# Initialisations that change the base weights, too: the adapter fits only the changed ones.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Change:
    """What one adapter adds to one weight: scale · B A."""

    a: Tensor  # [r, K] float32
    b: Tensor  # [N, r] float32
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One adapter's files, the weight that the user gave it, and its changes by the names of modules."""

    source: Source
    weight: float
    changes: Mapping[str, Change]


def find_adapters(chosen: Sequence[str]) -> list[tuple[Source, float]]:
    """The files and the weight of each DIR[:WEIGHT] (`options.lora_parts`); DIR may be a hub id.

    Raises:
        OptionError: for a weight that is no number, or a student. CheckpointError, HubError: see `hub.find`.
    """
    # config.json, which only a student has, is fetched too, but is no file of the adapter.
    fetched = [
        (find(name, "adapter", files=(*FILES, "config.json")), weight) for name, weight in map(lora_parts, chosen)
    ]
    found = [(replace(source, files=FILES), weight) for source, weight in fetched]
    for source, _ in found:
        path = source.folder / "config.json"
        if path.is_file() and FIELD in read_json(path):
            raise OptionError(
                f"--lora {source.name}: is a student, whose adapter predicts mean velocities; give its folder as --model-path"
            )
    return found


def read_adapter(source: Source, weight: float = 1.0) -> Adapter:
    """The adapter in a folder in PEFT's format.

    Raises:
        CheckpointError: naming the file, when it is missing, damaged, or has an unsupported field.
    """
    path = source.folder / CONFIG
    fields = Fields(read_json(path, "adapter config", CheckpointError), path, CheckpointError)
    kind = fields.get("peft_type", str)
    if kind != "LORA":
        raise fields.fail("peft_type", f"is {kind!r}; only LORA is supported")
    for name, only in _NOT_READ.items():
        if fields.raw.get(name, only) not in (only, None, False, []):
            raise fields.fail(name, f"is {fields.raw[name]!r}, which is not supported")
    first = fields.raw.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(_CHANGES_BASE):
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion"
        raise fields.fail(
            "init_lora_weights", f"is {first!r}: the adapter fits only the base weights that it changed; {remedy}"
        )
    alpha = fields.number("lora_alpha")
    patterns = _patterns(fields)
    root = fields.get("use_rslora", bool, False)
    reader = TensorReader([source.folder / WEIGHTS])
    if not reader.tensors:
        raise CheckpointError(f"{source.folder / WEIGHTS}: holds no tensors")
    changes: dict[str, Change] = {}
    found = {name: _module_of(name) for name in reader.tensors}
    if odd := sorted(name for name, module in found.items() if module is None):
        raise CheckpointError(f"{source.folder / WEIGHTS}: {odd[0]} is no tensor of a LoRA")
    for module in sorted({module for module in found.values() if module is not None}):
        a, b = (_read(reader, f"{_PREFIX}{module}.lora_{part}.weight") for part in "AB")
        if a.dim() != 2 or b.dim() != 2 or b.shape[1] != len(a) or not len(a):
            raise CheckpointError(f"{source.folder / WEIGHTS}: {module} has A {list(a.shape)} and B {list(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError(f"{source.folder / WEIGHTS}: {module} has values that are not finite")
        own = next((value for pattern, value in patterns if pattern.fullmatch(module)), alpha)
        changes[module] = Change(a, b, weight * own / (math.sqrt(len(a)) if root else len(a)))
    return Adapter(source, weight, changes)


def _patterns(fields: Fields) -> list[tuple[re.Pattern[str], float]]:
    """alpha_pattern: the alpha of modules whose names end in what a pattern matches."""
    values = fields.get("alpha_pattern", dict, {})
    inner = Fields(values, f"{fields.where}: alpha_pattern", CheckpointError)
    patterns = []
    for pattern in values:
        try:
            patterns.append((re.compile(rf"(.*\.)?({pattern})"), inner.number(pattern)))
        except re.error as e:
            raise inner.fail(pattern, f"is no pattern of names ({e})") from e
    return patterns


def _module_of(name: str) -> str | None:
    match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight", name)
    return match[1] if match else None


def _read(reader: TensorReader, name: str) -> Tensor:
    if name not in reader.tensors:
        file = next(iter(reader.tensors.values())).file
        raise CheckpointError(f"{file}: has no tensor {name}")
    reader.check_floats([name])
    return reader.read(name)


def write_adapter(
    folder: Path, changes: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float, base: str
) -> None:
    """Writes the matrices (A, B) of each module, float32, into a folder in PEFT's format. `base` names the model.

    Files that are there already are replaced only by whole new ones.

    Raises:
        OutputError: naming the folder, when it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in changes.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        # Full names, since other modules share the suffixes of the velocity network's modules.
        "target_modules": sorted(changes),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        described, weights = (folder / name for name in FILES)
        with replacing(weights) as fresh_weights, replacing(described) as fresh:
            fresh.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_tensors(tensors, fresh_weights, metadata={"format": "pt"})


class MergedReader(TensorReader):
    """Reads a model's tensors with adapters merged in; changed weights are returned in float32.

    Raises:
        CheckpointError: naming the adapter's file, when it does not fit the model, or as TensorReader.
    """

    def __init__(self, files: Iterable[Path], adapters: Sequence[Adapter], replacing: Iterable[Path] = ()) -> None:
        """Tensors in the files `replacing` take the place of those in `files`."""
        super().__init__(files)
        others = TensorReader(replacing).tensors
        if unknown := sorted(others.keys() - self.tensors.keys()):
            raise CheckpointError(f"{others[unknown[0]].file}: the base model has no tensor {unknown[0]}")
        self.tensors |= others
        self._changes: dict[str, list[Change]] = {}
        for adapter in adapters:
            for module, change in adapter.changes.items():
                stored = self.tensors.get(f"{module}.weight")
                made = (len(change.b), change.a.shape[1])
                if stored is None or stored.shape != made:
                    has = f"is {list(stored.shape)}" if stored else "is not there"
                    raise CheckpointError(
                        f"{adapter.source.folder / WEIGHTS}: made for another model: {module}.weight {has}, the adapter "
                        f"changes {list(made)}"
                    )
                self._changes.setdefault(f"{module}.weight", []).append(change)

    def read_rows(self, name: str, take: Callable[[int, Tensor], None]) -> None:
        changes = self._changes.get(name)
        if not changes:
            super().read_rows(name, take)
            return

        def merged(start: int, rows: Tensor) -> None:
            whole = rows.float()
            for change in changes:
                whole = torch.addmm(whole, change.b[start : start + len(rows)], change.a, alpha=change.scale)
            take(start, whole)

        super().read_rows(name, merged)


def model_reader(source: Source, adapters: Sequence[Adapter] = ()) -> TensorReader:
    """A reader of a model's weights: a student's own in place of its base model's, and adapters merged in.

    Raises:
        CheckpointError: when files are missing or damaged, or do not fit each other.
    """
    files = weight_files(source.folder)
    if source.student is None:
        return MergedReader(files, adapters) if adapters else TensorReader(files)
    if (source.student / CONFIG).is_file():
        own = Source(str(source.student), source.student, what="adapter", files=FILES)
        return MergedReader(files, [read_adapter(own), *adapters])
    return MergedReader(files, adapters, weight_files(source.student))
