"""Checkpoints of a training: `checkpoint-N` folders, from which it resumes with the same bits.

A folder is written completely or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_rae.checkpoint import writing
from scale_rae.errors import CheckpointError, OutputError, TrainingError, first_line
from scale_rae.files import remove_unfinished, replacing, replacing_folder
from scale_rae.hub import ADAPTER_FILES
from scale_rae.jsonio import dump_json, parse_json

STATE = "training_state.pt"
# What differs, where the identity holds only hashes.
_CONTENTS = {
    "records": "the training data or their order differ",
    "model": "the model's or an adapter's files, or the dtype, differ",
}


def write_record(folder: Path, identity: Mapping[str, Any], model: str, steps: int) -> None:
    """Writes training.json: how the result in `folder` was trained, of which model, in how many steps.

    The result is complete then, so what killed runs had begun to write there is removed.
    """
    record = {"options": identity, "model": model, "steps": steps}
    with replacing(folder / "training.json") as fresh:
        fresh.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    remove_unfinished(folder)


class Checkpoints:
    """The checkpoints in a folder.

    A resumed run must have the same `identity`, in which "records" and "model" are hashes.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int | None = None) -> None:
        self.folder, self._keep = folder, keep
        self._identity = dump_json(identity)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order."""
        names = [path.name for path in self.folder.glob("checkpoint-*") if (path / STATE).is_file()]
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name)))

    def write(self, step: int, state: Mapping[str, Tensor], result: Callable[[Path], None], trim: bool = True) -> Path:
        """Writes the checkpoint of a step and returns its folder; `result(folder)` adds the adapter so far.

        With `trim`, only as many of the newest as are to be kept remain.

        Raises:
            OutputError: naming the folder, when it cannot be written.
        """
        target = self.folder / f"checkpoint-{step}"
        with writing(target), replacing_folder(target) as fresh:
            result(fresh)
            tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
            try:
                torch.save({"step": step, "identity": self._identity, "state": tensors}, fresh / STATE)
            except RuntimeError as e:  # torch's own writer, for example on a full disk
                raise OutputError(f"{target}: cannot be written; is the disk full? ({first_line(e)})") from e
        for old in self.steps()[: -self._keep] if self._keep and trim else []:
            shutil.rmtree(self.folder / f"checkpoint-{old}", ignore_errors=True)
        return target

    def use(self, step: int) -> str:
        """What the checkpoint of a step is good for, in words: an adapter to use, or a state to go on from."""
        folder = self.folder / f"checkpoint-{step}"
        if self._is_adapter(step):
            return f"the weights of step {step} are kept: draw with them, or train on from them, by --lora {folder}"
        return f"the state of step {step} is kept in {folder}, from which --resume comes to step {step + 1} again"

    def _is_adapter(self, step: int) -> bool:
        """Whether the checkpoint of a step can be given as --lora.

        A student's, which has a config.json, cannot.
        """
        folder = self.folder / f"checkpoint-{step}"
        return (folder / ADAPTER_FILES[0]).is_file() and not (folder / "config.json").is_file()

    def newest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The newest checkpoint's step and state, None if there is none.

        Raises:
            TrainingError: naming the options, when it was made with others. CheckpointError: when it cannot be read.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.folder / f"checkpoint-{steps[-1]}" / STATE
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            made = parse_json(stored["identity"])
        except Exception as e:  # a damaged file has many ways to fail
            raise CheckpointError(
                f"{path}: damaged ({first_line(e)}); remove its folder to go on from the one before"
            ) from e
        mine = parse_json(self._identity)
        if changed := sorted(name for name in {*made, *mine} if made.get(name) != mine.get(name)):
            was = ", ".join(_CONTENTS.get(name) or f"{name} was {made.get(name)}" for name in changed)
            again = ""
            if self._is_adapter(steps[-1]):
                again = f"; a training with --lora {path.parent} begins with these weights"
            raise TrainingError(
                f"{path}: made otherwise: {was}; use the same options and files, or begin in another --out{again}"
            )
        return int(stored["step"]), dict(stored["state"])


def check_out(out: Path, resume: bool, results: Sequence[str]) -> None:
    """Raises TrainingError where a training would replace checkpoints or `results` that it did not make."""
    if Checkpoints(out, {}).steps():
        if not resume:
            raise TrainingError(f"{out}: holds checkpoints of a training; go on with --resume, or give another --out")
    elif found := next((out / name for name in results if (out / name).exists()), None):
        raise TrainingError(f"{found}: exists already, without a checkpoint of its training; give another --out")
