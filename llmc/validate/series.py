"""Summarize series of times: percentiles, rates, ratios of two series, and the noise between them."""

import math
from collections.abc import Sequence

import numpy as np

from llmc.artifact.latency import Ratio, Timing
from llmc.validate.interval import mean_interval


def timing(samples_ms: Sequence[float]) -> Timing:
    """Return percentiles and range of a series in milliseconds."""
    p50, p95, p99 = (float(v) for v in np.percentile(samples_ms, (50, 95, 99)))
    return Timing(
        n=len(samples_ms), p50_ms=p50, p95_ms=p95, p99_ms=p99, min_ms=min(samples_ms), max_ms=max(samples_ms)
    )


def ratio(artifact: Sequence[Sequence[float]], original: Sequence[Sequence[float]]) -> Ratio:
    """Return the ratio of medians of two interleaved series of rounds, and the range over the rounds."""
    rounds = [float(np.median(a)) / float(np.median(b)) for a, b in zip(artifact, original, strict=True)]
    value = float(np.median(np.concatenate(artifact))) / float(np.median(np.concatenate(original)))
    return Ratio(value=value, low=min(rounds), high=max(rounds))


def noise(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return by how much two interleaved series of the same thing may differ, as a fraction.

    It is the farther end of the confidence interval of the mean logarithm of the rounds' ratios; with fewer
    than three rounds it is the largest of them.
    """
    logs = [math.log(float(np.median(a)) / float(np.median(b))) for a, b in zip(first, second, strict=True)]
    ends = mean_interval(logs) if len(logs) > 2 else (min(logs), max(logs))
    return math.exp(max(abs(end) for end in ends)) - 1


def tokens_per_second(rounds: Sequence[Sequence[float]], tokens: int) -> float:
    """Return tokens per second over all rounds, each time of which `tokens` took."""
    times = [x for r in rounds for x in r]
    return 1e3 * tokens * len(times) / sum(times)
