"""The command `scale-rae train`: fine-tune a model on pictures and texts, or on its own drawings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from scale_rae.cli.app import say, show
from scale_rae.cli.options import Debug
from scale_rae.cli.progress import TextBar, duration
from scale_rae.cli.signature import expanded
from scale_rae.config import load_config
from scale_rae.errors import DataError
from scale_rae.hub import Source, find
from scale_rae.opening import silence_libraries
from scale_rae.promptfile import read_prompts
from scale_rae.training.records import no_report, read_records
from scale_rae.training.settings import TrainingOptions

if TYPE_CHECKING:
    from scale_rae.training.trainer import Progress


@expanded
def command(
    *,
    options: TrainingOptions,
    debug: Debug = False,
) -> None:
    """Fine-tune a model: a LoRA, or with --full all weights of its networks. Needs pictures with texts.

    As in: scale-rae train --data my-pictures --out my-lora, and then scale-rae t2i "…" --lora my-lora

    The LoRA is in PEFT's format; every command takes its folder as --lora. With --objective self-reward, prompts do without pictures.

    For several GPUs, start with torchrun.
    """
    options.check()
    if options.rewards_itself:
        _on_verdicts(options, debug)
        return
    try:
        with TrainingBar(options.out) as bar:
            report = bar.prepare if _is_first() else no_report
            records, problems = read_records(options, report)  # before a model is downloaded
        source = checked_model(options.model, options.revision, debug)
        _list(f"left out: {problem}" for problem in problems)
        from scale_rae.training.run import Watcher, train

        with TrainingBar(options.out) as bar:
            folder = train(options, source, records, Watcher(bar.note, bar.prepare, bar.step))
    except DataError as e:
        _list(e.problems)
        raise
    if _is_first():
        show(str(folder))


def _is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or was started alone."""
    return os.environ.get("RANK", "0") == "0"


def _list(lines: Iterable[str]) -> None:
    """Shows lines that all processes have, once."""
    for line in lines if _is_first() else ():
        say(line)


def _on_verdicts(options: TrainingOptions, debug: bool) -> None:
    """Trains on the model's own drawings."""
    own = options.self_reward
    assert own.prompts is not None  # checked
    prompts = read_prompts(own.prompts)  # before a model is downloaded
    if own.verify_prompts is not None:
        read_prompts(own.verify_prompts)
    source = checked_model(options.model, options.revision, debug)
    from scale_rae.training.run import Watcher
    from scale_rae.training.self_reward import train_on_verdicts

    with TrainingBar(options.out) as bar:
        folder = train_on_verdicts(options, source, prompts, Watcher(bar.note, bar.prepare, bar.step))
    if _is_first():
        show(str(folder))


def checked_model(model: str, revision: str | None, debug: bool) -> Source:
    """The files of the model to train, once its configuration is known to be good; libraries are silent unless `debug`."""
    source = find(model, "model", revision=revision)
    load_config(source.config_folder)
    if not debug:
        silence_libraries()
    return source


class TrainingBar:
    """A progress bar of preparing and of training on stderr; a pipe gets a line now and then.

    When Ctrl-C ends the training, the bar says whether it can be resumed: whether `out` has a checkpoint.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._shown = sys.stderr.isatty()
        self._bar = TextBar()
        self._said = 0

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if error[0] is KeyboardInterrupt:
            if any(self._out.glob("checkpoint-*")):
                say(f"{self._out}: to go on from the newest checkpoint, run the same command with --resume")
            else:
                say(f"{self._out}: no checkpoint was written yet; --save-steps says after how many steps one is")

    def note(self, text: str) -> None:
        """Shows a note."""
        if not self._bar.print(text):
            say(f"note: {text}")

    def prepare(self, what: str, done: int, total: int) -> None:
        """Shows how much is prepared."""
        self._update(what, done, total)

    def step(self, progress: Progress) -> None:
        """Shows a step."""
        text = f"step {progress.step}/{progress.steps}, loss {progress.loss:.4f}"
        if progress.pace > 0:  # not before the first line of the log, nor where nothing is drawn
            text += f", {progress.pace:.1f} {progress.unit}/s"
        if progress.left == progress.left:
            text += f", {duration(progress.left)} left"
        self._update(text, progress.step, progress.steps)

    def _update(self, text: str, done: int, total: int) -> None:
        if not self._shown:
            tenth = 10 * done // max(1, total)
            if tenth != self._said or done == total:
                self._said = tenth
                say(text if text.startswith("step") else f"{text}: {done} of {total}")
            return
        self._bar.update(text, done, total)
