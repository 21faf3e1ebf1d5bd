"""The log of a training: log.jsonl, and TensorBoard or Weights & Biases, which show it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale_rae.checkpoint import writing
from scale_rae.files import replacing
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.training.objective import BINS

PROJECT = "scale-rae"  # of wandb


class Log:
    """The log of a training in `folder`, after its first `done` steps.

    Later lines, of a run that was ended, are removed. `report_to` is "tensorboard", "wandb", or None for TensorBoard if it is
    installed; `config` are the options that wandb shows.
    """

    def __init__(
        self, folder: Path, done: int, report_to: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self._file = folder / "log.jsonl"
        with writing(self._file):
            lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
            with replacing(self._file) as fresh:
                fresh.write_text("".join(f"{line}\n" for line in lines if _step(line) <= done), encoding="utf-8")
        self._board: Any = None
        self._run: Any = None
        self._prefix = ""  # of names in wandb
        if report_to == "wandb":
            import wandb

            # The log of a validation belongs to the run of its training.
            self._prefix = f"{folder.name}/" if wandb.run is not None else ""
            # A run of wandb cannot go back to the step of a checkpoint, so a resumed training is another run of its group.
            self._run = wandb.run or wandb.init(
                project=PROJECT, group=folder.name, dir=str(folder), config=dict(config or {})
            )
        elif importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record, which has a "step"."""
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(dump_json(record) + "\n")
        values = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        by_t = enumerate(record.get("flow_by_t", ()))
        values |= {f"flow_by_t/{i / BINS:.1f}": value for i, value in by_t if value is not None}
        if self._run is not None:
            self._run.log({self._prefix + name: value for name, value in values.items()}, step=record["step"])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, record["step"])
            self._board.flush()

    def close(self) -> None:
        """Ends the board's connection or file."""
        if self._run is not None:
            self._run.finish()
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut off."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
