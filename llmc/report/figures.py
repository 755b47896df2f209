"""Format figures for people."""

import math

from llmc.artifact.verdict import Check, Measurement


def format_figure(value: float | None) -> str:
    """Return four significant digits; `-` for a missing figure, and `no figure` for NaN."""
    if value is None:
        return "-"
    return "no figure" if math.isnan(value) else f"{value:.4g}"


def format_estimate(value: float | None, low: float | None, high: float | None) -> str:
    """Return a figure, with its 95 % confidence interval if it has one."""
    if low is None or high is None:
        return format_figure(value)
    return f"{format_figure(value)} ({format_figure(low)} to {format_figure(high)})"


def format_bound(check: Check) -> str:
    """Return the check's threshold as a comparison."""
    if check.bound is None:
        return "finite"
    return f"{'<=' if check.direction == 'max' else '>='} {check.bound:g}"


def ungated(measurements: tuple[Measurement, ...], checks: tuple[Check, ...]) -> list[Measurement]:
    """Return the measurements that no check covers."""
    checked = {check.metric for check in checks}
    return [m for m in measurements if m.metric not in checked]
