"""The road: every module of scale_rae in an order in which none imports a later one, so that there are no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scale_rae"

# A new module takes its place here: after all that it imports, before all that import it. An import counts wherever it
# stands: inside a function and under TYPE_CHECKING, too.
ROAD = """
version errors shares files jsonio options processes clock templates
tokenizer_file prompt promptfile ranking acceptance
shapes shapes.world shapes.asking shapes.draw shapes.judge
codes student config layout headers footprint memory_plan containers images torch_file checkpoint hub provenance adapters listing inspection wording memory cpu noise
compiling cuda_graphs residency
float8 kernels few_images products toolchain quantization machine
qwen2 qwen2_modules kv_cache language
dit fast_blocks fast_weights flow fast_dit sampling
encoder decoder vae loading networks publishing
training.sequences training.settings training.records training.cache training.adamw8bit training.parallel training.optim training.losses training.passes training.lora training.batches
training.learner training.drawing training.prepare training.objective training.validation training.checkpoints training.log training.trainer training.run training.distill_settings training.exchange training.distillation training.students training
scores results
pipeline
manifest outputs opening
rewards.parts rewards.imagereward rewards.siglip rewards.pickscore rewards training.reading training.self_reward adaptive prompt_search scale_rae diffusers transformers
geneval.published geneval.verdicts geneval.crops geneval.colors geneval.mask2former geneval.detector geneval.judging geneval
scaling scaling.settings scaling.experiment scaling.records scaling.events scaling.locks scaling.local_files scaling.object_store scaling.store
scaling.batches scaling.joining scaling.lanes scaling.waves scaling.worker scaling.worker_process scaling.launch scaling.local scaling.ranks scaling.ray_cluster
scaling.replacing scaling.reader scaling.scoring scaling.select
geneval.results geneval.summary geneval.folders geneval.policies geneval.journal geneval.judges geneval.evaluation geneval.workers
scaling.plots scaling.report scaling.sheet geneval.page geneval.outcome geneval.reproduction
serve serve.settings serve.links serve.refusals serve.schema serve.errors serve.metrics serve.turns serve.jobs serve.schedule serve.engine
serve.guard serve.connections serve.data_urls serve.decoding serve.streaming serve.routes serve.routes.body serve.routes.checks
serve.routes.images serve.routes.conversations serve.routes.chat serve.routes.responses serve.routes.models serve.routes.health serve.routes.home serve.app serve.server
demo demo.limits demo.results demo.streams demo.best_of demo.candidates demo.shared_model demo.listening demo.surroundings demo.words demo.fence
demo.widgets demo.board demo.page demo.event_streams demo.gate demo.server
cli.signature cli.defaults cli.app cli.progress cli.options cli.preview cli.runs cli.searches cli.train cli.distill cli.merge cli.t2i cli.img cli.latent cli.inspect cli.scale cli.select cli.score cli.evaluate cli.reproduce cli.report cli.sheet cli.serve
cli.demo cli __main__
shapes.evaluate
""".split()  # noqa: SIM905 - a list of a hundred quoted names is hard to read


def name_of(path: Path) -> str:
    """A module's name below the package; the package itself is "scale_rae"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "scale_rae"


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def module_of(name: str) -> str | None:
    """The module that a dotted name belongs to: `scale_rae.errors.need` to `errors`; None for other packages' names."""
    package, _, inside = name.partition(".")
    if package != "scale_rae":
        return None
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "scale_rae"


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in names if (module := module_of(name)) is not None} - {name_of(path)}


def test_every_module_has_its_place() -> None:
    assert sorted(ROAD) == sorted(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_a_later_one(name: str) -> None:
    place = {module: i for i, module in enumerate(ROAD)}
    later = sorted(other for other in imported(MODULES[name]) if place.get(other, 0) > place.get(name, len(ROAD)))
    assert not later, f"{name} imports {', '.join(later)}, which come after it"
