"""The report: what was built, the verdict on it, and everything that was measured."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmc.artifact.latency import Latency
from llmc.artifact.verdict import Measurement, Verdict


class Report(BaseModel):
    """Everything known about an artifact's parity and latency; each form is made from this alone.

    Args:
        llmc: Version of llmc that measured.
        model: The original, as the user named it.
        verdict: The target's gates held against `measurements`.
        measurements: One per metric, those without a gate included.
        latency: Timings; None if latency was not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    llmc: str
    model: str
    target: str
    profile: str
    verdict: Verdict
    measurements: tuple[Measurement, ...]
    latency: Latency | None


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, UTF-8, with a newline at the end; `Report.model_validate_json` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
