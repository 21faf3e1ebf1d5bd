"""The command `scale-rae distill`: a student that draws in few evaluations."""

from __future__ import annotations

from scale_rae.cli.app import show
from scale_rae.cli.options import Debug
from scale_rae.cli.signature import expanded
from scale_rae.cli.train import TrainingBar, checked_model
from scale_rae.training.distill_settings import DistillOptions


@expanded
def command(
    *,
    options: DistillOptions,
    debug: Debug = False,
) -> None:
    """Distil a model: a student draws in 1 to 8 evaluations, guidance folded in. Needs prompts, no pictures.

    As in: scale-rae distill --prompts my-prompts.txt --out my-student, and then scale-rae t2i "…" --model-path my-student

    The student is a LoRA, or with --full all weights of the velocity network. Its folder is a model of its own: give it as --model-path.
    """
    options.check()
    source = checked_model(options.model, options.revision, debug)
    from scale_rae.training.run import Watcher
    from scale_rae.training.students import distill, prompts_of

    with TrainingBar(options.out) as bar:
        folder = distill(options, source, prompts_of(options), Watcher(bar.note, bar.prepare, bar.step))
    show(str(folder))
