"""Share what all measurements need: comparing logits, and reporting a broken artifact as a failed figure."""

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
    """Return a measured figure, with its confidence interval if it is an estimate."""
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
    """Return a measurement without a figure, with the reason in `detail`."""
    return Measurement(metric=metric, value=None, status=status, detail=detail, where=where)


def broken(metrics: tuple[Metric, ...], error: ParityError, where: str) -> tuple[Measurement, ...]:
    """Return NaN for each metric: the artifact broke its interface while they were measured."""
    return tuple(measured(metric, math.nan, error.fact, where) for metric in metrics)


def measure(
    metrics: tuple[Metric, ...], where: str, take: Callable[[], tuple[Measurement, ...]]
) -> tuple[Measurement, ...]:
    """Return `take()`, or NaN for each of `metrics` if the artifact breaks its interface meanwhile."""
    try:
        return take()
    except ParityError as error:
        return broken(metrics, error, where)


def mismatches(metric: Metric, differences: Sequence[str], fine: str, where: str) -> Measurement:
    """Return the number of places that differ, all of them named; `fine` is the detail if there is none."""
    return measured(metric, float(len(differences)), "; ".join(differences) or fine, where)


def require_comparable(actual: Array, shape: tuple[int, ...], place: str) -> None:
    """Raise ParityError unless `actual` has the original's `shape` and is finite."""
    if actual.shape != shape:
        raise ParityError(f"logits at {place} have shape {actual.shape}, the original's {shape}")
    bad = ~np.isfinite(actual)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ParityError(f"{int(bad.sum())} logits are NaN or infinite at {place}, the first at {index}")


def max_abs(actual: Array, expected: Array, place: str) -> float:
    """Return the largest absolute difference of two arrays of logits.

    Raises:
        ParityError: Their shapes differ, or `actual` is not finite.
    """
    require_comparable(actual, expected.shape, place)
    return float(np.max(np.abs(actual - expected), initial=0.0))
