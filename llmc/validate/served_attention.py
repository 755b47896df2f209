"""Measure what attention over the KV cache loses as it is served, up to the end of a long sequence."""

from itertools import pairwise

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.runtime.session import Session
from llmc.validate.distribution import log_softmax
from llmc.validate.measure import measure, measured, require_comparable, unmeasured
from llmc.validate.positions import Plan
from llmc.validate.reference import Reference


def measure_cache(model: Session, reference: Reference, plan: Plan) -> tuple[Measurement, ...]:
    """Measure the KL divergence at the ends of pieces of the long sequence and over its last single steps.

    The original has the artifact's weights and rounds nothing else, so that the figure includes everything
    that a narrow cache and attention over it lose, and whatever else `model` rounds.

    Args:
        model: The artifact with products in float32 and its own attention.
        reference: The original, float32, with the artifact's weights.
        plan: The positions to verify; nothing is measured if it has no `cache_steps`.
    """
    if not plan.cache_steps:
        return ()
    if not plan.pieces:
        why, status = f"the model ends at {plan.limit} positions", MeasurementStatus.NOT_MEASURED
        return tuple(unmeasured(m, status, why, model.where) for m in Family.CACHE.metrics)
    return measure(Family.CACHE.metrics, model.where, lambda: _measure(model, reference, plan))


def _measure(model: Session, reference: Reference, plan: Plan) -> tuple[Measurement, ...]:
    total = len(plan.tokens)
    start = total - plan.cache_steps
    pieces = np.unique(np.minimum(np.cumsum((0, plan.first, *plan.pieces)), start)).tolist()
    question = plan.passes()[plan.history(plan.first)]
    answers = reference.logits_at(question.tokens, question.positions, pieces=question.pieces)
    expected = dict(zip(question.positions.tolist(), answers, strict=True))
    kl = {}
    for a, b in pairwise((*pieces, *range(start + 1, total + 1))):
        tokens = plan.tokens[None, a:b]
        logits = model.decode(tokens) if a else model.prefill(tokens, steps=total - b)
        if b - 1 in expected:
            kl[b] = _divergence(expected[b - 1], logits[0, -1], b - 1)
    ends = sum(b <= start for b in kl)
    detail = (
        f"the ends of {ends} pieces and {plan.cache_steps} steps after {start:,} tokens, "
        "against the original with the artifact's weights"
    )
    worst = max(kl, key=lambda b: kl[b])
    location = f"{detail}; the worst is after {worst:,} tokens"
    return (
        measured(Metric.CACHE_KL_MEAN, float(np.mean(list(kl.values()))), detail, model.where),
        measured(Metric.CACHE_KL_MAX, kl[worst], location, model.where),
    )


def _divergence(expected: Array, logits: Array, position: int) -> float:
    """Return the KL divergence (nats) of `logits` from `expected`, (vocabulary,) each."""
    require_comparable(logits, expected.shape, f"position {position}")
    p, q = log_softmax(expected), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(dtype=np.float64))
