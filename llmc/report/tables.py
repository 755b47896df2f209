"""Define the tables of a report: figures that are not metrics, each defined once for every form.

A figure is one column of `LAYOUTS`: its caption, and the function that reads its value from an entry.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.artifact.latency import Latency
from llmc.config import Metric
from llmc.report.document import Report
from llmc.report.figures import format_figure

Cell = str | float | None


@dataclass(frozen=True)
class ReportTable:
    """A table of a report, with its cells as text.

    Args:
        name: Unique name among the tables of the report.
        caption: Its heading.
        columns: Captions of the columns; the first is for the subject of a row.
        rows: As many cells each as there are columns.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class TableLayout:
    """The layout of a table.

    Args:
        entries: Function that returns the subjects of the rows.
        columns: The value of an entry by the caption of its column; None for a figure that was not measured.
    """

    name: str
    caption: str
    entries: Callable[[Report], Iterable[Any]]
    columns: Mapping[str, Callable[[Any], Cell]]


def _timed(entries: Callable[[Latency], Iterable[Any]]) -> Callable[[Report], Iterable[Any]]:
    """Return the entries of a report's latency; none if it was not measured."""
    return lambda report: () if report.latency is None else entries(report.latency)


LAYOUTS = (
    TableLayout(
        "servers",
        "Servers",
        lambda report: report.servers,
        {
            "": lambda server: server.name if server.version is None else f"{server.name} {server.version}",
            "did": lambda server: server.deed.value,
            "where": lambda server: " ".join(filter(None, (server.where, server.dtype))) or None,
            "tensors taken": lambda server: None if server.taken is None else str(server.taken),
            "skipped": lambda server: None if server.skipped is None else str(server.skipped),
        },
    ),
    TableLayout(
        "latency",
        "Latency, ms",
        _timed(
            lambda latency: (
                *((f"first token after {p.prompt_tokens}", p) for p in latency.prefill),
                *((f"next token at {d.context}", d) for d in latency.decode),
            )
        ),
        {
            "": lambda row: row[0],
            "artifact p50": lambda row: row[1].artifact.p50_ms,
            "p95": lambda row: row[1].artifact.p95_ms,
            "p99": lambda row: row[1].artifact.p99_ms,
            "original p50": lambda row: row[1].original.p50_ms,
            "ratio (range)": lambda row: (
                f"{row[1].ratio.value:.3f} ({row[1].ratio.low:.3f} to {row[1].ratio.high:.3f})"
            ),
            "tokens/s": lambda row: row[1].artifact_tokens_per_s,
            "original tokens/s": lambda row: row[1].original_tokens_per_s,
            "n": lambda row: str(row[1].artifact.n),
        },
    ),
    TableLayout(
        "decode",
        "One decode step and the memory roofline",
        _timed(lambda latency: zip(latency.decode, latency.roofline, strict=True)),
        {
            "after tokens": lambda row: str(row[0].context),
            "weights, MB per token": lambda row: row[1].weight_bytes / 1e6,
            "KV cache, MB per token": lambda row: row[1].kv_bytes / 1e6,
            "bandwidth, GB/s": lambda row: row[1].bandwidth_gbs or "not stated by the profile",
            "roofline, ms": lambda row: row[1].bound_ms,
        },
    ),
    TableLayout(
        "ways",
        "Ways to run a step",
        _timed(lambda latency: latency.ways),
        {
            "": lambda way: way.where,
            "after tokens": lambda way: str(way.context),
            "p50, ms": lambda way: way.step.p50_ms,
            "p99": lambda way: way.step.p99_ms,
        },
    ),
    TableLayout(
        "footprints",
        "Load time and memory",
        _timed(
            lambda latency: (
                ("artifact", latency.artifact_footprint),
                ("original", latency.original_footprint),
            )
        ),
        {
            "": lambda row: row[0],
            "load, ms": lambda row: row[1].load.p50_ms,
            "peak, MB": lambda row: row[1].peak_bytes and row[1].peak_bytes / 1e6,
            "steady, MB": lambda row: row[1].steady_bytes and row[1].steady_bytes / 1e6,
            "on the GPU, MB": lambda row: row[1].gpu_bytes and row[1].gpu_bytes / 1e6,
        },
    ),
    TableLayout(
        "energy",
        "Energy of one token",
        _timed(lambda latency: (d for d in latency.decode if d.artifact_joules_per_token is not None)),
        {
            "after tokens": lambda decode: str(decode.context),
            "artifact, J": lambda decode: decode.artifact_joules_per_token,
            "original, J": lambda decode: decode.original_joules_per_token,
        },
    ),
    TableLayout(
        "energy-gpu",
        "Energy of one token, GPU",
        _timed(lambda latency: (d for d in latency.decode if d.artifact_gpu_joules_per_token is not None)),
        {
            "after tokens": lambda decode: str(decode.context),
            "artifact, J": lambda decode: decode.artifact_gpu_joules_per_token,
            "original, J": lambda decode: decode.original_gpu_joules_per_token,
        },
    ),
    TableLayout(
        "operators",
        "One step by kind of operator",
        _timed(lambda latency: latency.operators),
        {
            "operator": lambda operator: operator.name,
            "calls": lambda operator: str(operator.calls),
            "ms": lambda operator: operator.ms,
        },
    ),
    TableLayout(
        "batches",
        "Batches",
        _timed(lambda latency: latency.batches),
        {
            "rows": lambda batch: str(batch.batch),
            "after tokens": lambda batch: str(batch.context),
            "first token p50, ms": lambda batch: batch.ttft.p50_ms,
            "original": lambda batch: batch.ttft_original.p50_ms,
            "next token p50": lambda batch: batch.artifact.p50_ms,
            "p99": lambda batch: batch.artifact.p99_ms,
            "original p50": lambda batch: batch.original.p50_ms,
            "ratio": lambda batch: batch.ratio.value,
            "tokens/s of all rows": lambda batch: batch.tokens_per_s,
            "original tokens/s": lambda batch: batch.original_tokens_per_s,
        },
    ),
)


def make_tables(report: Report) -> list[ReportTable]:
    """Create every table that the report has figures for."""
    tables = (_make_table(layout, list(layout.entries(report))) for layout in LAYOUTS)
    return [table for table in tables if table.rows]


def make_notes(report: Report) -> list[str]:
    """Describe line by line what references and tables were measured with, and what was not measured."""
    references = [m.detail for m in report.measurements if m.metric is Metric.ORIGINAL_DECODE]
    references += filter(None, [report.measured])
    if report.apart is not None:
        references.append(f"the baseline is of another device: {report.apart}")
    latency = report.latency
    if latency is None:
        return references
    return [
        *references,
        f"artifact: {latency.where}; original: {latency.original}; {latency.threads} threads each",
        *([] if latency.apart is None else [f"ratios compare different devices: {latency.apart}"]),
        f"energy: {latency.energy}",
        *(f"not measured: {what}" for what in latency.dropped),
    ]


def _make_table(layout: TableLayout, entries: list[Any]) -> ReportTable:
    """Create the table without columns for which no entry has a value."""
    values = {caption: [value(entry) for entry in entries] for caption, value in layout.columns.items()}
    shown = {caption: cells for caption, cells in values.items() if any(c is not None for c in cells)}
    rows = zip(*([_format_cell(c) for c in cells] for cells in shown.values()), strict=True)
    return ReportTable(layout.name, layout.caption, tuple(shown), tuple(rows))


def _format_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if cell is not None and cell >= 1e4 else format_figure(cell)
