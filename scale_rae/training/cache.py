"""A cache of tensors on disk: latents of pictures, conditions of prompts, the model's replies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from scale_rae.checkpoint import save_tensors, writing
from scale_rae.errors import CheckpointError, first_line
from scale_rae.files import replacing

_NAME = "value"


class TensorCache:
    """A folder with one safetensors file per key.

    Several processes may write: a file is either complete or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, key: str) -> bool:
        """Whether there is a tensor."""
        return self._path(key).is_file()

    def get(self, key: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CheckpointError: naming the file, when it is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._path(key))[_NAME]
        except (OSError, SafetensorError, KeyError) as e:
            raise CheckpointError(
                f"{self._path(key)}: cannot be read ({first_line(e)}); remove it and run again"
            ) from e

    def add(self, key: str, value: Tensor) -> None:
        """Writes a tensor, unless there is one.

        Raises:
            OutputError: naming the file, when it cannot be written.
        """
        path = self._path(key)
        if self.has(key):
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as fresh:
                save_tensors({_NAME: value.detach().cpu().contiguous()}, fresh)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def key_of(*parts: object) -> str:
    """A key for what depends on these parts alone."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which latents and conditions of networks that compute in `dtype` are kept."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16
