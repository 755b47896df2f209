"""What a gate lets through, and what it does not."""

import math

import pytest

from llmc.artifact.verdict import CheckStatus, Measurement, MeasurementStatus
from llmc.config import Gate, Metric
from llmc.errors import ConfigError
from llmc.validate.gates import evaluate, is_undecided
from llmc.validate.measure import measured, unmeasured

AT_MOST = Gate(metric=Metric.TEXT_KL_MEAN, max=0.1, reason="room for rounding")
AT_LEAST = Gate(metric=Metric.TEXT_TOP1, min=0.9, reason="nine in ten agree")


def kl(value: float) -> Measurement:
    return measured(Metric.TEXT_KL_MEAN, value, "2048 tokens", "here")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (0.0, CheckStatus.PASS),
        (0.1, CheckStatus.PASS),
        (0.1000001, CheckStatus.FAIL),
        (math.nan, CheckStatus.FAIL),
        (math.inf, CheckStatus.FAIL),
        (-math.inf, CheckStatus.FAIL),
    ],
)
def test_at_most(value: float, status: CheckStatus) -> None:
    verdict = evaluate([AT_MOST], [kl(value)])
    (check,) = verdict.checks
    assert check.status is status
    assert verdict.passed == (status is CheckStatus.PASS)
    assert (check.bound, check.direction, check.reason) == (0.1, "max", "room for rounding")
    assert (check.detail, check.where) == ("2048 tokens", "here")


def test_a_check_tells_the_bound_that_a_tolerance_leaves() -> None:
    (check,) = evaluate([AT_MOST], [kl(0.2).model_copy(update={"tolerance": 0.25})]).checks
    assert (check.status, check.bound) == (CheckStatus.PASS, 0.25)


@pytest.mark.parametrize(
    ("value", "passed"), [(0.9, True), (0.8999, False), (math.nan, False), (math.inf, False)]
)
def test_at_least(value: float, passed: bool) -> None:
    verdict = evaluate([AT_LEAST], [measured(Metric.TEXT_TOP1, value, "", "")])
    assert verdict.passed == passed
    assert verdict.checks[0].direction == "min"


def test_not_measured_fails() -> None:
    absent = evaluate([AT_MOST], [])
    assert not absent.passed
    assert absent.checks[0].detail == "not measured"
    stated = [unmeasured(AT_MOST.metric, MeasurementStatus.NOT_MEASURED, "no time", "here")]
    assert not evaluate([AT_MOST], stated).passed


def test_not_applicable_passes() -> None:
    stated = [unmeasured(AT_MOST.metric, MeasurementStatus.NOT_APPLICABLE, "no window", "here")]
    verdict = evaluate([AT_MOST], stated)
    assert verdict.passed
    assert verdict.checks[0].status is CheckStatus.NOT_APPLICABLE


def test_nan_fails_without_a_gate() -> None:
    verdict = evaluate([], [kl(math.nan), measured(Metric.TEXT_TOP1, 0.1, "", "")])
    assert not verdict.passed
    (check,) = verdict.checks
    assert (check.metric, check.bound, check.direction) == (Metric.TEXT_KL_MEAN, None, None)


def test_every_gate_gets_its_check_and_one_failure_decides() -> None:
    verdict = evaluate([AT_MOST, AT_LEAST], [kl(0.05), measured(Metric.TEXT_TOP1, 0.5, "", "")])
    assert [c.status for c in verdict.checks] == [CheckStatus.PASS, CheckStatus.FAIL]
    assert not verdict.passed


def test_measured_twice() -> None:
    with pytest.raises(ConfigError, match=r"measured more than once: text\.kl_mean"):
        evaluate([AT_MOST], [kl(0.5), kl(0.05)])


def test_a_value_goes_with_the_status_measured_only() -> None:
    with pytest.raises(ValueError, match="does not go with status 'measured'"):
        Measurement(
            metric=Metric.TEXT_TOP1, value=None, status=MeasurementStatus.MEASURED, detail="", where=""
        )


@pytest.mark.parametrize(
    ("gate", "low", "high", "status"),
    [
        (AT_MOST, 0.05, 0.09, CheckStatus.PASS),
        (AT_MOST, 0.05, 0.11, CheckStatus.UNDECIDED),
        (AT_MOST, 0.11, 0.2, CheckStatus.FAIL),
        (AT_LEAST, 0.91, 0.95, CheckStatus.PASS),
        (AT_LEAST, 0.85, 0.95, CheckStatus.UNDECIDED),
        (AT_LEAST, 0.5, 0.89, CheckStatus.FAIL),
    ],
)
def test_an_estimate_is_judged_by_its_interval(
    gate: Gate, low: float, high: float, status: CheckStatus
) -> None:
    found = measured(gate.metric, (low + high) / 2, "2048 tokens", "here", interval=(low, high))
    verdict = evaluate([gate], [found])
    assert [c.status for c in verdict.checks] == [status]
    assert verdict.passed == (status is CheckStatus.PASS)
    assert (verdict.checks[0].low, verdict.checks[0].high) == (low, high)
    assert bool(verdict.missed) != verdict.passed
    assert is_undecided([AT_MOST, AT_LEAST], [found]) == (status is CheckStatus.UNDECIDED)


def test_a_signal_without_noise_passes() -> None:
    gate = Gate(metric=Metric.WEIGHTS_SNR, min=20.0, reason="nothing was lost")
    assert evaluate([gate], [measured(Metric.WEIGHTS_SNR, math.inf, "", "")]).passed
    assert not evaluate([gate], [measured(Metric.WEIGHTS_SNR, -math.inf, "", "")]).passed


def test_an_interval_has_two_ends() -> None:
    with pytest.raises(ValueError, match="an interval has two ends"):
        Measurement(
            metric=Metric.TEXT_TOP1,
            value=0.5,
            status=MeasurementStatus.MEASURED,
            detail="",
            where="",
            low=0.4,
        )
