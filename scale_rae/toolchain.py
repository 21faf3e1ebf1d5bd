"""What kernels and compiled code need besides PyTorch: Triton, a compiler, and for our own kernels an NVIDIA GPU.

Triton and torch.compile write C code that starts their kernels on a GPU, and have the machine's C compiler build it. On a CPU,
torch.compile writes C++.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from importlib.util import find_spec

import torch

from scale_rae.errors import DeviceError

_log = logging.getLogger("scale_rae")


def missing(device: torch.device) -> str | None:
    """What compiling for a device needs and this machine does not have, and where to get it; None if nothing is missing."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton (part of PyTorch's GPU builds for Linux; on Windows, the package triton-windows)"
        if os.name != "nt" and not _is_there(os.environ.get("CC"), "gcc", "clang"):  # triton-windows brings a compiler
            return "a C compiler (gcc, clang, or the program that CC names; on Debian and Ubuntu: apt install gcc)"
    if device.type == "cpu":
        usual = "cl" if os.name == "nt" else "clang++" if sys.platform == "darwin" else "g++"  # as torch looks for it
        if not _is_there(os.environ.get("CXX"), usual):
            return f"a C++ compiler ({usual}, or the program that CXX names)"
    return None


def check_compile(choice: str, device: torch.device) -> None:
    """Raises DeviceError for compile "on" where something that compiling needs is missing."""
    if choice == "on" and (what := missing(device)) is not None:
        raise DeviceError(f"compile on: compiling for {device} needs {what}, which is not here; or use --compile auto")


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether Triton kernels can be built for a GPU here, and so code compiled; if not, one warning says what is missing."""
    if device.type != "cuda":
        return False
    if (what := missing(device)) is None:
        from scale_rae import kernels

        return kernels.usable(device)
    _log.warning(
        "%s: there is no %s, so nothing is compiled and PyTorch's own kernels are used; images are the same up to rounding, and "
        "take longer",
        device,
        what.removeprefix("a "),
    )
    return False


def runs_own_kernels(device: torch.device) -> bool:
    """Whether this package's Triton kernels run on a device: on NVIDIA GPUs. Nobody has tried them on AMD's."""
    return device.type == "cuda" and torch.version.hip is None and can_compile(device)


def _is_there(chosen: str | None, *usual: str) -> bool:
    return any(shutil.which(name) for name in ((chosen,) if chosen else usual))
