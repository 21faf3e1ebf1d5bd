"""Shares of things counted, with their Wilson intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with its 95 % Wilson interval."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """right / total, 0 for none of none."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval."""
        if not self.total:
            return 0.0, 1.0
        z2 = 1.96**2
        centre = self.value + z2 / (2 * self.total)
        spread = 1.96 * math.sqrt(self.value * (1 - self.value) / self.total + z2 / (4 * self.total**2))
        scale = 1 + z2 / self.total
        return (centre - spread) / scale, (centre + spread) / scale

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.right}/{self.total})"

    def record(self) -> dict[str, Any]:
        """The share as JSON values; the interval is rounded to six digits."""
        low, high = self.interval
        return {
            "right": self.right,
            "total": self.total,
            "share": self.value,
            "interval": [round(low, 6), round(high, 6)],
        }
