"""Define the commands' results: data for machines, text for people, and whether they are failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

from pydantic import PlainSerializer

from llmc import __version__
from llmc.artifact.forecast import Forecast
from llmc.artifact.manifest import MANIFEST, REPORTS, Manifest, PruneRecord, State, WeightRecord
from llmc.artifact.verdict import Change, Check, CheckStatus, Measurement, Verdict
from llmc.backends import backend_of
from llmc.config import Family, Metric, Target
from llmc.errors import ConfigError, LatencyError, LlmcError, ParityError
from llmc.pipeline.gate.advice import advise, explain_missed
from llmc.pipeline.gate.parity import GateResult
from llmc.progress import Progress
from llmc.records import Record
from llmc.report import (
    Report,
    format_figure,
    render_changes,
    render_text,
    write_html,
    write_json,
    write_junit,
    write_markdown,
)

PathText = Annotated[Path, PlainSerializer(str, when_used="json")]


class BuildResult(Record):
    """The result of a build.

    Args:
        path: Path of the artifact; `<output>.failed` if it missed a gate.
        manifest: Its manifest.
        verdict: The parity gates; None if they did not run.
        seconds: Wall time of all stages.
        peak_rss_bytes: Peak resident memory of the process; None if the system does not report it.
        forecasts: Latency bounds by profile for engines, from data sheets.
    """

    path: PathText
    manifest: Manifest
    verdict: Verdict | None
    seconds: float
    peak_rss_bytes: int | None
    forecasts: tuple[Forecast, ...] = ()

    def render(self) -> str:
        """Return a few lines for a terminal."""
        manifest = self.manifest
        total = sum(f.bytes for f in manifest.files.values())
        lines = [
            f"{self.path}",
            f"  {manifest.model.architecture} for {manifest.target.name} on {manifest.profile.device}: "
            f"{total / 1e6:.0f} MB, {manifest.state.value}",
        ]
        if manifest.model.adapter is not None:
            lines.append(f"  {manifest.model.adapter.render()}")
        if manifest.pruned is not None:
            lines.append(f"  {manifest.pruned.render()}")
        lines += [f"  {line}" for line in manifest.text.describe()]
        if self.verdict is not None:
            lines += render_checks(self.verdict)
            lines += [f"  {line}" for line in explain_missed(self.verdict.missed)]
        backend = backend_of(manifest.target)
        lines += backend.describe(manifest)
        lines += [forecast.render() for forecast in self.forecasts]
        memory = f", peak memory {self.peak_rss_bytes / 1e9:.2f} GB" if self.peak_rss_bytes else ""
        lines.append(f"  {self.seconds:.1f} s{memory}")
        measured = None if self.verdict is None else describe_measured(manifest.target, self.verdict.checks)
        if measured is not None:
            lines.append(f"  {measured}")
        elif manifest.state is State.NOT_EXECUTED:
            reason = backend.describe_unexecuted(manifest)
            lines.append(f"  not executed, so nothing was measured: {reason}")
        elif manifest.state is State.NOT_VERIFIED:
            lines.append("  not compared with the original: llmc verify does that")
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return a parity error if a gate failed."""
        kept = f"kept for inspection at {self.path}"
        advice = None if self.verdict is None else advise(self.manifest.target, self.verdict)
        return parity_failure(self.verdict, kept if advice is None else f"{advice}; {kept}")


def describe_measured(target: Target, figures: Sequence[Measurement] | Sequence[Check]) -> str | None:
    """Describe what was executed to measure an artifact; None if only the CPU that it is built for can."""
    return backend_of(target).describe_measured(target, {figure.where for figure in figures})


def build_result(path: Path, manifest: Manifest, verdict: Verdict | None, progress: Progress) -> BuildResult:
    """Create the result of a build whose stages `progress` has recorded."""
    return BuildResult(
        path=path,
        manifest=manifest,
        verdict=verdict,
        seconds=sum(r.seconds for r in progress.records),
        peak_rss_bytes=max((r.peak_rss_bytes or 0 for r in progress.records), default=0) or None,
    )


def render_checks(verdict: Verdict) -> list[str]:
    """Render one line per gate: metric, value, bound, outcome; and why gates without a figure have none."""
    lines = []
    for check in verdict.checks:
        value = "not measured" if check.value is None else format_figure(check.value)
        bound = "" if check.bound is None else f"  ({check.direction} {check.bound:g})"
        if check.status is CheckStatus.NOT_APPLICABLE:
            value, bound = check.detail, ""
        lines.append(f"  {check.status.value:15} {check.metric.value:24} {value}{bound}")
    return lines + [f"  no figure: {cause}" for cause in verdict.causes]


