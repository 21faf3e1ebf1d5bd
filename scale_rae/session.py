"""A loaded model with what a manifest says of it: where its files are from, what pins them, how long it took."""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from scale_rae.hub import changed_files
from scale_rae.options import ModelChoice as ModelChoice
from scale_rae.version import __version__

if TYPE_CHECKING:
    from scale_rae.hub import Source
    from scale_rae.pipeline import ScaleRAE


def find_model(choice: ModelChoice) -> Source:
    """The files of the model that was chosen, fetched if need be, after all checks that need no torch.

    Raises:
        OptionError: for values that are no choice. CheckpointError, HubError: see `hub.find`. ConfigError: for a
            config.json that cannot be used.
    """
    from scale_rae.config import load_config
    from scale_rae.hub import find

    choice.check()
    source = find(choice.model_path, "model", revision=choice.revision)
    load_config(source.folder)
    return source


class LoadingBar(Protocol):
    """What shows how loading goes; `stop` takes it away, also after an error."""

    def load(self, what: str, done: int, total: int) -> None:
        """Bytes of weights read so far."""

    def stop(self) -> None:
        """Called when the weights are read or cannot be."""


class Session:
    """`Session(choice, bars)` loads the model; `decoder=True`, `encoder=True` load those at once as well.

    `source` is `find_model(choice)`, where a command has looked the model up already, before it imported torch.
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
        from scale_rae.pipeline import ScaleRAE

        self._identities: dict[str, _Identity] = {}
        self._identify("model", source)  # hashed while it loads
        try:
            self.model: ScaleRAE = ScaleRAE.from_pretrained(
                source,
                decoder=choice.decoder_repo,
                device=choice.device,
                dtype=choice.dtype,
                progress=bars.load if bars is not None else None,
                compile=choice.compile,
                quantize=choice.quantize,
                split_batches=split_batches,
            )
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
        self._identify_loaded_parts()
        self.seconds = {"load": round(time.perf_counter() - start, 3)}

    def _identify(self, part: str, source: Source | None) -> None:
        if source is not None and part not in self._identities:
            self._identities[part] = _Identity(source)

    def _identify_loaded_parts(self) -> None:
        self._identify("encoder", self.model.encoder_source)
        self._identify("decoder", self.model.decoder_source)

    def describe(self) -> dict[str, Any]:
        """The manifest's part on model, device and versions. Waits for the files' hashes if they are not done."""
        import torch

        self._identify_loaded_parts()
        parts = {part: self._identities[part].describe() if part in self._identities else None for part in _PARTS}
        return {
            "model_path": parts["model"]["name"] if parts["model"] else None,
            **parts,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "quantize": self.model.speed.quantize,
            "versions": {
                "scale_rae": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "pillow", "safetensors", "tokenizers")},
            },
        }


_PARTS = ("model", "encoder", "decoder")


class _Identity:
    """What pins a source's files, worked out on a thread of its own: hashing gigabytes takes as long as reading them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._result: dict[str, str] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)  # a daemon, so that Ctrl-C needn't wait for it
        self._thread.start()

    def _hash(self) -> None:
        try:
            self._result = self._source.identity()
        except Exception as e:  # raised again where it is asked for
            self._error = e

    def describe(self) -> dict[str, Any]:
        """{"name", "revision"} for files of the hub, else {"name", "files": {file: SHA-256}} and, for a part found inside or
        beside the model's folder, "with_model": true."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        if self._source.revision:
            return {"name": self._source.name, "revision": self._source.revision}
        return {"name": self._source.address, "files": self._result} | (
            {"with_model": True} if self._source.own else {}
        )


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


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the model files that a manifest records and those loaded, in words."""
    found = []
    for part in _PARTS:
        old, new = recorded.get(part), now.get(part)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue  # not used in that run, or not in this one
        if "revision" in old and "revision" in new:
            if old["revision"] != new["revision"]:
                found.append(f"{part}: revision {new['revision']} here, {old['revision']} then")
        elif isinstance(old.get("files"), dict) and "files" in new:
            what = "VAE" if part == "decoder" and "model.pt" not in new["files"] else part
            if names := changed_files(old["files"], new["files"], what):
                found.append(f"{part}: {', '.join(names)} in {new['name']}")
        else:
            found.append(f"{part}: {_kind(new)} here, {_kind(old)} then")
    return found


def reward_differs(recorded: Any, now: Any) -> bool:
    """Whether two rewards, described as `Reward.identity` does, differ in their files; folders may be called otherwise."""
    if not isinstance(recorded, dict) or not isinstance(now, dict) or recorded.keys() != now.keys():
        return bool(recorded != now)
    return any(_part_differs(recorded[part], now[part]) for part in now)


def _part_differs(old: Any, new: Any) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return bool(old != new)
    if isinstance(old.get("files"), dict) and "files" in new:
        return bool(changed_files(old["files"], new["files"], "reward"))
    return any(old.get(key) != new.get(key) for key in {*old, *new} - {"name"})


def _kind(source: dict[str, Any]) -> str:
    return f"hub revision {source['revision']}" if "revision" in source else f"folder {source.get('name')}"
