"""Define the report: what was built, the verdict on it, and everything that was measured."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from llmc.artifact.latency import Latency
from llmc.artifact.served import ServerRecord
from llmc.artifact.store.disk import replace_text
from llmc.artifact.verdict import Change, Measurement, Peer, Verdict
from llmc.errors import ConfigError
from llmc.records import Strict

SCHEMA_VERSION: Literal[5] = 5


class Report(Strict):
    """The complete facts about an artifact's parity and latency; every form is rendered from this alone.

    Args:
        llmc: Version of llmc that took the measurements.
        model: The original, as the user named it.
        pruned: Human-readable description of what was left out of the model; None for nothing.
        verdict: The target's gates compared with `measurements`.
        measurements: One per metric, including those without a gate.
        measured: What was executed on which device, for an artifact that is not built for this machine's CPU.
        latency: Timings; None if latency was not measured.
        servers: What servers did with the artifact, and which were not asked.
        sizes: Stored bytes by kind of weight.
        bytes: Bytes of all files of the artifact.
        changes: Changes of figures since the report that this one was compared with.
        apart: On which devices both were measured, if that differs.
        peers: Artifacts of the same model, including this one.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    llmc: str
    model: str
    target: str
    profile: str
    pruned: str | None = None
    verdict: Verdict
    measurements: tuple[Measurement, ...]
    measured: str | None = None
    latency: Latency | None
    servers: tuple[ServerRecord, ...] = ()
    sizes: dict[str, int] = Field(default_factory=dict)
    bytes: int = 0
    changes: tuple[Change, ...] = ()
    apart: str | None = None
    peers: tuple[Peer, ...] = ()

    @property
    def title(self) -> str:
        """The title: model, target and profile."""
        return f"{self.model} {self.target}@{self.profile}"


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, UTF-8, with a newline at the end; `Report.model_validate_json` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, report.model_dump_json(indent=2) + "\n")


def render_schema() -> str:
    """Render the JSON schema of `write_json`'s output, as published in docs/report.schema.json."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a report that `write_json` wrote.

    Raises:
        ConfigError: It cannot be read, is not a report, or has another schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("schema_version")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a report: {error}", hint="llmc verify --report writes one"
        ) from error
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {version}, but this version of llmc reads {SCHEMA_VERSION}",
            hint="write the report again with this version of llmc",
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path} is damaged: {place}: {first['msg']}") from error
