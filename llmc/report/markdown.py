"""Render the report as Markdown, for a pull request or a release note."""

from pathlib import Path

from llmc.artifact.store.disk import replace_text
from llmc.artifact.verdict import CheckStatus
from llmc.report.document import Report
from llmc.report.figures import format_bound, format_estimate, format_figure, ungated
from llmc.report.tables import ReportTable, make_notes, make_tables

_MARKS = {
    CheckStatus.PASS: "pass",
    CheckStatus.FAIL: "**FAIL**",
    CheckStatus.UNDECIDED: "**undecided**",
    CheckStatus.NOT_MEASURED: "**not measured**",
    CheckStatus.NOT_APPLICABLE: "not applicable",
}


def write_markdown(report: Report, path: Path) -> None:
    """Write the Markdown of `render_markdown`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, render_markdown(report))


def render_markdown(report: Report) -> str:
    """Render the verdict, a table of checks, the figures without a gate, and all other tables."""
    outcome = "passed" if report.verdict.passed else "FAILED"
    lines = [f"## {_cell(report.title)}: {outcome}", ""]
    lines += [] if report.pruned is None else [_cell(report.pruned), ""]
    for check in report.verdict.decided:
        lines.append(f"- **{check.metric}** {check.status}: {_cell(check.detail)}")
    for reason, metrics in report.verdict.unmeasured.items():
        lines.append(f"- not measured, {_cell(reason)}: {', '.join(metrics)}")
    if report.verdict.missed:
        lines.append("")
    lines += ["| check | value | gate | |", "|---|---|---|---|"]
    for check in report.verdict.checks:
        value = format_estimate(check.value, check.low, check.high)
        lines.append(f"| {check.metric} | {value} | {format_bound(check)} | {_MARKS[check.status]} |")
    for m in ungated(report.measurements, report.verdict.checks):
        lines.append(f"| {m.metric} | {format_estimate(m.value, m.low, m.high)} | | {m.status} |")
    if report.changes:
        lines += ["", "| against the baseline | before | now | |", "|---|---|---|---|"]
        for c in report.changes:
            regression = "" if c.regression is None else f"**regression**: {_cell(c.regression)}"
            lines.append(
                f"| {c.name} | {format_figure(c.before)} | {format_figure(c.after)} {c.unit} | {regression} |"
            )
    for table in make_tables(report):
        lines += _table(table)
    for line in make_notes(report):
        lines += ["", _cell(line)]
    return "\n".join([*lines, "", f"llmc {report.llmc}", ""])


def _table(table: ReportTable) -> list[str]:
    """Return the lines of a table: its heading, its columns and its rows."""
    columns = " | ".join(map(_cell, table.columns))
    lines = ["", f"### {table.caption}", "", f"| {columns} |", "|---" * len(table.columns) + "|"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in table.rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
