"""Compare measurements with the target's gates."""

import math
from collections.abc import Sequence

from llmc.artifact.verdict import Check, CheckStatus, Measurement, MeasurementStatus, Verdict
from llmc.config import Gate, Metric
from llmc.errors import ConfigError


def evaluate(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> Verdict:
    """Compare the measurement of each gate's metric with its bound.

    A gate fails if its metric exceeds the bound, or is NaN or infinite. A metric that was not measured does
    not pass either; only a metric that does not apply to the model (no sliding window) is let through. An
    estimate passes if its whole confidence interval is within the bound, fails if none of it is, and is
    undecided in between, which does not pass. A measurement that is NaN or infinite fails even where no gate
    bounds it.

    Raises:
        ConfigError: A metric was measured twice.
    """
    by_metric = {m.metric: m for m in measurements}
    if len(by_metric) != len(measurements):
        twice = sorted({m.metric for m in measurements if by_metric[m.metric] is not m})
        raise ConfigError(f"measured more than once: {', '.join(twice)}")
    checks = [_check(gate, by_metric.get(gate.metric)) for gate in gates]
    gated = {gate.metric for gate in gates}
    checks += [
        _failed_without_gate(m)
        for m in measurements
        if m.metric not in gated and m.value is not None and not _usable(m.metric, m.value)
    ]
    fine = (CheckStatus.PASS, CheckStatus.NOT_APPLICABLE)
    return Verdict(passed=all(c.status in fine for c in checks), checks=tuple(checks))


def is_undecided(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> bool:
    """Return whether the bound of a gate lies within the confidence interval of its measurement."""
    by_metric = {m.metric: m for m in measurements}
    return any(
        _check(gate, by_metric[gate.metric]).status is CheckStatus.UNDECIDED
        for gate in gates
        if gate.metric in by_metric
    )


def _check(gate: Gate, measurement: Measurement | None) -> Check:
    if measurement is None or measurement.status is MeasurementStatus.NOT_MEASURED:
        status = CheckStatus.NOT_MEASURED
    elif measurement.status is MeasurementStatus.NOT_APPLICABLE:
        status = CheckStatus.NOT_APPLICABLE
    elif measurement.value is not None and _usable(measurement.metric, measurement.value):
        status = _judge(gate, measurement)
    else:
        status = CheckStatus.FAIL
    return Check(
        metric=gate.metric,
        value=None if measurement is None else measurement.value,
        low=None if measurement is None else measurement.low,
        high=None if measurement is None else measurement.high,
        bound=_bound(gate, None if measurement is None else measurement.tolerance),
        direction="min" if gate.max is None else "max",
        reason=gate.reason,
        status=status,
        detail="not measured" if measurement is None else measurement.detail,
        where="nowhere" if measurement is None else measurement.where,
    )


def _judge(gate: Gate, measurement: Measurement) -> CheckStatus:
    """Return pass, fail or undecided for a figure, or for both ends of its interval.

    A latency gate fails only beyond the noise of the machine, so that other load does not block a release.
    """
    ends = [measurement.value] if measurement.low is None else [measurement.low, measurement.high]
    if gate.metric.is_noisy and measurement.low is not None:
        ends = [measurement.low if gate.max is not None else measurement.high]
    within = {_within(gate, end, measurement.tolerance or 0.0) for end in ends if end is not None}
    if len(within) == 2:
        return CheckStatus.UNDECIDED
    return CheckStatus.PASS if within == {True} else CheckStatus.FAIL


def _within(gate: Gate, value: float, tolerance: float) -> bool:
    bound = _bound(gate, tolerance)
    return value <= bound if gate.max is not None else value >= bound


def _bound(gate: Gate, tolerance: float | None) -> float:
    """Return the threshold of a figure: the gate's, or the tolerance where that lets more through."""
    if gate.max is not None:
        return max(gate.max, tolerance or 0.0)
    return gate.min if gate.min is not None else math.nan


def _usable(metric: Metric, value: float) -> bool:
    """Return whether a figure is finite, or the infinite ratio of a signal to no noise at all."""
    return math.isfinite(value) or (metric.may_be_infinite and value == math.inf)


def _failed_without_gate(measurement: Measurement) -> Check:
    return Check(
        metric=measurement.metric,
        value=measurement.value,
        bound=None,
        direction=None,
        reason="a figure that is NaN or infinite fails with or without a gate",
        status=CheckStatus.FAIL,
        detail=measurement.detail,
        where=measurement.where,
    )
