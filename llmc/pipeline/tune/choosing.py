"""How `llmc tune` chooses among candidates: which is best, which is worth more measuring, which is taken.

A candidate dominates another if it is better in one of four objectives and worse in none: KL divergence,
decode speed, time to first token, size. Those that none dominates are the Pareto front. Times count in steps
of 3 percent, which is what a machine at work tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from llmc.artifact.tuning import Candidate, Constraints

#: Ratio of two times that are told apart.
_GRAIN = 1.03
#: By how much a few samples of times may be off.
_NOISE = 1.1


class Bound(StrEnum):
    """What a candidate can be held to."""

    KL = "--max-kl"
    SIZE = "--max-size"
    SPEED = "--min-tok-s"


def objectives(candidate: Candidate) -> tuple[float, ...]:
    """Return what is minimized, times in steps."""
    step, first = (
        float(round(math.log(ratio) / math.log(_GRAIN)))
        for ratio in (candidate.step_ratio, candidate.first_ratio)
    )
    return (candidate.kl, step, first, float(candidate.bytes))


def dominates(candidate: Candidate, other: Candidate) -> bool:
    """Find out whether a candidate is better in one objective, and worse in none."""
    pairs = list(zip(objectives(candidate), objectives(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def find_excesses(candidate: Candidate, constraints: Constraints) -> dict[Bound, float]:
    """Return by how much of itself each bound is missed; zero or less where it is met."""
    found = {}
    if constraints.max_kl is not None:
        found[Bound.KL] = candidate.kl_high / constraints.max_kl - 1
    if constraints.max_bytes is not None:
        found[Bound.SIZE] = candidate.bytes / constraints.max_bytes - 1
    if constraints.min_tokens_per_s is not None:
        found[Bound.SPEED] = constraints.min_tokens_per_s / candidate.tokens_per_s - 1
    return found


def is_within(candidate: Candidate, constraints: Constraints) -> bool:
    """Find out whether every bound is met."""
    return all(excess <= 0 for excess in find_excesses(candidate, constraints).values())


def is_out_of_reach(candidate: Candidate, constraints: Constraints) -> bool:
    """Find out whether a bound is missed whatever more measuring would find."""
    speed = constraints.min_tokens_per_s
    fastest = _NOISE * candidate.tokens_per_s * candidate.step_ratio / candidate.step_low
    return (
        (constraints.max_kl is not None and candidate.kl_low > constraints.max_kl)
        or (constraints.max_bytes is not None and candidate.bytes > constraints.max_bytes)
        or (speed is not None and fastest < speed)
    )


def render_excesses(candidate: Candidate, constraints: Constraints) -> str:
    """Name each bound that a candidate misses, with its figure."""
    told = {
        Bound.KL: f"KL divergence {candidate.kl:.4g} (up to {candidate.kl_high:.4g}), "
        f"at most {constraints.max_kl} is asked",
        Bound.SIZE: f"{candidate.bytes / 1e6:.4g} MB, "
        f"at most {(constraints.max_bytes or 0) / 1e6:.4g} are asked",
        Bound.SPEED: f"{candidate.tokens_per_s:.4g} tokens/s, "
        f"at least {constraints.min_tokens_per_s} are asked",
    }
    return "; ".join(told[b] for b, excess in find_excesses(candidate, constraints).items() if excess > 0)


def find_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other dominates, the most faithful first."""
    front = [c for c in candidates if not any(dominates(other, c) for other in candidates)]
    return sorted(front, key=objectives)


def survives(candidate: Candidate, peers: Sequence[Candidate], constraints: Constraints) -> bool:
    """Whether a candidate is worth more measuring: successive halving by fronts, one after the other.

    It is if it stands in the better half of those measured alike, itself included: fronts are peeled off, and
    those that share a front are as good. After Schmucker et al. 2021, Multi-objective asynchronous successive
    halving, where candidates too are decided on as they come.
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
    """The best that meets the constraints, by the first that is not bounded: KL divergence, speed, size."""
    fit = [c for c in candidates if is_within(c, constraints)]
    if not fit:
        return None
    if constraints.max_kl is None:
        return min(fit, key=lambda c: (c.kl, c.step_ratio))
    if constraints.min_tokens_per_s is None:
        return min(fit, key=lambda c: (c.step_ratio, c.bytes))
    return min(fit, key=lambda c: (c.bytes, c.kl))


def nearest(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate:
    """The one that misses its constraints by least, summed over them as fractions."""
    return min(candidates, key=lambda c: sum(max(0.0, e) for e in find_excesses(c, constraints).values()))
