"""Gates of a tuned target: those of its base, with bounds on quality that fit what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.config import Gate, Metric
from llmc.pipeline.tune.choosing import Bound
from llmc.validate.gates import evaluate

if TYPE_CHECKING:
    from llmc.artifact.verdict import Measurement


def strict_gates(gates: Sequence[Gate], max_kl: float | None) -> tuple[Gate, ...]:
    """What a tuned target is held to whatever it may lose: a right graph, and the bound asked for."""
    exact = tuple(gate for gate in gates if not gate.metric.family.restated)
    return exact if max_kl is None else (*exact, _asked(max_kl))


def restate_gates(
    gates: Sequence[Gate], measurements: Sequence[Measurement], max_kl: float | None
) -> tuple[Gate, ...]:
    """Gates that what was measured keeps: those on quality with new bounds where it does not keep the old.

    Args:
        max_kl: Bound on the KL divergence that the user asked for, which is a gate then.
    """
    found = {m.metric: m for m in measurements}
    made = []
    for gate in gates:
        measured = found.get(gate.metric)
        asked = gate.metric is Metric.TEXT_KL_MEAN and max_kl is not None
        if asked or not gate.metric.family.restated or measured is None or measured.value is None:
            made += [] if asked else [gate]
        elif any(c.metric is gate.metric for c in evaluate((gate,), (measured,)).missed):
            made.append(_restated(gate, measured))
        else:
            made.append(gate)
    if max_kl is not None:
        made.append(_asked(max_kl))
    return tuple(made)


def _asked(max_kl: float) -> Gate:
    reason = f"nats per token; asked of llmc tune by {Bound.KL.value}"
    return Gate(metric=Metric.TEXT_KL_MEAN, max=max_kl, reason=reason)


def _restated(gate: Gate, measured: Measurement) -> Gate:
    """A tenth beyond the worse end of what was measured."""
    worse = measured.high if gate.max is not None else measured.low
    value = measured.value if worse is None else worse
    if value is None:
        return gate
    bound = float(f"{value + (0.1 if gate.max is not None else -0.1) * abs(value):.3g}")
    reason = (
        f"{measured.value:.4g} was measured by llmc tune, and a tenth beyond the worse end is let through"
    )
    return Gate(
        metric=gate.metric,
        max=None if gate.max is None else bound,
        min=None if gate.min is None else bound,
        reason=reason,
    )
