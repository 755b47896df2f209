"""Compute confidence intervals of means over windows of text."""

from collections.abc import Sequence

import numpy as np

#: The two-sided confidence level of every interval.
CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's t interval of the mean of independent values, one per window; at least two.

    Tokens of one window depend on each other, so that windows are the sample, not tokens.
    """
    count = len(values)
    mean = float(np.mean(values))
    half = student_quantile(count - 1) * float(np.std(values, ddof=1)) / count**0.5
    return mean - half, mean + half


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Return Student's t interval of a ratio of means over two or more paired windows (Cochran 1977, 6.4)."""
    ratio = float(numerators.mean() / denominators.mean())
    low, high = mean_interval((numerators - ratio * denominators).tolist())
    return ratio + low / float(denominators.mean()), ratio + high / float(denominators.mean())


def student_quantile(freedom: int) -> float:
    """Return the quantile of Student's t for the upper end of an interval of `CONFIDENCE`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
