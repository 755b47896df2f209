"""Derive the gates of a tuned target: those of its base, with quality bounds that fit the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.config import Gate, Metric
from llmc.pipeline.tune.choosing import Bound
from llmc.validate.gates import evaluate

if TYPE_CHECKING:
    from llmc.artifact.verdict import Measurement


def strict_gates(gates: Sequence[Gate], max_kl: float | None) -> tuple[Gate, ...]:
    """Return the gates of a tuned target regardless of its loss: a right graph, and the requested bound."""
    exact = tuple(gate for gate in gates if not gate.metric.family.restated)
    return exact if max_kl is None else (*exact, _asked(max_kl))


def restate_gates(
    gates: Sequence[Gate], measurements: Sequence[Measurement], max_kl: float | None
) -> tuple[Gate, ...]:
    """Return gates that pass with the measurements: quality gates get new bounds if they fail with the old.

    Args:
        max_kl: Bound on the KL divergence that the user requested; it becomes a gate.
    """
    by_metric = {m.metric: m for m in measurements}
    restated = []
    for gate in gates:
        measured = by_metric.get(gate.metric)
        requested = gate.metric is Metric.TEXT_KL_MEAN and max_kl is not None
        if requested or not gate.metric.family.restated or measured is None or measured.value is None:
            restated += [] if requested else [gate]
        elif any(c.metric is gate.metric for c in evaluate((gate,), (measured,)).missed):
            restated.append(_restated(gate, measured))
        else:
            restated.append(gate)
    if max_kl is not None:
        restated.append(_asked(max_kl))
    return tuple(restated)


def _asked(max_kl: float) -> Gate:
    reason = f"nats per token; requested of llmc tune by {Bound.KL.value}"
    return Gate(metric=Metric.TEXT_KL_MEAN, max=max_kl, reason=reason)


def _restated(gate: Gate, measured: Measurement) -> Gate:
    """Set a bound a tenth beyond the worse end of the measured interval."""
    worse = measured.high if gate.max is not None else measured.low
    value = measured.value if worse is None else worse
    if value is None:
        return gate
    bound = float(f"{value + (0.1 if gate.max is not None else -0.1) * abs(value):.3g}")
    reason = f"{measured.value:.4g} was measured by llmc tune; the bound is a tenth beyond the worse end"
    return Gate(
        metric=gate.metric,
        max=None if gate.max is None else bound,
        min=None if gate.min is None else bound,
        reason=reason,
    )
