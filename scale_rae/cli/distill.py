"""The command `scale-rae distill`: a student that draws in few evaluations."""

from __future__ import annotations

from scale_rae.cli.app import show
from scale_rae.cli.options import Debug
from scale_rae.cli.signature import expanded
from scale_rae.cli.train import TrainingBar
from scale_rae.config import load_config
from scale_rae.hub import find
from scale_rae.opening import silence_libraries
from scale_rae.training.distill_settings import DistillOptions


@expanded
def command(
    *,
    options: DistillOptions,
    debug: Debug = False,
) -> None:
    """Distil a model: a student draws in 1 to 8 evaluations, guidance folded in. Needs prompts, no pictures.

    The student is a LoRA, or with --full all weights of the velocity network. Its folder is a model of its own: give it as --model-path.
    """
    options.check()
    source = find(options.model, "model", revision=options.revision)
    load_config(source.config_folder)
    if not debug:
        silence_libraries()
    from scale_rae.training.run import Watcher
    from scale_rae.training.students import distill, prompts_of

    with TrainingBar(options.out) as bar:
        folder = distill(options, source, prompts_of(options), Watcher(bar.note, bar.prepare, bar.step))
    show(str(folder))
