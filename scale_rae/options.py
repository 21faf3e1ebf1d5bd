"""Options that the command line, the Python API and the servers share: names, defaults and checks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from scale_rae.errors import InputError

COMPILE = ("auto", "on", "off")
QUANTIZE = ("fp8",)
ATTENTION = ("auto", "flash", "own")


@dataclass(frozen=True)
class Speed:
    """Which tricks are used. `graph`, `pad`, `group`, `kernels` and `ahead` act on CUDA devices only. `null` needs `together`.
    `attention` is PyTorch's ("flash"), ours ("own"), or ours where it was measured to be faster ("auto"). "own" needs `kernels`
    and `defer`, without which "auto" is PyTorch's; so it is where ours cannot be had (`_attention`).

    `compile`: "on", "off", or "auto", which compiles on CUDA once enough images are to be drawn to make up for the
    seconds it takes (`ScaleRAE.expect`). `quantize`: None or "fp8".
    """

    compile: str = "auto"
    quantize: str | None = None
    graph: bool = True
    pad: bool = True
    group: bool = True
    before: bool = True
    null: bool = True
    together: bool = True
    shared: bool = True
    defer: bool = True
    kernels: bool = True
    ahead: bool = True
    attention: str = "auto"

    def check(self) -> None:
        """Raises InputError for values that there are not."""
        if self.compile not in COMPILE:
            raise InputError(f"compile {self.compile!r}: use one of {', '.join(COMPILE)}")
        if self.attention not in ATTENTION:
            raise InputError(f"attention {self.attention!r}: use one of {', '.join(ATTENTION)}")
        if self.attention == "own" and not (self.kernels and self.defer):
            raise InputError(f"attention {self.attention!r}: needs kernels and defer, which are switched off")
        if self.quantize is not None and self.quantize not in QUANTIZE:
            raise InputError(f"quantize {self.quantize!r}: use {', '.join(QUANTIZE)}, or leave it out")
