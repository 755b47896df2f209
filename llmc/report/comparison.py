"""Compare two reports: what became better or worse, and what blocks a release."""

from collections.abc import Mapping

from llmc.artifact.verdict import Change, CheckStatus, Measurement
from llmc.config import Better, Family, Metric
from llmc.errors import ConfigError, did_you_mean
from llmc.report.document import Report
from llmc.report.figures import format_estimate, format_figure

SIZE = "size"
CHECKS = "checks"


def parse_allowed(stated: tuple[str, ...]) -> dict[str, float]:
    """Parse texts `NAME=PERCENT`: how much worse each figure may become.

    Raises:
        ConfigError: A name is neither a metric nor `size`, or its value is not a number from 0 on.
    """
    figures = [SIZE, *(m.value for m in Metric)]
    allowed = {}
    for text in stated:
        name, _, percent = text.partition("=")
        if name not in figures:
            raise ConfigError(
                f"--allow {text}: there is no figure {name!r}", hint=did_you_mean(name, figures)
            )
        try:
            allowed[name] = float(percent)
        except ValueError:
            allowed[name] = -1.0
        if not 0 <= allowed[name] < float("inf"):
            raise ConfigError(
                f"--allow {text}: {percent!r} is not a percentage", hint=f"for example --allow {name}=2"
            )
    return allowed


def compare_reports(before: Report, after: Report, allowed: Mapping[str, float]) -> tuple[Change, ...]:
    """Compare every figure of both reports.

    A figure with a confidence interval blocks a release if the whole interval became worse: even the
    better end is beyond the worse end of the one before. Any figure does if it became worse by more than
    the percentage in `allowed`, was measured before and is not now, or is NaN. So does a check that
    passed and no longer does. Only times may be absent: `verify` and `bench` write separate reports.
    """
    old = {m.metric: m for m in before.measurements}
    new = {m.metric: m for m in after.measurements}
    changes = [_size(before.bytes, after.bytes, allowed.get(SIZE))] if before.bytes and after.bytes else []
    for metric in Metric:
        if metric in old or metric in new:
            changes.append(_change(metric, old.get(metric), new.get(metric), allowed.get(metric.value)))
    return (*changes, _lost(before, after))


def devices_apart(before: Report, after: Report) -> tuple[str, str] | None:
    """Return what was executed on which device for each of two reports; None if that is the same."""
    if before.measured == after.measured:
        return None
    was, now = (each.measured or "measured on a CPU, which it is built for" for each in (before, after))
    return was, now


def _is_time(metric: Metric) -> bool:
    return metric.family is Family.LATENCY


def _size(before: int, after: int, allowed: float | None) -> Change:
    return Change(
        name=SIZE,
        before=before / 1e6,
        after=after / 1e6,
        unit="MB",
        regression=_too_much(before, after, 1, allowed),
    )


def _change(
    metric: Metric, old: Measurement | None, new: Measurement | None, allowed: float | None
) -> Change:
    before, after = (None if m is None else m.value for m in (old, new))
    sign = -1 if metric.better is Better.MORE else 1
    why = None
    if old is not None and before is not None:
        if new is None:
            why = None if _is_time(metric) else f"was {format_figure(before)}, but is absent now"
        elif after is None:
            why = f"was {format_figure(before)}, but is {new.status} now"
        elif after != after:
            why = f"was {format_figure(before)}, but is not a number now"
        else:
            why = _beyond(old, new, sign) or _too_much(before, after, sign, allowed)
    return Change(name=metric.value, before=before, after=after, regression=why)


def _beyond(old: Measurement, new: Measurement, sign: int) -> str | None:
    """Describe by how much the intervals are apart, if the new one is on the worse side; None otherwise."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return None
    apart = new.low > old.high if sign > 0 else new.high < old.low
    if not apart:
        return None
    was, now = (format_estimate(m.value, m.low, m.high) for m in (old, new))
    return f"worse beyond both intervals: {was} before, {now} now"


def _too_much(before: float, after: float, sign: int, allowed: float | None) -> str | None:
    if allowed is None:
        return None
    worse = sign * (after - before)
    if worse <= abs(before) * allowed / 100:
        return None
    share = f"{100 * worse / abs(before):.3g} %" if before else format_figure(worse)
    return f"worse by {share}, but only {allowed:g} % is allowed"


def _lost(before: Report, after: Report) -> Change:
    passed = {c.metric for c in before.verdict.checks if c.status is CheckStatus.PASS}
    fine = {
        c.metric for c in after.verdict.checks if c.status in (CheckStatus.PASS, CheckStatus.NOT_APPLICABLE)
    }
    checked = {c.metric for c in after.verdict.checks}
    lost = [m.value for m in passed - fine if m in checked or not _is_time(m)]
    why = f"passed before and do not pass now: {', '.join(sorted(lost))}" if lost else None
    return Change(name=CHECKS, before=0.0, after=float(len(lost)), regression=why)


def render_changes(changes: tuple[Change, ...]) -> list[str]:
    """Render one line per figure: before, after, and what blocks a release."""
    lines = []
    for change in changes:
        unit = f" {change.unit}" if change.unit else ""
        line = f"  {change.name:26} {format_figure(change.before):>10} -> {format_figure(change.after)}{unit}"
        lines.append(line if change.regression is None else f"{line}  REGRESSION: {change.regression}")
    return lines
