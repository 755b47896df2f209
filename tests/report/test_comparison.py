"""What holds up a release, and what does not."""

import math

import pytest

from llmc.artifact.verdict import Change, Check, CheckStatus, Measurement, MeasurementStatus, Verdict
from llmc.config import Metric
from llmc.errors import ConfigError
from llmc.report import Report, compare_reports, devices_apart, parse_allowed, render_changes


def measurement(metric: Metric, value: float | None, half: float | None = None) -> Measurement:
    status = MeasurementStatus.NOT_MEASURED if value is None else MeasurementStatus.MEASURED
    ends = (None, None) if half is None or value is None else (value - half, value + half)
    return Measurement(
        metric=metric, value=value, status=status, detail="", where="", low=ends[0], high=ends[1]
    )


def report(*measurements: Measurement, size: int = 0, check: CheckStatus = CheckStatus.PASS) -> Report:
    checks = tuple(
        Check(
            metric=m.metric, value=m.value, bound=1.0, direction="max", reason="", status=check,
            detail="", where="",
        )
        for m in measurements
    )  # fmt: skip
    return Report(
        llmc="0", model="m", target="t", profile="p", verdict=Verdict(passed=True, checks=checks),
        measurements=measurements, latency=None, bytes=size,
    )  # fmt: skip


def changes(before: Report, after: Report, **allowed: float) -> dict[str, Change]:
    return {c.name: c for c in compare_reports(before, after, allowed)}


@pytest.mark.parametrize(
    ("metric", "before", "after", "worse"),
    [
        (Metric.TEXT_KL_MEAN, 0.20, 0.23, True),  # 0.21 | 0.22
        (Metric.TEXT_KL_MEAN, 0.20, 0.21, False),
        (Metric.TEXT_KL_MEAN, 0.23, 0.20, False),
        (Metric.TEXT_TOP1, 0.70, 0.67, True),
        (Metric.TEXT_TOP1, 0.67, 0.70, False),
    ],
)
def test_an_estimate_is_worse_beyond_both_intervals(
    metric: Metric, before: float, after: float, worse: bool
) -> None:
    found = changes(report(measurement(metric, before, 0.01)), report(measurement(metric, after, 0.01)))
    assert (found[metric].regression is not None) is worse
    if worse:
        assert "worse beyond both intervals" in str(found[metric].regression)


def test_figures_of_different_devices_are_told() -> None:
    cpu = report()
    one, other = (cpu.model_copy(update={"measured": f"measured on {gpu}"}) for gpu in ("L4", "H200"))
    assert devices_apart(one, other) == ("measured on L4", "measured on H200")
    assert devices_apart(cpu, one) == ("measured on a CPU, which it is built for", "measured on L4")
    assert devices_apart(one, one) is None
    assert devices_apart(cpu, cpu) is None


def test_an_allowance_holds_for_figures_and_size() -> None:
    before = report(measurement(Metric.PREFILL_MAX_ABS, 1e-4), size=100_000_000)
    after = report(measurement(Metric.PREFILL_MAX_ABS, 2e-4), size=103_000_000)
    found = changes(before, after)
    assert [c.regression for c in found.values()] == [None, None, None]
    assert (found["size"].before, found["size"].after, found["size"].unit) == (100.0, 103.0, "MB")
    found = changes(before, after, **{"size": 2, "prefill.max_abs": 50})
    assert found["size"].regression == "worse by 3 %, but only 2 % is allowed"
    assert found["prefill.max_abs"].regression == "worse by 100 %, but only 50 % is allowed"
    lines = render_changes(tuple(found.values()))
    assert lines[0].split() == [
        "size",
        "100",
        "->",
        "103",
        "MB",
        "REGRESSION:",
        "worse",
        "by",
        "3",
        "%,",
        "but",
        "only",
        "2",
        "%",
        "is",
        "allowed",
    ]
    assert all(c.regression is None for c in changes(after, before, size=2).values())


def test_what_is_not_measured_any_more_is_worse() -> None:
    before = report(measurement(Metric.TEXT_KL_MEAN, 0.2, 0.01))
    gone = changes(before, report(measurement(Metric.TEXT_KL_MEAN, None)))
    assert gone["text.kl_mean"].regression == "was 0.2, but is not measured now"
    broken = changes(before, report(measurement(Metric.TEXT_KL_MEAN, math.nan)))
    assert broken["text.kl_mean"].regression == "was 0.2, but is not a number now"
    absent = changes(before, report(measurement(Metric.PREFILL_MAX_ABS, 1e-4)))
    assert absent["text.kl_mean"].regression == "was 0.2, but is absent now"
    assert absent["checks"].regression == "passed before and do not pass now: text.kl_mean"


def test_only_times_may_be_absent() -> None:
    """They are in the reports of another command."""
    kl = measurement(Metric.TEXT_KL_MEAN, 0.2)
    before = report(kl, measurement(Metric.INTER_TOKEN_RATIO, 0.5))
    assert [c.regression for c in changes(before, report(kl)).values()] == [None, None, None]


def test_a_check_that_does_not_pass_any_more() -> None:
    before = report(measurement(Metric.TEXT_KL_MEAN, 0.2))
    after = report(measurement(Metric.TEXT_KL_MEAN, 0.2), check=CheckStatus.UNDECIDED)
    assert changes(before, after)["checks"].regression == "passed before and do not pass now: text.kl_mean"
    assert changes(after, before)["checks"].regression is None


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("kl=2", "there is no figure 'kl'"),
        ("size", "'' is not a percentage"),
        ("size=-1", "'-1' is not a percentage"),
        ("size=nan", "'nan' is not a percentage"),
    ],
)
def test_an_allowance_that_means_nothing(stated: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_allowed((stated,))
    assert parse_allowed(("size=2.5", "text.kl_mean=0")) == {"size": 2.5, "text.kl_mean": 0.0}
