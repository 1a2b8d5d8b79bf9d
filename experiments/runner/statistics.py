"""Means and differences of means with 95% intervals (Student's t distribution; Welch's where variances differ).

For independent samples i with means m_i, variances s_i² and sizes n_i, a weighted sum Σ c_i m_i has the variance
V = Σ v_i with v_i = c_i² s_i² / n_i. Its interval is Σ c_i m_i ± t(ν) √V, where t is the 97.5% point of Student's t
distribution with the Welch-Satterthwaite degrees of freedom ν = V² / Σ v_i² / (n_i - 1). Two samples with weights 1 and
-1 are Welch's t interval; a mean over tasks has weights 1/T, and its interval is one for these tasks and new seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eva_lightning.errors import InputError


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


@dataclass(frozen=True)
class Sample:
    """What is known of repeated measurements: all of it that intervals need.

    Attributes:
        mean: Their mean.
        std: Their standard deviation, with n - 1 in the denominator; None for a single one.
        n: How many.
        resolution: What the mean was rounded to (0.1 where one digit is printed); 0: not rounded.
    """

    mean: float
    std: float | None
    n: int
    resolution: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """The sample `values`, at least one."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def weighted_sum(terms: Iterable[tuple[float, Sample]]) -> Interval:
    """Interval of a weighted sum of independent means, as at the top of this file.

    A mean that was rounded adds the variance of its rounding error, resolution² / 12. `n` of the result is the smallest
    sample's; without a standard deviation in one of the samples there is no width.
    """
    known = list(terms)
    mean = math.fsum(weight * sample.mean for weight, sample in known)
    smallest = min(sample.n for _, sample in known)
    sampling = denominator = rounding = 0.0
    for weight, sample in known:
        if sample.std is None:
            return Interval(mean, None, smallest)
        variance = (weight * sample.std) ** 2 / sample.n
        sampling += variance
        denominator += variance**2 / (sample.n - 1)
        rounding += (weight * sample.resolution) ** 2 / 12
    total = sampling + rounding
    # of the sampling alone: rounding, whose variance is known, should not make an interval narrower
    degrees = sampling**2 / denominator if denominator > 0 else math.inf
    return Interval(mean, t_quantile(degrees) * math.sqrt(total) if total > 0 else 0.0, smallest)


def mean_over(samples: Sequence[Sample]) -> Interval:
    """Interval of the unweighted mean of independent means."""
    return weighted_sum((1 / len(samples), sample) for sample in samples)


def mean_difference(first: Sequence[Sample], second: Sequence[Sample]) -> Interval:
    """Interval of the mean over pairs of `first` minus `second`, all samples independent: for one pair Welch's.

    Args:
        first, second: Samples of the same tasks, in the same order.
    """
    weight = 1 / len(first)
    pairs = zip(first, second, strict=True)
    return weighted_sum(term for a, b in pairs for term in ((weight, a), (-weight, b)))


def t_quantile(degrees: float) -> float:
    """97.5% point of Student's t distribution; of the normal one for infinite `degrees`."""
    from scipy.special import stdtrit

    if not degrees > 0:
        raise InputError(f"degrees of freedom must be above 0, got {degrees}")
    return float(stdtrit(degrees, 0.975))
