"""Training of any checkpoint: losses, data, LoRA, the loop. `scale-rae train` is the command.

    from scale_rae.training import flow_loss

Importing this package loads no torch; its functions do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scale_rae.training.losses import flow_loss, sample_times

__all__ = ["flow_loss", "sample_times"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from scale_rae.training import losses

        return getattr(losses, name)
    raise AttributeError(f"module 'scale_rae.training' has no attribute {name!r}")
