from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scale_rae.cli import main
from tests.cli.conftest import with_defaults
from tests.helpers.forked import fork_workers

NAME = Path("shapes") / "2_qa_prompt_template_scale_latent"
QUICK = ["--model-path", "shapes", "--steps", "2", "--solver", "dpmpp_2m", "--reward", "none"]
QUICK += ["--n-samples", "2", "--scaling-rounds", "2", "--batch-size", "2"]
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a red circle"},
    {"prompt": "a photo of a blue cross and a pink square", "index": 7},
    {"prompt": "a photo of two green triangles"},
]


@dataclass
class Result:
    code: int
    out: str
    err: str


class Scale:
    """`scale(...)` runs `scale-rae scale t2i` with the three prompts, few steps, into `scale.folder`, unless options say otherwise."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str] | None = None) -> None:
        self.prompts = write_prompts(root / "prompts.jsonl", PROMPTS)
        self.out = root / "out"
        self.folder = self.out / NAME
        self._capsys = capsys

    def __call__(self, *more: object, device: bool = True) -> Result:
        own = {"--metadata-file": self.prompts, "--output-dir": self.out} | ({"--device": "cpu"} if device else {})
        quick = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
        if "adaptive" in more:
            del quick["--scaling-rounds"]
        argv = [str(a) for a in ("scale", "t2i", *with_defaults(more, quick | own))]
        if self._capsys is None:
            return Result(main(argv), "", "")
        self._capsys.readouterr()
        code = main(argv)
        return Result(code, *self._capsys.readouterr())


def write_prompts(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of every prompt, and the batches' records."""
    files = [*folder.glob("[0-9]*/**/*"), *folder.glob(".work/batches/**/*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.is_file()}


def record(folder: Path, index: int = 0) -> dict[str, Any]:
    (line,) = (folder / f"{index:05}" / "metadata.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.fixture
def scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scale:
    return Scale(tmp_path, capsys)


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that one worker finished and nobody disturbed; tests leave it as it is."""
    scale = Scale(tmp_path_factory.mktemp("reference"))
    assert scale().code == 0
    return scale.folder


@pytest.fixture(scope="session")
def reference(reference_folder: Path) -> dict[str, bytes]:
    """What one worker leaves that nobody disturbs."""
    return snapshot(reference_folder)


@pytest.fixture
def finished(scale: Scale, reference_folder: Path) -> Scale:
    """`scale`, whose experiment is finished already: its folder is a copy of the reference."""
    shutil.copytree(reference_folder, scale.folder)
    return scale


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the local launcher fork its workers."""
    fork_workers(monkeypatch)


@pytest.fixture
def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU draw a batch's images at once, as other devices do, and not apart."""
    monkeypatch.setattr("scale_rae.scaling.worker.draws_on_threads", lambda device: False)


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Has load_reward give a reward that is a function of the first pixels, and is called imagereward."""

    class Stub:
        name = "imagereward"

        def identity(self) -> dict[str, Any]:
            return {"revision": "stub"}

        def score(self, images: Sequence[Any], prompt: str) -> list[float]:
            return [float(image.getpixel((5, 5))[0] // 64) for image in images]

    monkeypatch.setattr("scale_rae.rewards.load_reward", lambda name, model, path=None: Stub())
    return Stub
