"""Decide which differences of logits rounding explains: those where it moves the original as far.

Two correct programs of one model differ by rounding, by 1e-5 to 1e-4 logits for trained models, and a bound
on the largest difference is set for those. Where the logits are large, or near ties decide what follows, the
original differs from itself by more, and no artifact can be nearer to it than that. The original is therefore
asked for the effect of rounding at each position that misses the bound: `llmc.validate.sensitivity`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.validate.positions import ReferencePass
from llmc.validate.sensitivity import MOST_LEFT_OUT, SensitiveReference, Sensitivity

#: Share of a position's largest logit up to which rounding may move any number of positions; beyond it,
#: only a few positions may be moved, those that near ties decide.
_COMMON = 1e-3
#: Logits. A tighter bound than this is applied as it stands: it requires less than rounding.
_LEAST = 1e-4


@dataclass(frozen=True)
class LogitDifference:
    """The largest difference of a logit at one position.

    Args:
        reference_pass: Number of the original's pass that has the position.
        row: Row of that pass.
    """

    metric: Metric
    reference_pass: int
    row: int
    position: int
    value: float


def allow_rounding(
    levels: Sequence[Measurement],
    bounds: Mapping[Metric, float],
    differences: Sequence[LogitDifference],
    passes: Sequence[ReferencePass],
    original: SensitiveReference,
) -> tuple[Measurement, ...]:
    """Return the levels, with their figures as tolerances where rounding explains all excess differences.

    The shortest of a level's texts is asked first, so that a fault costs one short pass.

    Args:
        bounds: Largest differences that the gates let through.
        differences: Differences of all positions that were compared.
        passes: The original's passes, by the number in `Difference.reference_pass`.
    """
    return tuple(_allow(level, bounds, differences, passes, original) for level in levels)


def _allow(
    level: Measurement,
    bounds: Mapping[Metric, float],
    differences: Sequence[LogitDifference],
    passes: Sequence[ReferencePass],
    original: SensitiveReference,
) -> Measurement:
    bound = bounds.get(level.metric, np.inf)
    if not level.metric.is_logit_difference or level.value is None:
        return level
    if bound < _LEAST or not bound < level.value < np.inf:
        return level
    own = [d for d in differences if d.metric is level.metric]
    missed = sorted((d for d in own if d.value > bound), key=lambda d: (d.position, d.reference_pass, d.row))
    if not missed or not _explained(missed[:1], passes, original):
        return level
    explained = _explained(missed, passes, original)
    rare = sum(f.logits[0] > _COMMON * f.largest[0] for f in explained)
    if not explained or rare > MOST_LEFT_OUT * len(own):
        return level
    rounding = (
        f"{len(missed)} of {len(own)} positions are beyond {bound:g}, where rounding moves "
        f"the original itself by up to {max(float(f.logits[0]) for f in explained):.2g}, with logits up to "
        f"{max(float(f.largest[0]) for f in explained):.3g}"
    )
    return level.model_copy(update={"tolerance": level.value, "detail": f"{level.detail}; {rounding}"})


def _explained(
    missed: Sequence[LogitDifference], passes: Sequence[ReferencePass], original: SensitiveReference
) -> list[Sensitivity]:
    """Return the effect of rounding at each of these positions; nothing if one of them differs by more."""
    sensitivities = []
    where = sorted(missed, key=lambda d: (d.reference_pass, d.row))
    for (number, row), group in groupby(where, key=lambda d: (d.reference_pass, d.row)):
        worst: dict[int, float] = {}
        for d in group:
            worst[d.position] = max(worst.get(d.position, 0.0), d.value)
        positions = np.array(sorted(worst), np.int64)
        tokens, pieces = _until(passes[number], row, int(positions[-1]) + 1)
        moved = original.sensitivity(tokens, positions, pieces=pieces)
        if (moved.logits < [worst[int(at)] for at in positions]).any():
            return []
        sensitivities += [
            Sensitivity(*(part[i : i + 1] for part in (moved.logits, moved.kl, moved.largest)))
            for i in range(len(positions))
        ]
    return sensitivities


def _until(reference_pass: ReferencePass, row: int, total: int) -> tuple[Array, tuple[int, ...]]:
    """Return the first `total` tokens of one row of a pass, and the steps that they make."""
    ends = np.minimum(np.cumsum(reference_pass.pieces), total)
    pieces = tuple(int(n) for n in np.diff((0, *ends)) if n)
    return np.atleast_2d(reference_pass.tokens)[row, :total], pieces
