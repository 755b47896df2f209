"""Compare the measured candidates of a tuning: their constraints, which is best, which is chosen.

A candidate dominates another if it is better in one of four objectives and worse in none: KL divergence,
decode speed, time to first token, size. Candidates that none dominates are the Pareto front. Times count in
steps of 3 percent, which a machine under load can distinguish.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from llmc.artifact.verdict import Figure
from llmc.records import Strict

#: Ratio of two times that are distinguished.
_GRAIN = 1.03
#: Factor by which a few samples of times may be wrong.
_NOISE = 1.1


class Bound(StrEnum):
    """The option that bounds a candidate."""

    KL = "--max-kl"
    SIZE = "--max-size"
    SPEED = "--min-tok-s"


class Candidate(Strict):
    """The measurements of a target that was built and measured beside the base.

    Args:
        digest: Digest of everything that the target says about the artifact, without name, summary and gates.
        label: Human-readable difference from the base.
        level: Fidelity of its measurement, from 0.
        kl: Mean KL divergence from the original, nats per token, with its 95 % confidence interval.
        step_ratio: Time of a decode step over the base's, in turn: the median of samples, with their range.
        first_ratio: Time to first token over the base's, in turn.
        tokens_per_s: Decode speed: the base's own over `step_ratio`.
        first_ms: Time to first token: the base's own times `first_ratio`.
        bytes: Bytes of all files of the artifact.
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
        """The values that are minimized, times in steps."""
        step, first = (
            float(round(math.log(ratio) / math.log(_GRAIN))) for ratio in (self.step_ratio, self.first_ratio)
        )
        return (self.kl, step, first, float(self.bytes))

    def dominates(self, other: "Candidate") -> bool:
        """Return whether it is better in one objective, and worse in none."""
        pairs = list(zip(self.objectives, other.objectives, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


class Refused(Strict):
    """The candidate that could not be built or run, and the reason."""

    digest: str
    label: str
    reason: str


class Constraints(Strict):
    """The constraints on a candidate.

    Args:
        max_kl: Maximum KL divergence, nats per token; the whole confidence interval must be below.
        max_bytes: Maximum bytes of all files.
        min_tokens_per_s: Minimum decode speed.
    """

    max_kl: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)
    min_tokens_per_s: float | None = Field(default=None, gt=0)

    def excesses(self, candidate: Candidate) -> dict[Bound, float]:
        """Return by which fraction of itself each bound is missed; zero or less if it is met."""
        found = {}
        if self.max_kl is not None:
            found[Bound.KL] = candidate.kl_high / self.max_kl - 1
        if self.max_bytes is not None:
            found[Bound.SIZE] = candidate.bytes / self.max_bytes - 1
        if self.min_tokens_per_s is not None:
            found[Bound.SPEED] = self.min_tokens_per_s / candidate.tokens_per_s - 1
        return found

    def met(self, candidate: Candidate) -> bool:
        """Return whether every bound is met."""
        return all(excess <= 0 for excess in self.excesses(candidate).values())

    def out_of_reach(self, candidate: Candidate) -> bool:
        """Return whether a bound is missed whatever more measuring would find."""
        speed = self.min_tokens_per_s
        fastest = _NOISE * candidate.tokens_per_s * candidate.step_ratio / candidate.step_low
        return (
            (self.max_kl is not None and candidate.kl_low > self.max_kl)
            or (self.max_bytes is not None and candidate.bytes > self.max_bytes)
            or (speed is not None and fastest < speed)
        )

    def render(self, candidate: Candidate) -> str:
        """Describe each bound that a candidate misses, with its figure."""
        told = {
            Bound.KL: f"KL divergence {candidate.kl:.4g} (up to {candidate.kl_high:.4g}), "
            f"at most {self.max_kl} is asked",
            Bound.SIZE: f"{candidate.bytes / 1e6:.4g} MB, "
            f"at most {(self.max_bytes or 0) / 1e6:.4g} are asked",
            Bound.SPEED: f"{candidate.tokens_per_s:.4g} tokens/s, at least {self.min_tokens_per_s} are asked",
        }
        return "; ".join(told[b] for b, excess in self.excesses(candidate).items() if excess > 0)


class Tuning(Strict):
    """The result of a tuning, finished or stopped by its budget, from which every report is rendered.

    Args:
        base: Name of the target beside which the others are measured.
        candidates: The base first; each with the highest fidelity of its measurements.
        levels: Human-readable description of how each fidelity measured.
        front: Digests of the candidates on the Pareto front, among those measured with the highest fidelity.
        chosen: Digest of the candidate that was chosen; None if none meets the constraints.
        seconds: Time spent on candidates, including earlier runs of the same tuning.
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
        """Return the candidate of this digest, which must exist."""
        return next(c for c in self.candidates if c.digest == digest)


def find_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other dominates, the most faithful first."""
    front = [c for c in candidates if not any(other.dominates(c) for other in candidates)]
    return sorted(front, key=lambda c: c.objectives)


def survives(candidate: Candidate, peers: Sequence[Candidate], constraints: Constraints) -> bool:
    """Return whether a candidate deserves more measuring: successive halving by fronts, one after the other.

    It does if it is in the better half of those measured alike, including itself: fronts are peeled off, and
    candidates of one front are equally good. This follows Schmucker et al. 2021, Multi-objective asynchronous
    successive halving, where candidates are also decided as they arrive.
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
    """Return the best that meets the constraints, by the first unbounded of KL divergence, speed, size."""
    fit = [c for c in candidates if constraints.met(c)]
    if not fit:
        return None
    if constraints.max_kl is None:
        return min(fit, key=lambda c: (c.kl, c.step_ratio))
    if constraints.min_tokens_per_s is None:
        return min(fit, key=lambda c: (c.step_ratio, c.bytes))
    return min(fit, key=lambda c: (c.bytes, c.kl))


def nearest(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate:
    """Return the candidate that misses its constraints by least, summed over them as fractions."""
    return min(candidates, key=lambda c: sum(max(0.0, e) for e in constraints.excesses(c).values()))
