"""The records of a tuning: its measured candidates, their constraints, and which one was chosen."""

from pydantic import Field

from llmc.artifact.verdict import Figure
from llmc.records import Strict


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
