"""Render the report as text for a terminal."""

from io import StringIO
from typing import TYPE_CHECKING

from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.report.document import Report
from llmc.report.figures import format_bound, format_estimate, ungated
from llmc.report.tables import ReportTable, make_notes, make_tables

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {
    CheckStatus.PASS: "green",
    CheckStatus.FAIL: "red",
    CheckStatus.UNDECIDED: "red",
    CheckStatus.NOT_MEASURED: "red",
    CheckStatus.NOT_APPLICABLE: "dim",
}


def render_text(report: Report, *, width: int = 110, colour: bool = False) -> str:
    """Render tables of checks, of figures without a gate and of all others; the verdict is the last line.

    Args:
        width: Columns of the terminal.
        colour: Whether to use ANSI escape sequences.
    """
    from rich.console import Console
    from rich.text import Text

    buffer = StringIO()
    console = Console(file=buffer, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    console.print(_checks(report))
    for table in make_tables(report):
        console.print(_table(table))
    for line in make_notes(report):
        console.print(Text(line))
    for m in report.measurements:
        if m.metric is Metric.POSITIONS:
            console.print(Text(f"positions verified: {m.detail}"))
    failed = ", ".join(str(c.metric) for c in report.verdict.decided) or "not measured"
    outcome = "passed" if report.verdict.passed else f"FAILED: {failed}"
    for reason, metrics in report.verdict.unmeasured.items():
        console.print(Text(f"not measured, {reason}: {', '.join(metrics)}"))
    for cause in report.verdict.causes:
        console.print(Text(f"no figure: {cause}"))
    if report.pruned is not None:
        console.print(Text(report.pruned))
    console.print(Text(f"{report.title}: {outcome}"))
    return buffer.getvalue()


def _checks(report: Report) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("metric", "value", "gate", "status", "detail")
    for check in report.verdict.checks:
        if check.status is CheckStatus.NOT_MEASURED:  # listed in one line below
            continue
        table.add_row(
            str(check.metric),
            format_estimate(check.value, check.low, check.high),
            format_bound(check),
            Text(str(check.status), style=_COLOURS[check.status]),
            Text(f"{check.detail}; {check.where}"),
        )
    for m in ungated(report.measurements, report.verdict.checks):
        detail = Text(f"{m.detail}; {m.where}")
        table.add_row(str(m.metric), format_estimate(m.value, m.low, m.high), "none", str(m.status), detail)
    return table


def _table(content: ReportTable) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(*content.columns, title=content.caption, title_justify="left")
    for row in content.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
