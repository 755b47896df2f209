"""What was measured on an artifact, and the verdict on it."""

import math
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from llmc.config import Metric
from llmc.records import Strict


def _read_figure(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _write_figure(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


#: A float that survives JSON when it is not finite: "nan", "inf" and "-inf" are written as strings.
Figure = Annotated[float, BeforeValidator(_read_figure), PlainSerializer(_write_figure, when_used="json")]


class MeasurementStatus(StrEnum):
    MEASURED = "measured"
    NOT_APPLICABLE = "not applicable"
    NOT_MEASURED = "not measured"


class Measurement(Strict):
    """One metric of an artifact, or why there is none.

    Args:
        metric: What was measured, in the unit that `llmc.config.Gate` states.
        value: The figure; NaN where the artifact broke its interface or produced one; None unless
            the status is `measured`.
        status: Measured; not applicable to this model (no sliding window); or not measured.
        detail: How it was measured and where the value comes from, or why there is none.
        where: Runtime and execution provider, such as "onnxruntime 1.31.1 CPUExecutionProvider".
        figures: Values beside the main one by name, such as the difference at one prompt length.
        low: Lower end of the 95 % confidence interval; None for a figure that is not an estimate.
        high: Upper end, likewise.
        pairs: A sample of what the figure rests on: the original's value and the artifact's.
        tolerance: What of the figure the original's own rounding explains, in its unit; a gate with a smaller
            bound allows this much.
    """

    metric: Metric
    value: Figure | None
    status: MeasurementStatus
    detail: str
    where: str
    figures: dict[str, Figure] = Field(default_factory=dict)
    low: Figure | None = None
    high: Figure | None = None
    pairs: tuple[tuple[Figure, Figure], ...] = ()
    tolerance: Figure | None = None

    @model_validator(mode="after")
    def _value_if_measured(self) -> "Measurement":
        if (self.value is not None) != (self.status is MeasurementStatus.MEASURED):
            raise ValueError(f"{self.metric}: value {self.value} does not go with status '{self.status}'")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.metric}: an interval has two ends")
        return self


class CheckStatus(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    NOT_MEASURED = "not measured"
    NOT_APPLICABLE = "not applicable"


#: A check that failed, one that there is too little text to decide, and one without a figure.
MISSED = (CheckStatus.FAIL, CheckStatus.UNDECIDED, CheckStatus.NOT_MEASURED)


class Check(Strict):
    """One gate of the target held against its measurement.

    Args:
        low: Lower end of the measurement's confidence interval; None where it has none.
        high: Upper end, likewise.
        bound: The threshold; None for a measurement that fails without a gate, being NaN or infinite.
        direction: Whether the value may be at most or must be at least `bound`.
        reason: The gate's reason for its threshold.
        detail: The measurement's own words.
    """

    metric: Metric
    value: Figure | None
    low: Figure | None = None
    high: Figure | None = None
    bound: float | None
    direction: Literal["max", "min"] | None
    reason: str
    status: CheckStatus
    detail: str
    where: str


class Verdict(Strict):
    """Whether an artifact passed, check by check.

    `passed` is False as soon as one check fails or cannot be decided: a release is let through by
    evidence, not by a lack of it.
    """

    passed: bool
    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """The checks that failed, cannot be decided or were not measured."""
        return tuple(c for c in self.checks if c.status in MISSED)

    @property
    def decided(self) -> tuple[Check, ...]:
        """The checks of `missed` that were measured."""
        return tuple(c for c in self.missed if c.status is not CheckStatus.NOT_MEASURED)

    @property
    def unmeasured(self) -> dict[str, tuple[Metric, ...]]:
        """What was not measured, by the reason."""
        found: dict[str, tuple[Metric, ...]] = {}
        for check in self.checks:
            if check.status is CheckStatus.NOT_MEASURED:
                found[check.detail] = (*found.get(check.detail, ()), check.metric)
        return found

    @property
    def causes(self) -> tuple[str, ...]:
        """What was said of the checks without a figure, such as a runtime's error; each once."""
        broken = (c for c in self.missed if c.value is not None and math.isnan(c.value))
        return tuple(dict.fromkeys(c.detail for c in broken))


class Change(Strict):
    """One figure beside the same of an earlier report.

    Args:
        name: A metric; `size`, stored bytes of the artifact; or `checks`, those that passed before and do
            not pass now.
        unit: Of both figures, empty for a bare number.
        regression: Why this holds up a release; None if it does not.
    """

    name: str
    before: Figure | None
    after: Figure | None
    unit: str = ""
    regression: str | None = None


class Peer(Strict):
    """Another artifact of the same model: its size in bytes and its mean KL divergence in nats per token."""

    title: str
    bytes: int
    kl_mean: float
