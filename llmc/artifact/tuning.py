"""Candidates of a tuning as they were measured: what is asked of them, which is best, which is taken.

A candidate dominates another if it is better in one of four objectives and worse in none: KL divergence,
decode speed, time to first token, size. Those that none dominates are the Pareto front. Times count in steps
of 3 percent, which is what a machine at work tells apart.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from llmc.artifact.verdict import Figure
from llmc.records import Strict

#: Ratio of two times that are told apart.
_GRAIN = 1.03
#: By how much a few samples of times may be off.
_NOISE = 1.1


class Bound(StrEnum):
    """What a candidate can be held to."""

    KL = "--max-kl"
    SIZE = "--max-size"
    SPEED = "--min-tok-s"


class Candidate(Strict):
    """A target as it was built and measured beside the base.

    Args:
        digest: Of all that the target says about the artifact, without name, summary and gates.
        label: What sets it apart, in words.
        level: Fidelity it was measured with, from 0.
        kl: Mean KL divergence from the original, nats per token, with its 95 % confidence interval.
        step_ratio: Time of a decode step over the base's, in turn: the median of samples, with their range.
        first_ratio: Time to first token over the base's, in turn.
        tokens_per_s: Decode speed: the base's own over `step_ratio`.
        first_ms: Time to first token: the base's own times `first_ratio`.
        bytes: Of all files of the artifact.
        model: sha256 of model.onnx and of its data, by file.
    """

    digest: str
    label: str
    level: int
    kl: Figure
    kl_low: Figure
    kl_high: Figure
    step_ratio: float
    step_low: float
    step_high: float
    first_ratio: float
    tokens_per_s: float
    first_ms: float
    bytes: int
    model: dict[str, str]

    @property
    def objectives(self) -> tuple[float, ...]:
        """What is minimized, times in steps."""
        step, first = (
            float(round(math.log(ratio) / math.log(_GRAIN))) for ratio in (self.step_ratio, self.first_ratio)
        )
        return (self.kl, step, first, float(self.bytes))

    def dominates(self, other: "Candidate") -> bool:
        """Better in one objective, and worse in none."""
        pairs = list(zip(self.objectives, other.objectives, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


class Refused(Strict):
    """A candidate that could not be built or run, and why."""

    digest: str
    label: str
    reason: str


class Constraints(Strict):
    """What is asked of a candidate.

    Args:
        max_kl: Most KL divergence, nats per token; the whole confidence interval has to be below.
        max_bytes: Most bytes of all files.
        min_tokens_per_s: Least decode speed.
    """

    max_kl: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)
    min_tokens_per_s: float | None = Field(default=None, gt=0)

    def excesses(self, candidate: Candidate) -> dict[Bound, float]:
        """By how much of itself each bound is missed; zero or less where it is met."""
        found = {}
        if self.max_kl is not None:
            found[Bound.KL] = candidate.kl_high / self.max_kl - 1
        if self.max_bytes is not None:
            found[Bound.SIZE] = candidate.bytes / self.max_bytes - 1
        if self.min_tokens_per_s is not None:
            found[Bound.SPEED] = self.min_tokens_per_s / candidate.tokens_per_s - 1
        return found

    def met(self, candidate: Candidate) -> bool:
        """Whether every bound is met."""
        return all(excess <= 0 for excess in self.excesses(candidate).values())

    def out_of_reach(self, candidate: Candidate) -> bool:
        """Whether a bound is missed whatever more measuring would find."""
        speed = self.min_tokens_per_s
        fastest = _NOISE * candidate.tokens_per_s * candidate.step_ratio / candidate.step_low
        return (
            (self.max_kl is not None and candidate.kl_low > self.max_kl)
            or (self.max_bytes is not None and candidate.bytes > self.max_bytes)
            or (speed is not None and fastest < speed)
        )

    def render(self, candidate: Candidate) -> str:
        """Each bound that a candidate misses, with its figure."""
        told = {
            Bound.KL: f"KL divergence {candidate.kl:.4g} (up to {candidate.kl_high:.4g}), "
            f"at most {self.max_kl} is asked",
            Bound.SIZE: f"{candidate.bytes / 1e6:.4g} MB, "
            f"at most {(self.max_bytes or 0) / 1e6:.4g} are asked",
            Bound.SPEED: f"{candidate.tokens_per_s:.4g} tokens/s, at least {self.min_tokens_per_s} are asked",
        }
        return "; ".join(told[b] for b, excess in self.excesses(candidate).items() if excess > 0)


class Tuning(Strict):
    """A tuning, finished or stopped by its budget: the document that every form is made from.

    Args:
        base: Name of the target that the others are measured beside.
        candidates: The base first; of each the highest fidelity that it was measured with.
        levels: How each fidelity measured, in words.
        front: Digests of the candidates on the Pareto front, of those measured with the highest fidelity.
        chosen: Digest of the candidate that was taken; None if none meets the constraints.
        seconds: Time spent on candidates, earlier runs of the same tuning included.
    """

    model: str
    base: str
    profile: str
    where: str
    threads: int
    constraints: Constraints
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    levels: tuple[str, ...]
    front: tuple[str, ...]
    chosen: str | None
    seconds: float

    def find(self, digest: str) -> Candidate:
        """The candidate of this digest, one of them."""
        return next(c for c in self.candidates if c.digest == digest)


def find_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other dominates, the most faithful first."""
    front = [c for c in candidates if not any(other.dominates(c) for other in candidates)]
    return sorted(front, key=lambda c: c.objectives)


def survives(candidate: Candidate, peers: Sequence[Candidate], constraints: Constraints) -> bool:
    """Whether a candidate is worth more measuring: successive halving by fronts, one after the other.

    It is if it stands in the better half of those measured alike, itself included: fronts are peeled off, and
    those that share a front are as good. After Schmucker et al. 2021, Multi-objective asynchronous successive
    halving, where candidates too are decided on as they come.
    """
    if constraints.out_of_reach(candidate):
        return False
    left = [p for p in peers if p.digest != candidate.digest and not constraints.out_of_reach(p)]
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
    fit = [c for c in candidates if constraints.met(c)]
    if not fit:
        return None
    if constraints.max_kl is None:
        return min(fit, key=lambda c: (c.kl, c.step_ratio))
    if constraints.min_tokens_per_s is None:
        return min(fit, key=lambda c: (c.step_ratio, c.bytes))
    return min(fit, key=lambda c: (c.bytes, c.kl))


def nearest(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate:
    """The one that misses its constraints by least, summed over them as fractions."""
    return min(candidates, key=lambda c: sum(max(0.0, e) for e in constraints.excesses(c).values()))
