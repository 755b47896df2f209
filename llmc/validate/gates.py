"""Gates: the target's thresholds held against what was measured."""

import math
from collections.abc import Sequence

from llmc.artifact.verdict import Check, CheckStatus, Measurement, MeasurementStatus, Verdict
from llmc.config import Gate
from llmc.errors import ConfigError


def evaluate(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> Verdict:
    """Hold every gate against the measurement of its metric.

    A gate fails if its metric exceeds the bound, is NaN or infinite, or was not measured; only a
    metric that does not apply to the model (no sliding window) is let through. A measurement that is
    NaN or infinite fails even where no gate asks for it.

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
        if m.metric not in gated and m.value is not None and not math.isfinite(m.value)
    ]
    return Verdict(passed=all(c.status is not CheckStatus.FAIL for c in checks), checks=tuple(checks))


def _check(gate: Gate, measurement: Measurement | None) -> Check:
    status = CheckStatus.FAIL
    if measurement is not None:
        if measurement.status is MeasurementStatus.NOT_APPLICABLE:
            status = CheckStatus.NOT_APPLICABLE
        elif _within(gate, measurement.value):
            status = CheckStatus.PASS
    return Check(
        metric=gate.metric,
        value=None if measurement is None else measurement.value,
        bound=gate.min if gate.max is None else gate.max,
        direction="min" if gate.max is None else "max",
        reason=gate.reason,
        status=status,
        detail="not measured" if measurement is None else measurement.detail,
        where="nowhere" if measurement is None else measurement.where,
    )


def _within(gate: Gate, value: float | None) -> bool:
    if value is None or not math.isfinite(value):
        return False
    if gate.max is not None:
        return value <= gate.max
    return gate.min is not None and value >= gate.min


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
