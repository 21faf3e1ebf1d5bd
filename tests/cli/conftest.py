from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scale_rae.cli import main
from scale_rae.pipeline import ScaleRAE

DRAW = "Can you generate a photo of a cat on a windowsill?"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command prints."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("error: "), self.err
        return self.err.removeprefix("error: ").strip()

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """What --json printed."""
        return [json.loads(line) for line in self.out.splitlines()]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line in this process. Arguments may be anything that str() makes an argument of."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder, not made yet."""
    return tmp_path / "out"


def with_defaults(argv: Sequence[object], defaults: dict[str, object]) -> list[object]:
    """The arguments, with the options of `defaults` that they do not give themselves: none may be given twice."""
    return [*(word for flag, value in defaults.items() if flag not in argv for word in (flag, value)), *argv]


@pytest.fixture
def t2i(cli: Cli, checkpoints: dict[str, Path], out: Path) -> Cli:
    """`t2i` with the siglip checkpoint, few steps, into `out`, unless it is given others."""
    defaults = {"--model-path": checkpoints["siglip"], "--steps": 4, "--output-dir": out}
    return lambda *argv: cli("t2i", *with_defaults(argv, defaults))


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is loaded: what is checked first must be."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("scale_rae.networks.load", load)


@pytest.fixture(scope="session")
def drawing_checkpoint(
    checkpoints: dict[str, Path], models: dict[str, ScaleRAE], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The siglip checkpoint with two rows of its head swapped, so that it answers an image with an image."""
    model = models["siglip"]
    first = model.answer("Make it blue", images=Image.new("RGB", (20, 20), "red"), max_new_tokens=1)[0].reply.ids[0]
    root = tmp_path_factory.mktemp("drawing") / "all"
    shutil.copytree(checkpoints["siglip"].parent, root)
    weights = load_file(root / "model" / "model.safetensors")
    head = weights["lm_head.weight"] if "lm_head.weight" in weights else weights["model.embed_tokens.weight"]
    rows = [first, model.tokenizer.image_start]
    head[rows] = head[rows[::-1]].clone()
    save_file(weights, root / "model" / "model.safetensors", {"format": "pt"})
    return root / "model"


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> str:
    """All runs happen in one second."""
    for module in ("scale_rae.cli.runs", "scale_rae.cli.latent"):
        monkeypatch.setattr(f"{module}.timestamp", lambda: "20260102-030405")
    return "20260102-030405"


def left(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def only_manifest(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*_manifest.json")
    return json.loads(path.read_text(encoding="utf-8"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
