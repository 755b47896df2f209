"""How the stations speak of an artifact: its interface to a runtime, and what was measured on it."""

import math
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from llmc.config import Metric
from llmc.graph.interface import CacheSlot, Interface, TensorSpec

__all__ = [
    "CacheSlot",
    "Check",
    "CheckStatus",
    "DecodeLatency",
    "Figure",
    "Footprint",
    "Interface",
    "Latency",
    "Measurement",
    "MeasurementStatus",
    "PrefillLatency",
    "Ratio",
    "Roofline",
    "TensorSpec",
    "Timing",
    "Verdict",
]


def _read_figure(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _write_figure(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


#: A float that survives JSON when it is not finite: "nan", "inf" and "-inf" are written as strings.
Figure = Annotated[float, BeforeValidator(_read_figure), PlainSerializer(_write_figure, when_used="json")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MeasurementStatus(StrEnum):
    MEASURED = "measured"
    NOT_APPLICABLE = "not applicable"
    NOT_MEASURED = "not measured"


class Measurement(_Strict):
    """One metric of an artifact, or why there is none.

    Args:
        metric: What was measured, in the unit that `llmc.config.Gate` states.
        value: The figure; NaN where the artifact broke its interface or produced one; None unless
            the status is `measured`.
        status: Measured; not applicable to this model (no sliding window); or not measured.
        detail: How it was measured and where the value comes from, or why there is none.
        where: Runtime and execution provider, such as "onnxruntime 1.31.1 CPUExecutionProvider".
        figures: Values beside the main one by name, such as `kl_p99` in nats per token.
    """

    metric: Metric
    value: Figure | None
    status: MeasurementStatus
    detail: str
    where: str
    figures: dict[str, Figure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _value_if_measured(self) -> "Measurement":
        if (self.value is not None) != (self.status is MeasurementStatus.MEASURED):
            raise ValueError(f"{self.metric}: value {self.value} does not go with status '{self.status}'")
        return self


class CheckStatus(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


class Check(_Strict):
    """One gate of the target held against its measurement.

    Args:
        bound: The threshold; None for a measurement that fails without a gate, being NaN or infinite.
        direction: Whether the value may be at most or must be at least `bound`.
        reason: The gate's reason for its threshold.
        detail: The measurement's own words.
    """

    metric: Metric
    value: Figure | None
    bound: float | None
    direction: Literal["max", "min"] | None
    reason: str
    status: CheckStatus
    detail: str
    where: str


class Verdict(_Strict):
    """Whether an artifact passed, check by check. `passed` is False as soon as one check fails."""

    passed: bool
    checks: tuple[Check, ...]


class Timing(_Strict):
    """Samples of one duration, milliseconds; percentiles by linear interpolation."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


class Ratio(_Strict):
    """Artifact / original of two interleaved series: of their medians, and the range over the rounds."""

    value: float
    low: float
    high: float


class PrefillLatency(_Strict):
    """Time to first token for a prompt of `prompt_tokens`, batch 1."""

    prompt_tokens: int
    artifact: Timing
    original: Timing
    ratio: Ratio


class DecodeLatency(_Strict):
    """Inter-token latency after `context` tokens, batch 1; rates in tokens/s."""

    context: int
    artifact: Timing
    original: Timing
    artifact_tokens_per_s: float
    original_tokens_per_s: float
    ratio: Ratio


class Footprint(_Strict):
    """One side alone in a process: start of the runtime, and the most memory it ever held.

    Args:
        load: Time to load the weights, without importing the runtime's modules.
        peak_bytes: Highest resident set over load, prefill and decode; None where the operating
            system does not tell.
        prompt_tokens: Length of the prompt that was prefilled before `decoded_tokens` steps.
    """

    load: Timing
    peak_bytes: int | None
    prompt_tokens: int
    decoded_tokens: int


class Roofline(_Strict):
    """The least time a decode step can take if every byte is read once at peak bandwidth.

    Args:
        weight_bytes: Weights read per token; an embedding table that is only looked up counts as none.
        kv_bytes: Keys and values read per token at this context.
        bandwidth_gbs: The profile's peak bandwidth, 10**9 bytes/s; None if the profile states none.
        bound_ms: (weight_bytes + kv_bytes) / bandwidth.
        fraction: bound_ms / measured median.
    """

    context: int
    weight_bytes: int
    kv_bytes: int
    bandwidth_gbs: float | None
    bound_ms: float | None
    fraction: float | None


class Latency(_Strict):
    """Artifact and original timed in turn in one process.

    Args:
        where: Runtime and provider of the artifact.
        original: What the original ran as, such as "torch 2.13.0 float32 sdpa, dynamic cache".
        threads: Intra-op threads of either side.
        dropped: Lengths that were not measured since the model's positions end before them, and why.
    """

    where: str
    original: str
    threads: int
    prefill: tuple[PrefillLatency, ...]
    decode: tuple[DecodeLatency, ...]
    roofline: tuple[Roofline, ...]
    artifact_footprint: Footprint
    original_footprint: Footprint
    dropped: tuple[str, ...]
