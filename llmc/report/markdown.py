"""The report as Markdown, for a pull request or a release note."""

from pathlib import Path

from llmc.artifact.disk import replace_text
from llmc.artifact.latency import Latency
from llmc.artifact.verdict import CheckStatus
from llmc.report.document import Report
from llmc.report.figures import energies, format_bound, format_estimate, format_figure, ungated

_MARKS = {
    CheckStatus.PASS: "pass",
    CheckStatus.FAIL: "**FAIL**",
    CheckStatus.UNDECIDED: "**undecided**",
    CheckStatus.NOT_MEASURED: "**not measured**",
    CheckStatus.NOT_APPLICABLE: "not applicable",
}


def write_markdown(report: Report, path: Path) -> None:
    """Write the verdict, a table of checks and one of latency."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, render_markdown(report))


def render_markdown(report: Report) -> str:
    """The verdict, a table of checks, the figures without a gate, and latency."""
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
            told = "" if c.regression is None else f"**regression**: {_cell(c.regression)}"
            lines.append(
                f"| {c.name} | {format_figure(c.before)} | {format_figure(c.after)} {c.unit} | {told} |"
            )
    if report.latency is not None:
        lines += ["", *_latency(report.latency)]
    return "\n".join([*lines, "", f"llmc {report.llmc}", ""])


def _latency(latency: Latency) -> list[str]:
    lines = ["| latency, ms | artifact p50 / p95 / p99 | original p50 | ratio (range) |", "|---|---|---|---|"]
    rows = [(f"first token after {p.prompt_tokens}", p) for p in latency.prefill]
    rows += [(f"next token at {d.context}", d) for d in latency.decode]  # type: ignore[misc]
    rows += [(f"next token of {b.batch} rows at {b.context}", b) for b in latency.batches]  # type: ignore[misc]
    for name, entry in rows:
        a, o, r = entry.artifact, entry.original, entry.ratio
        times = " / ".join(format_figure(v) for v in (a.p50_ms, a.p95_ms, a.p99_ms))
        spread = f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})"
        lines.append(f"| {name} | {times} | {format_figure(o.p50_ms)} | {spread} |")
    for d in latency.decode:
        for device, mine, theirs in energies(d):
            told = f"{format_figure(mine)} J per token, the original {format_figure(theirs)}, {device}"
            lines += ["", f"At {d.context}: {told} ({_cell(latency.energy)})"]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
