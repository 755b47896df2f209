"""What all measurements share: comparing logits, and turning a broken artifact into a failed figure."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError


def measured(
    metric: Metric,
    value: float,
    detail: str,
    where: str,
    figures: dict[str, float] | None = None,
    interval: tuple[float, float] | None = None,
) -> Measurement:
    """A figure that was taken, with its confidence interval if it is an estimate."""
    return Measurement(
        metric=metric,
        value=value,
        status=MeasurementStatus.MEASURED,
        detail=detail,
        where=where,
        figures=figures or {},
        low=None if interval is None else interval[0],
        high=None if interval is None else interval[1],
    )


def unmeasured(metric: Metric, status: MeasurementStatus, detail: str, where: str) -> Measurement:
    """No figure, and why."""
    return Measurement(metric=metric, value=None, status=status, detail=detail, where=where)


def broken(metrics: tuple[Metric, ...], error: ParityError, where: str) -> tuple[Measurement, ...]:
    """NaN for each metric: the artifact broke its interface while they were measured."""
    return tuple(measured(metric, math.nan, error.fact, where) for metric in metrics)


def measure(
    metrics: tuple[Metric, ...], where: str, take: Callable[[], tuple[Measurement, ...]]
) -> tuple[Measurement, ...]:
    """`take()`, or NaN for each of `metrics` if the artifact breaks its interface on the way."""
    try:
        return take()
    except ParityError as error:
        return broken(metrics, error, where)


def mismatches(metric: Metric, found: Sequence[str], fine: str, where: str) -> Measurement:
    """The number of places that differ, all of them named; `fine` is said where there is none."""
    return measured(metric, float(len(found)), "; ".join(found) or fine, where)


def require_comparable(actual: Array, shape: tuple[int, ...], place: str) -> None:
    """Raise ParityError unless `actual` has the original's `shape` and is finite."""
    if actual.shape != shape:
        raise ParityError(f"logits at {place} have shape {actual.shape}, the original's {shape}")
    bad = ~np.isfinite(actual)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ParityError(f"{int(bad.sum())} logits are NaN or infinite at {place}, the first at {index}")


def max_abs(actual: Array, expected: Array, place: str) -> float:
    """Largest absolute difference of two arrays of logits.

    Raises:
        ParityError: Their shapes differ, or `actual` is not finite.
    """
    require_comparable(actual, expected.shape, place)
    return float(np.max(np.abs(actual - expected), initial=0.0))
