"""How figures are written for people."""

from llmc.artifact.verdict import Check, Measurement


def format_figure(value: float | None) -> str:
    """Four significant digits; `-` for a figure there is not."""
    return "-" if value is None else f"{value:.4g}"


def format_bound(check: Check) -> str:
    """The check's threshold as a comparison."""
    if check.bound is None:
        return "finite"
    return f"{'<=' if check.direction == 'max' else '>='} {check.bound:g}"


def ungated(measurements: tuple[Measurement, ...], checks: tuple[Check, ...]) -> list[Measurement]:
    """Measurements that no check speaks of."""
    checked = {check.metric for check in checks}
    return [m for m in measurements if m.metric not in checked]
