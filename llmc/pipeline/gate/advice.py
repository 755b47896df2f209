"""Advise what to do about an artifact that misses its quality gates."""

from collections.abc import Sequence

from llmc.artifact.verdict import Check, Verdict
from llmc.backends import backend_of
from llmc.catalog import list_targets
from llmc.config import Metric, Target

#: Metrics that more bits improve, in step with the divergence that is expected of a finer target.
_QUALITY = (Metric.TEXT_KL_MEAN, Metric.TEXT_TOP1, Metric.TEXT_PERPLEXITY_RATIO)
_FLOAT_BITS = 16.0


def advise(target: Target, verdict: Verdict) -> str | None:
    """Name in a sentence the built-in target that would pass, or where to look; None if neither is known.

    Args:
        target: The target whose gates were missed.
        verdict: Its verdict, with the measured KL divergence among the checks.
    """
    missed = {check.metric for check in verdict.decided}
    if Metric.FILES in missed:
        return "its files differ from those that were built: build the artifact again"
    if Metric.TEXT_KL_RATIO in missed:
        where = (
            "llmc bisect ARTIFACT finds the step"
            if backend_of(target).writes_graph
            else "weights.snr_db in the report has the loss of each matrix"
        )
        return f"it loses more than plain rounding to the same bits: {where}"
    if not missed or not missed <= set(_QUALITY):
        return None
    divergence = next((c.value for c in verdict.checks if c.metric is Metric.TEXT_KL_MEAN), None)
    if divergence is None:
        return None
    shipped = [each.document for each in list_targets()]
    for finer in sorted(shipped, key=stored_bits):
        if finer.platform != target.platform or stored_bits(finer) <= stored_bits(target):
            continue
        # Each bit halves the steps, and with them the error; the divergence goes with its square.
        expected = divergence * 4.0 ** (stored_bits(target) - stored_bits(finer))
        bound = next((g.max for g in finer.gates if g.metric is Metric.TEXT_KL_MEAN), None)
        if bound is not None and expected <= bound:
            return (
                f"--target {finer.name} would pass: each additional bit quarters the divergence, so that "
                f"{expected:.2g} nats are expected, and {bound:g} allowed"
            )
    return None


def explain_missed(checks: Sequence[Check]) -> list[str]:
    """Describe for each missed check with a value how it was measured, and the source of its bound."""
    return [
        f"{c.metric.value}: {c.detail}; the bound: {c.reason}"
        for c in checks
        if c.value is not None and c.value == c.value and c.bound is not None
    ]


def stored_bits(target: Target) -> float:
    """Return the bits per weight of most matrices, without scales; 16 for floats of any width."""
    bits = backend_of(target).quantizer(target).bits
    return _FLOAT_BITS if bits is None else bits
