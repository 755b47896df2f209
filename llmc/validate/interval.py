"""Confidence intervals of means over windows of text."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

#: Two-sided confidence of every interval.
CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean of independent values, one per window; at least two.

    Tokens of one window depend on each other, so that windows are the sample, not tokens.
    """
    count = len(values)
    mean = float(np.mean(values))
    half = student_quantile(count - 1) * float(np.std(values, ddof=1)) / count**0.5
    return mean - half, mean + half


def student_quantile(freedom: int) -> float:
    """Quantile of Student's t for the upper end of an interval of `CONFIDENCE`.

    Expansion around the normal quantile (Abramowitz and Stegun 1964, 26.7.5): within 1 % from three
    degrees of freedom on.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return float(z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4)
