"""Read the reports in an artifact's folder, and implement `llmc report`, which makes one page of them."""

from __future__ import annotations

import math
from pathlib import Path

from llmc.artifact.manifest import MANIFEST, REPORTS, Manifest
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.artifact.verdict import Peer, Verdict
from llmc.config import Metric
from llmc.errors import ConfigError, LlmcError
from llmc.pipeline.result import PathText, require_folder
from llmc.records import Record
from llmc.report import Report, read_report, write_html

#: Names of reports: `build` writes the first, `verify --report` and `bench --report` the second.
_NAMES = ("parity.json", "report.json")


class ReportPage(Record):
    """The page that was written.

    Args:
        left_out: Reasons why neighbouring artifacts are not on it, one text each.
    """

    path: PathText
    left_out: tuple[str, ...] = ()

    def render(self) -> str:
        """Return its path, and the artifacts that are not on it."""
        return "\n".join([str(self.path), *(f"left out: {reason}" for reason in self.left_out)])

    def failure(self) -> LlmcError | None:
        """Return None: a page of earlier reports does not fail again on their verdict."""
        return None


def report(path: Path) -> ReportPage:
    """Write `reports/report.html` into an artifact, from all reports in its folder.

    Beside the figures it shows size and quality of the other artifacts of the same model in the parent
    folder.

    Raises:
        ConfigError: There is no artifact or no report in it, or its folder is not writable or is a link
            elsewhere.
    """
    artifact = open_artifact(path)
    merged = stored_report(artifact)
    page = path / REPORTS / "report.html"
    if not page.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"{path / REPORTS} points outside of the artifact, to {page.resolve().parent}",
            hint="remove the link; a report is written into the artifact itself",
        )
    require_folder(page.parent)
    peers, left_out = _peers(artifact)
    write_html(merged.model_copy(update={"peers": peers}), page)
    return ReportPage(path=page, left_out=left_out)


def stored_report(artifact: Artifact) -> Report:
    """Merge the reports in an artifact; for each metric the report that was written last counts.

    Raises:
        ConfigError: There is none, or one of them is damaged or of another schema.
    """
    paths = _find_reports(artifact)
    if not paths:
        raise ConfigError(
            f"{artifact.path} has no report",
            hint=f"llmc verify {artifact.path} --report {artifact.path / REPORTS}",
        )
    reports = [read_report(p) for p in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name))]
    measurements = {m.metric: m for r in reports for m in r.measurements}
    checks = {c.metric: c for r in reports for c in r.verdict.checks}
    verdict = Verdict(passed=True, checks=tuple(checks.values()))
    return reports[-1].model_copy(
        update={
            "verdict": verdict.model_copy(update={"passed": not verdict.missed}),
            "measurements": tuple(measurements.values()),
            "latency": next((r.latency for r in reversed(reports) if r.latency is not None), None),
            "sizes": next((r.sizes for r in reversed(reports) if r.sizes), {}),
            "bytes": artifact_bytes(artifact.manifest),
        }
    )


def artifact_bytes(manifest: Manifest) -> int:
    """Return the total size of an artifact's files."""
    return sum(f.bytes for f in manifest.files.values())


def _peers(artifact: Artifact) -> tuple[tuple[Peer, ...], tuple[str, ...]]:
    """Return artifacts of this model in the same folder, this one included, and why others are left out."""
    peers, left_out = [], []
    for folder in sorted(artifact.path.resolve().parent.iterdir()):
        if not (folder / MANIFEST).is_file():
            continue
        try:
            peer = _peer(open_artifact(folder), artifact.manifest.model.digest)
        except ConfigError as error:  # another artifact is at fault; the page says so
            left_out.append(error.fact)
            continue
        if peer is not None:
            peers.append(peer)
    return tuple(peers), tuple(left_out)


def _peer(other: Artifact, digest: str) -> Peer | None:
    """Return None for an artifact of another model, or without a measured KL divergence."""
    if other.manifest.model.digest != digest or not _find_reports(other):
        return None
    values = {m.metric: m.value for m in stored_report(other).measurements}
    kl = values.get(Metric.TEXT_KL_MEAN)
    if kl is None or math.isnan(kl):
        return None
    return Peer(title=other.path.name, bytes=artifact_bytes(other.manifest), kl_mean=kl)


def _find_reports(artifact: Artifact) -> list[Path]:
    return [p for name in _NAMES for p in (artifact.path / REPORTS).rglob(name)]
