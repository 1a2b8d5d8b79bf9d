"""Means with 95% intervals (Student's t distribution)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5% points of Student's t distribution for 1 to 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% interval (t distribution); None for a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of `values`, at least one."""
        mean, n = statistics.fmean(values), len(values)
        return cls(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """``0.123 ± 0.004``."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def t_quantile(degrees: int) -> float:
    """97.5% point of Student's t distribution."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    z = 1.959964
    return _T[degrees - 1] if degrees <= len(_T) else z + (z**3 + z) / (4 * degrees)
