"""Choose among the candidates of `llmc tune`: the best, those to measure more closely, and the result.

A candidate dominates another if it is better in one of four objectives and worse in none: KL divergence,
decode speed, time to first token, size. Candidates that none dominates are the Pareto front. Times count in
steps of 3 percent, the smallest difference that is distinguishable on a machine in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from llmc.artifact.tuning import Candidate, Constraints

#: Ratio of two times that are distinguishable.
_GRAIN = 1.03
#: Largest error of a few samples of times, as a ratio.
_NOISE = 1.1


class Bound(StrEnum):
    """The bounds that a user can set for candidates."""

    KL = "--max-kl"
    SIZE = "--max-size"
    SPEED = "--min-tok-s"


def objectives(candidate: Candidate) -> tuple[float, ...]:
    """Return the minimized objectives, times in steps."""
    step, first = (
        float(round(math.log(ratio) / math.log(_GRAIN)))
        for ratio in (candidate.step_ratio, candidate.first_ratio)
    )
    return (candidate.kl, step, first, float(candidate.bytes))


def dominates(candidate: Candidate, other: Candidate) -> bool:
    """Return whether a candidate is better in one objective, and worse in none."""
    pairs = list(zip(objectives(candidate), objectives(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def find_excesses(candidate: Candidate, constraints: Constraints) -> dict[Bound, float]:
    """Return by which fraction of itself each bound is missed; zero or less if it is met."""
    excesses = {}
    if constraints.max_kl is not None:
        excesses[Bound.KL] = candidate.kl_high / constraints.max_kl - 1
    if constraints.max_bytes is not None:
        excesses[Bound.SIZE] = candidate.bytes / constraints.max_bytes - 1
    if constraints.min_tokens_per_s is not None:
        excesses[Bound.SPEED] = constraints.min_tokens_per_s / candidate.tokens_per_s - 1
    return excesses


def is_within(candidate: Candidate, constraints: Constraints) -> bool:
    """Return whether every bound is met."""
    return all(excess <= 0 for excess in find_excesses(candidate, constraints).values())


def is_out_of_reach(candidate: Candidate, constraints: Constraints) -> bool:
    """Return whether a bound is missed regardless of further measurements."""
    speed = constraints.min_tokens_per_s
    fastest = _NOISE * candidate.tokens_per_s * candidate.step_ratio / candidate.step_low
    return (
        (constraints.max_kl is not None and candidate.kl_low > constraints.max_kl)
        or (constraints.max_bytes is not None and candidate.bytes > constraints.max_bytes)
        or (speed is not None and fastest < speed)
    )


def render_excesses(candidate: Candidate, constraints: Constraints) -> str:
    """Describe each bound that a candidate misses, with its value."""
    descriptions = {
        Bound.KL: f"KL divergence {candidate.kl:.4g} (up to {candidate.kl_high:.4g}), "
        f"at most {constraints.max_kl} is requested",
        Bound.SIZE: f"{candidate.bytes / 1e6:.4g} MB, "
        f"at most {(constraints.max_bytes or 0) / 1e6:.4g} MB are requested",
        Bound.SPEED: f"{candidate.tokens_per_s:.4g} tokens/s, "
        f"at least {constraints.min_tokens_per_s} are requested",
    }
    return "; ".join(
        descriptions[b] for b, excess in find_excesses(candidate, constraints).items() if excess > 0
    )


def find_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other dominates, the most faithful first."""
    front = [c for c in candidates if not any(dominates(other, c) for other in candidates)]
    return sorted(front, key=objectives)


def survives(candidate: Candidate, peers: Sequence[Candidate], constraints: Constraints) -> bool:
    """Return whether to measure a candidate more closely: successive halving by fronts, one after the other.

    A candidate survives in the better half of those measured at the same level, itself included: fronts are
    removed one by one, and candidates on the same front are equally good. After Schmucker et al. 2021,
    Multi-objective asynchronous successive halving, where candidates are also decided on as they arrive.
    """
    if is_out_of_reach(candidate, constraints):
        return False
    left = [p for p in peers if p.digest != candidate.digest and not is_out_of_reach(p, constraints)]
    left.append(candidate)
    most = len(left) / 2
    better = 0
    while better < most:
        front = find_front(left)
        if candidate in front:
            return True
        better += len(front)
        left = [p for p in left if p not in front]
    return False


def choose(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate | None:
    """Return the best that meets the constraints, by the first unbounded one: KL divergence, speed, size."""
    fit = [c for c in candidates if is_within(c, constraints)]
    if not fit:
        return None
    if constraints.max_kl is None:
        return min(fit, key=lambda c: (c.kl, c.step_ratio))
    if constraints.min_tokens_per_s is None:
        return min(fit, key=lambda c: (c.step_ratio, c.bytes))
    return min(fit, key=lambda c: (c.bytes, c.kl))


def nearest(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate:
    """Return the candidate that misses its constraints by least, summed as fractions."""
    return min(candidates, key=lambda c: sum(max(0.0, e) for e in find_excesses(c, constraints).values()))
