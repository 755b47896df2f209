"""Reports that lie in an artifact's folder, and `llmc report`, which makes one page of them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmc.artifact.manifest import MANIFEST, REPORTS, Manifest
from llmc.artifact.store import Artifact, open_artifact
from llmc.artifact.verdict import Peer, Verdict
from llmc.config import Metric
from llmc.errors import ConfigError, LlmcError
from llmc.pipeline.result import PathText, require_folder
from llmc.report import Report, read_report, write_html

#: Written by `build`; by `verify --report` and `bench --report` into any folder below `reports/`.
_NAMES = ("parity.json", "report.json")


class ReportPage(BaseModel):
    """The page that was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: PathText

    def render(self) -> str:
        """Its path."""
        return str(self.path)

    def failure(self) -> LlmcError | None:
        """Looking at a verdict does not repeat it."""
        return None


def report(path: Path) -> ReportPage:
    """Write `reports/report.html` into an artifact, from all reports that lie there.

    Beside the figures it shows size and quality of the other artifacts of the same model in the folders
    next to it.

    Raises:
        ConfigError: No artifact, no report in it, or its folder cannot be written to.
    """
    artifact = open_artifact(path)
    made = stored_report(artifact)
    page = path / REPORTS / "report.html"
    require_folder(page.parent)
    write_html(made.model_copy(update={"peers": _peers(artifact)}), page)
    return ReportPage(path=page)


def stored_report(artifact: Artifact) -> Report:
    """The reports in an artifact as one; of each metric the one that was written last counts.

    Raises:
        ConfigError: There is none, or one of them is damaged or of another schema.
    """
    found = [p for name in _NAMES for p in (artifact.path / REPORTS).rglob(name)]
    if not found:
        raise ConfigError(
            f"{artifact.path} has no report",
            hint=f"llmc verify {artifact.path} --report {artifact.path / REPORTS}",
        )
    reports = [read_report(p) for p in sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name))]
    measurements = {m.metric: m for r in reports for m in r.measurements}
    checks = {c.metric: c for r in reports for c in r.verdict.checks}
    verdict = Verdict(passed=True, checks=tuple(checks.values()))
    return reports[-1].model_copy(
        update={
            "verdict": verdict.model_copy(update={"passed": not verdict.missed}),
            "measurements": tuple(measurements.values()),
            "latency": next((r.latency for r in reversed(reports) if r.latency is not None), None),
            "sizes": next((r.sizes for r in reversed(reports) if r.sizes), {}),
            "bytes": stored_bytes(artifact.manifest),
        }
    )


def stored_bytes(manifest: Manifest) -> int:
    """Of all files of an artifact."""
    return sum(f.bytes for f in manifest.files.values())


def _peers(artifact: Artifact) -> tuple[Peer, ...]:
    """Artifacts of the same model beside this one that have a KL divergence, this one included."""
    peers = []
    for folder in sorted(artifact.path.resolve().parent.iterdir()):
        if not (folder / MANIFEST).is_file():
            continue
        other = open_artifact(folder)
        has_report = any(next((folder / REPORTS).rglob(name), None) for name in _NAMES)
        if other.manifest.model.digest != artifact.manifest.model.digest or not has_report:
            continue
        kl = next(
            (m.value for m in stored_report(other).measurements if m.metric is Metric.TEXT_KL_MEAN), None
        )
        if kl is not None and kl == kl:
            peers.append(Peer(title=folder.name, bytes=stored_bytes(other.manifest), kl_mean=kl))
    return tuple(peers)
