"""The log of a training: log.jsonl, and TensorBoard's files if TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_rae.checkpoint import writing
from scale_rae.jsonio import dump_json, parse_json
from scale_rae.training.objective import BINS, NAMES


class Log:
    """The log of a training in `folder`, after its first `done` steps; later lines, of a run that was ended, are removed."""

    def __init__(self, folder: Path, done: int) -> None:
        self._file = folder / "log.jsonl"
        with writing(self._file):
            lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
            self._file.write_text("".join(f"{line}\n" for line in lines if _step(line) <= done), encoding="utf-8")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)  # type: ignore[no-untyped-call]

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record, which has a "step"."""
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(dump_json(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])
            for i, value in enumerate(record.get("flow_by_t", ())):
                if value is not None:
                    self._board.add_scalar(f"flow_by_t/{i / BINS:.1f}", value, record["step"])
            self._board.flush()


def losses(sums: Sequence[float], steps: int) -> dict[str, Any]:
    """The means of `steps` steps' numbers (`objective.NAMES`); "flow_by_t" by tenths of t, None where none was drawn."""
    values = dict(zip(NAMES, sums, strict=True))
    flow = [values[f"flow {i}"] for i in range(BINS)]
    count = [values[f"count {i}"] for i in range(BINS)]
    return {
        "loss": round(values["loss"] / steps, 6),
        "flow": round(values["flow"] / steps, 6),
        "text": round(values["text"] / steps, 6),
        "kept": round(values["kept"] / steps, 6),
        "flow_by_t": [round(f / n, 6) if n else None for f, n in zip(flow, count, strict=True)],
    }


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut off."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