def parity_failure(verdict: Verdict | None, hint: str) -> LlmcError | None:
    """Return the error for a failed verdict."""
    if verdict is None or verdict.passed:
        return None
    return ParityError(_missed(verdict), hint=hint)


def _missed(verdict: Verdict) -> str:
    """Describe in one sentence the missed and the undecidable gates."""
    named = {
        status: [c.metric.value for c in verdict.missed if c.status is status]
        for status in (CheckStatus.FAIL, CheckStatus.UNDECIDED, CheckStatus.NOT_MEASURED)
    }
    failed, undecided, left = named.values()
    parts = []
    if failed:
        parts.append(f"the artifact misses {len(failed)} of its gates: {', '.join(failed)}")
    if undecided:
        parts.append(f"too little text to decide: {', '.join(undecided)}")
    if left and failed:
        parts.append(f"{len(left)} gates were not measured; --all measures them")
    elif left:
        parts.append(f"not measured: {', '.join(left)}")
    parts += verdict.causes
    return "; ".join(parts)


class GateReport(Record):
    """A report as a command's result: its document as data, its tables as text.

    Args:
        advice: What to do about missed quality gates, for the hint of the error.
    """

    report: Report
    advice: str | None = None

    def model_dump_json(self, *, indent: int | None = None, **_: object) -> str:
        """Return the report's own document."""
        return self.report.model_dump_json(indent=indent)

    def render(self) -> str:
        """Return tables for a terminal."""
        lines = [render_text(self.report).rstrip()]
        if self.report.changes:
            lines += ["against the baseline:", *render_changes(self.report.changes)]
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return a parity or latency error if a gate failed, or if a figure is worse than the baseline."""
        verdict = self.report.verdict
        if verdict.passed:
            return regression_failure(self.report.changes)
        kind = LatencyError if all(c.metric.family is Family.LATENCY for c in verdict.missed) else ParityError
        return kind(_missed(verdict), hint=self.advice or "see the table for the figures")


def gate_report(
    model: str,
    target: Target,
    profile: str,
    gate: GateResult,
    pruned: PruneRecord | None,
    weights: Sequence[WeightRecord],
    folder: Path,
) -> Report:
    """Create the report of a gate.

    Args:
        pruned: What was pruned from the model.
        weights: How every matrix is stored.
        folder: The artifact; its size is counted without its manifest and reports.
    """
    sizes: dict[str, int] = {}
    for record in weights:
        kind = f"{record.role.value}, {record.bits} bits"
        sizes[kind] = sizes.get(kind, 0) + record.bytes
    return Report(
        llmc=__version__,
        model=model,
        target=target.name,
        profile=profile,
        pruned=None if pruned is None else _price(pruned, gate.measurements),
        verdict=gate.verdict,
        measurements=gate.measurements,
        measured=describe_measured(target, gate.measurements),
        latency=gate.latency,
        servers=gate.servers,
        sizes=sizes,
        bytes=sum(
            p.stat().st_size
            for p in folder.rglob("*")
            if p.is_file() and p != folder / MANIFEST and folder / REPORTS not in p.parents
        ),
    )


def _price(pruned: PruneRecord, measurements: Sequence[Measurement]) -> str:
    """Describe what was pruned, and the artifact's total loss on the same text."""
    ratio = next((m.value for m in measurements if m.metric is Metric.TEXT_PERPLEXITY_RATIO), None)
    if not ratio:
        return f"{pruned.render()}; its cost was not measured"
    return f"{pruned.render()}; with quantization, the artifact costs {math.log(ratio):+.3f} nats per token"


def regression_failure(changes: tuple[Change, ...]) -> LlmcError | None:
    """Return the error for regressions."""
    worse = [c for c in changes if c.regression is not None]
    if not worse:
        return None
    kind = LatencyError if all(c.name in Family.LATENCY.metrics for c in worse) else ParityError
    listed = "; ".join(f"{c.name} {c.regression}" for c in worse)
    return kind(
        f"{len(worse)} regressions: {listed}",
        hint="--allow NAME=PERCENT states how much worse a figure may be",
    )


def require_folder(folder: Path) -> None:
    """Create the folder for a report before the work that it is about.

    Raises:
        ConfigError: It cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {folder}: {error.strerror}", hint="name another folder"
        ) from error


def write_all(report: Report, folder: Path) -> None:
    """Write report.json, junit.xml, report.md and report.html into `folder`."""
    write_json(report, folder / "report.json")
    write_junit(report, folder / "junit.xml")
    write_markdown(report, folder / "report.md")
    write_html(report, folder / "report.html")


def write_report(report: Report, folder: Path, name: str) -> None:
    """Write `<name>.json` and `<name>.xml` (JUnit) into `folder`."""
    write_json(report, folder / f"{name}.json")
    write_junit(report, folder / f"{name}.xml")
