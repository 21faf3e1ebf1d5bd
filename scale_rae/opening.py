"""`OpenedModel`, from which commands, server, page and workers start: a ModelChoice as a loaded model with its record.

This module does not import torch, so a wrong choice is reported at once.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from scale_rae.provenance import PartRecords, file_record
from scale_rae.version import __version__

if TYPE_CHECKING:
    from scale_rae.hub import Source
    from scale_rae.options import ModelChoice
    from scale_rae.pipeline import ScaleRAE


def find_model(choice: ModelChoice) -> Source:
    """The files of the chosen model, fetched if need be, after all checks that need no torch.

    Raises:
        OptionError: for values that are no choice. CheckpointError, HubError: see `hub.find`. ConfigError: for a
            config.json that cannot be used.
    """
    from scale_rae.config import load_config
    from scale_rae.hub import find

    choice.check()
    source = find(choice.model_path, "model", revision=choice.revision)
    load_config(source.config_folder)
    return source


class LoadingBar(Protocol):
    """What shows how loading goes; `stop` removes it, also after an error."""

    def load(self, what: str, done: int, total: int) -> None:
        """Bytes of weights read so far."""

    def stop(self) -> None:
        """Called when the weights are read or cannot be."""


class OpenedModel:
    """`OpenedModel(choice, bars)` loads the model; `decoder=True`, `encoder=True` load those parts at once as well.

    `source` is `find_model(choice)`, where a command has found the model already, before it imported torch. `model` is the
    ScaleRAE, `seconds` {"load": how long that took}.
    """

    def __init__(
        self,
        choice: ModelChoice,
        bars: LoadingBar | None = None,
        *,
        source: Source | None = None,
        decoder: bool = False,
        encoder: bool = False,
        debug: bool = False,
        split_batches: bool = True,
    ) -> None:
        start = time.perf_counter()
        source = source or find_model(choice)
        if not debug:
            silence_libraries()
        from scale_rae.networks import load
        from scale_rae.pipeline import ScaleRAE

        self._files = PartRecords()
        self._files.add("model", source)  # hashed while it loads
        try:
            progress = bars.load if bars is not None else None
            self.model: ScaleRAE = ScaleRAE(load(choice, source, progress, split_batches))
        finally:
            if bars is not None:
                bars.stop()
        if encoder:
            self.model.check_reads()
        if encoder or (decoder and self.model.config.vae is None):
            _ = self.model.encoder  # decoding undoes the encoder's pixel normalisation
        if encoder:
            _ = self.model.encoder.model
        if decoder:
            _ = self.model.decoder
        self._lora = [file_record(files) | {"weight": weight} for files, weight in self.model.adapters]
        self._add_loaded_parts()
        self.seconds = {"load": round(time.perf_counter() - start, 3)}

    def _add_loaded_parts(self) -> None:
        self._files.add("encoder", self.model.encoder_source)
        self._files.add("decoder", self.model.decoder_source)

    def record(self) -> dict[str, Any]:
        """What a manifest records of model, device and versions. Waits for the files' hashes if they are not done."""
        import torch

        self._add_loaded_parts()
        parts = self._files.results()
        mode, plan = self.model.residency.mode, self.model.memory_plan
        return {
            "model_path": parts["model"]["name"] if parts["model"] else None,
            **parts,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "quantize": self.model.speed.quantize,
            **({} if mode == "none" and plan is None else {"offload": mode}),
            **({} if plan is None else {"memory": plan.record()}),
            **({"lora": self._lora} if self._lora else {}),
            "versions": {
                "scale_rae": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "pillow", "safetensors", "tokenizers")},
            },
        }


def silence_libraries() -> None:
    """Stops the warnings and load reports of transformers and the hub; its download bars stay on a terminal."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Drawing imports neither; they set their own level when they are imported, by these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if "transformers" in sys.modules:
        import transformers.utils.logging as transformers_logging

        transformers_logging.set_verbosity_error()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()
