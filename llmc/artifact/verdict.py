"""Record what was measured on an artifact, and the verdict on it."""

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
    """The measured value of one metric of an artifact, or why there is none.

    Args:
        metric: The metric, in the unit that `llmc.config.metrics` states.
        value: The figure; NaN if the artifact broke its interface or produced NaN; None unless
            the status is `measured`.
        status: Whether it was measured, does not apply to this model (no sliding window), or was not
            measured.
        detail: How it was measured and where the value comes from, or why there is none.
        where: Runtime and execution provider, such as "onnxruntime 1.31.1 CPUExecutionProvider".
        figures: Further values by name, such as the difference at one prompt length.
        low: Lower end of the 95 % confidence interval; None for a figure that is not an estimate.
        high: Upper end of the interval; None as for `low`.
        pairs: A sample of the values behind the figure: the original's and the artifact's.
        tolerance: Part of the figure that the original's own rounding explains, in its unit; a gate with a
            smaller bound allows this much.
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


#: Statuses of a check that failed, that has too little text to be decided, or that has no figure.
MISSED = (CheckStatus.FAIL, CheckStatus.UNDECIDED, CheckStatus.NOT_MEASURED)


class Check(Strict):
    """The comparison of one gate of the target with its measurement.

    Args:
        low: Lower end of the measurement's confidence interval; None if it has none.
        high: Upper end of the interval; None as for `low`.
        bound: The threshold; None for a measurement that fails without a gate, being NaN or infinite.
        direction: Whether the value may be at most or must be at least `bound`.
        reason: The gate's reason for its threshold.
        detail: The measurement's detail.
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
    """The decision whether an artifact passed, check by check.

    `passed` is False as soon as one check fails or cannot be decided: a release needs evidence, not the
    absence of counter-evidence.
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
        """The metrics that were not measured, by the reason."""
        metrics: dict[str, tuple[Metric, ...]] = {}
        for check in self.checks:
            if check.status is CheckStatus.NOT_MEASURED:
                metrics[check.detail] = (*metrics.get(check.detail, ()), check.metric)
        return metrics

    @property
    def causes(self) -> tuple[str, ...]:
        """The details of the checks without a figure, such as a runtime's error; each once."""
        broken = (c for c in self.missed if c.value is not None and math.isnan(c.value))
        return tuple(dict.fromkeys(c.detail for c in broken))


class Change(Strict):
    """The change of one figure since an earlier report.

    Args:
        name: A metric; `size`, stored bytes of the artifact; or `checks`, those that passed before and do
            not pass now.
        unit: Unit of both figures; empty for a bare number.
        regression: Why this blocks a release; None if it does not.
    """

    name: str
    before: Figure | None
    after: Figure | None
    unit: str = ""
    regression: str | None = None


class Peer(Strict):
    """The size in bytes and mean KL divergence in nats per token of another artifact of the same model."""

    title: str
    bytes: int
    kl_mean: float
