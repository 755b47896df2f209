"""How figures are written for people."""

import math

from llmc.artifact.verdict import Check, Measurement


def format_figure(value: float | None) -> str:
    """Four significant digits; `-` for a figure there is not, and words for one that could not be taken."""
    if value is None:
        return "-"
    return "no figure" if math.isnan(value) else f"{value:.4g}"


def format_estimate(value: float | None, low: float | None, high: float | None) -> str:
    """A figure, with its 95 % confidence interval if it has one."""
    if low is None or high is None:
        return format_figure(value)
    return f"{format_figure(value)} ({format_figure(low)} to {format_figure(high)})"


def format_bound(check: Check) -> str:
    """The check's threshold as a comparison."""
    if check.bound is None:
        return "finite"
    return f"{'<=' if check.direction == 'max' else '>='} {check.bound:g}"


def ungated(measurements: tuple[Measurement, ...], checks: tuple[Check, ...]) -> list[Measurement]:
    """Measurements that no check speaks of."""
    checked = {check.metric for check in checks}
    return [m for m in measurements if m.metric not in checked]
