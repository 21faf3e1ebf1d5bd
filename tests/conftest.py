from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from xdist.scheduler import LoadScopeScheduling

    from scale_rae.pipeline import ScaleRAE

# pytest's first process, which runs no test, imports this file before it starts the others: torch would take it seconds.
# Tests run in parallel, and so do the programs that they start: threads that wait for a core take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
gc.disable()  # until the first test: what importing the tests makes stays
MANY_MODULES = 300  # at least as many come with torch, transformers or gradio
os.environ["SCALE_RAE_CONFIG"] = ""  # whoever runs the tests may have a configuration file

WITH_GRADIO = ("tests/attacks/test_page.py", "tests/cli/test_demo.py")  # besides tests/demo
_known = [0]  # modules that were imported when objects were last left out of the search for garbage
GOLDEN_CASES = ("siglip", "webssl", "ddt", "wide")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _exact_batches_are_remembered(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The bundled model's exact batch sizes are measured once per run and not once per load, as long as drawing is as it is."""
    import torch

    from scale_rae.pipeline import ScaleRAE
    from scale_rae.sampling import LatentSampler
    from scale_rae.wording import is_bundled

    measure, usual = ScaleRAE.exact_batch, (ScaleRAE.sample, LatentSampler.sample_batch)
    found: dict[Any, int] = {}  # by tests' own ways to draw; what is usual is in files
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of this run

    def remembered(self: ScaleRAE, most: int, options: Sequence[Any], one_prompt: bool) -> int:
        if not is_bundled(self.source) or "sample" in vars(self):  # replaced by the test
            return measure(self, most, options, one_prompt)
        drawing = (ScaleRAE.sample, LatentSampler.sample_batch)
        how = (self.dtype, self.device, self.speed, torch.get_num_threads(), one_prompt)
        key = repr((*how, *(dataclasses.replace(option, steps=2) for option in options)))
        if drawing != usual:
            if (drawing, most, key) not in found:
                found[drawing, most, key] = measure(self, most, options, one_prompt)
            return found[drawing, most, key]
        name = f"exact-{hashlib.sha256(key.encode()).hexdigest()}-"
        for file in folder.glob(f"{name}*"):
            tried, size = map(int, file.name.removeprefix(name).split("-"))
            if tried == most or size == tried >= most:  # every smaller size was compared too
                return min(size, most)
        size = measure(self, most, options, one_prompt)
        (folder / f"{name}{most}-{size}").touch()
        return size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaleRAE, "exact_batch", remembered)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of the golden checkpoints, encoder and decoder beside them."""
    from tests.helpers.made_checkpoints import golden_case, write_checkpoint

    return {name: write_checkpoint(golden_case(name), tmp_path_factory.mktemp(name)) for name in GOLDEN_CASES}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Path]) -> dict[str, ScaleRAE]:
    from scale_rae.pipeline import ScaleRAE

    return {name: ScaleRAE.from_pretrained(str(folder), device="cpu") for name, folder in checkpoints.items()}


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden_model(request: pytest.FixtureRequest, models: dict[str, ScaleRAE]) -> Iterator[tuple[str, ScaleRAE]]:
    return request.param, models[request.param]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(conditions, images) of each batch that is drawn from now on."""
    from scale_rae.sampling import LatentSampler

    sizes: list[tuple[int, int]] = []
    draw = LatentSampler.sample_batch

    def watched(self: LatentSampler, condition: torch.Tensor, seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        sizes.append((len(condition), len(seeds)))
        return draw(self, condition, seeds, *rest)

    monkeypatch.setattr(LatentSampler, "sample_batch", watched)
    return sizes


def pytest_runtest_setup() -> None:
    """Has garbage be looked for among what tests made, not in what torch and other large packages hold, which stays.

    With Python's own settings that took 8 % of the time.
    """
    if len(sys.modules) > _known[0] + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _known[0] = len(sys.modules)
        gc.set_threshold(5000)  # objects; 700 by default
        gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Has each of several processes import its share of the tests first, so that no two rewrite the same asserts; that takes seconds."""
    workers: dict[str, Any] = getattr(session.config, "workerinput", {})
    if not workers or sys.dont_write_bytecode:
        return
    here = Path(__file__).parent
    files = sorted(here.glob("**/test_*.py"))
    for file in files[int(workers["workerid"].removeprefix("gw")) :: workers["workercount"]]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # pytest reports it when it collects the file
            importlib.import_module(".".join(file.relative_to(here.parent).with_suffix("").parts))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The processes of `-n auto`: one more than the cores, for tests that wait for a program leave their core idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """With `--dist loadscope`, a process runs all tests of a file; one process alone runs those that import gradio, which takes seconds."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "gradio" if file.startswith(("tests/demo/", *WITH_GRADIO)) else file

    return ByFile(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if torch.cuda.is_available():
            return
    for item in on_gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
