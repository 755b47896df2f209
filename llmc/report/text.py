"""The report as text for a terminal."""

from io import StringIO
from typing import TYPE_CHECKING

from llmc.artifact.latency import Footprint, Latency, Ratio, Timing
from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.report.document import Report
from llmc.report.figures import energies, format_bound, format_estimate, format_figure, ungated

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
    """Tables of checks, of figures without a gate, and of latency, with the verdict in the last line.

    Args:
        width: Columns of the terminal.
        colour: Whether to use ANSI escape sequences.
    """
    from rich.console import Console
    from rich.text import Text

    buffer = StringIO()
    console = Console(file=buffer, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    console.print(_checks(report))
    if report.latency is not None:
        console.print(_latency(report.latency))
        for line in _notes(report.latency):
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
        if check.status is CheckStatus.NOT_MEASURED:  # told in one line below
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


def _latency(latency: Latency) -> "Table":
    from rich.table import Table

    table = Table("latency, ms", "artifact p50", "p95", "p99", "original p50", "ratio (range)", "n")
    for p in latency.prefill:
        table.add_row(f"TTFT, {p.prompt_tokens} tokens", *_row(p.artifact, p.original, p.ratio))
    for d in latency.decode:
        table.add_row(f"inter-token, context {d.context}", *_row(d.artifact, d.original, d.ratio))
    return table


def _row(artifact: Timing, original: Timing, ratio: Ratio) -> tuple[str, ...]:
    times = (artifact.p50_ms, artifact.p95_ms, artifact.p99_ms, original.p50_ms)
    spread = f"{ratio.value:.3f} ({ratio.low:.3f}..{ratio.high:.3f})"
    return (*(f"{value:.2f}" for value in times), spread, str(artifact.n))


def _notes(latency: Latency) -> list[str]:
    lines = [f"artifact: {latency.where}; original: {latency.original}; {latency.threads} threads each"]
    for decode, roof in zip(latency.decode, latency.roofline, strict=True):
        bound = "bandwidth not stated by the profile"
        if roof.bound_ms is not None:
            bound = f"roofline {roof.bound_ms:.2f} ms at {roof.bandwidth_gbs:g} GB/s"
        lines.append(
            f"context {decode.context}: {decode.artifact_tokens_per_s:.1f} tokens/s"
            f" (original {decode.original_tokens_per_s:.1f}), {roof.weight_bytes / 1e6:.1f} MB weights"
            f" + {roof.kv_bytes / 1e6:.1f} MB KV per token, {bound}"
        )
        for device, mine, theirs in energies(decode):
            lines.append(
                f"context {decode.context}: {format_figure(mine)} J per token"
                f" (original {format_figure(theirs)}), {device}"
            )
    lines.append(f"energy: {latency.energy}")
    lines.append(f"artifact: {_footprint(latency.artifact_footprint)}")
    lines.append(f"original: {_footprint(latency.original_footprint)}")
    for b in latency.batches:
        lines.append(
            f"batch of {b.batch} at context {b.context}: first token {b.ttft.p50_ms:.1f} ms"
            f" (original {b.ttft_original.p50_ms:.1f}), {b.artifact.p50_ms:.2f} ms a step"
            f" (original {b.original.p50_ms:.2f}), {b.tokens_per_s:.1f} tokens/s"
            f" (original {b.original_tokens_per_s:.1f})"
        )
    for o in latency.operators:
        lines.append(f"one step: {o.ms:.3f} ms in {o.calls} {o.name}")
    return lines + [f"not measured: {what}" for what in latency.dropped]


def _footprint(footprint: Footprint) -> str:
    peak, steady = (
        "not known" if size is None else f"{size / (1 << 20):.0f} MiB"
        for size in (footprint.peak_bytes, footprint.steady_bytes)
    )
    return f"load {footprint.load.p50_ms:.0f} ms, peak memory {peak}, steady {steady}"
