"""Keep the outcomes of checks in a JSON file, which is replaced atomically after every check.

The schema of the file, version 1:

    schema_version   1
    machine          one line: processor, memory and releases of the packages, of the newest run
    outcomes         a list, one for each check and identity
      check          name, artifact, and batch x context if it has them: "decode/demo-cuda-int4/1x128"
      identity       what a figure is of; reused only where all of it is the same
        artifact     digest of the artifact's files, null for a check without one
        versions     releases by package
        device       the GPU with its capability and driver, or "cpu"
      status         "measured", "failed" (beyond its bounds, or an exception) or "not measured"
      why            the reason, null where it is measured
      figures        the figures by name; units are in the names, and milliseconds end in _ms
      seconds        how long it took
      when           time of its end, ISO 8601, UTC
      code           sha256 over the source of llmc that was measured
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llmc.artifact.store.disk import replace_text
from llmc.errors import ConfigError
from llmc.records import Strict


class Status(StrEnum):
    MEASURED = "measured"
    FAILED = "failed"
    NOT_MEASURED = "not measured"


#: Reason of a check for which no time was left.
OUT_OF_TIME = "out of time"


class Identity(Strict):
    """The artifact, releases and device that the figures of a check belong to; see the module."""

    artifact: str | None
    versions: dict[str, str]
    device: str


class Outcome(Strict):
    """The outcome of one check; see the module."""

    check: str
    identity: Identity
    status: Annotated[Status, Field(strict=False)]
    why: str | None = None
    figures: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    when: str = ""
    code: str = ""


class Document(Strict):
    """The whole file; see the module."""

    schema_version: Literal[1] = 1
    machine: str = ""
    outcomes: tuple[Outcome, ...] = ()


class Record:
    """The outcomes of all runs so far.

    Args:
        path: The JSON file; created at the first outcome, in a folder that exists.
        machine: One line on this machine.

    Raises:
        ConfigError: The file exists and is not of this schema.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self._path, self._machine = path, machine
        self._outcomes: dict[str, Outcome] = {}
        if path.exists():
            try:
                document = Document.model_validate_json(path.read_text(encoding="utf-8"))
            except (ValidationError, UnicodeDecodeError, OSError) as error:
                raise ConfigError(
                    f"{path} is not a file of results: {str(error).splitlines()[0]}",
                    hint="name another file with --out, or delete this one",
                ) from error
            self._outcomes = {_key(o.check, o.identity): o for o in document.outcomes}

    def find(self, check: str, identity: Identity) -> Outcome | None:
        """Return the outcome of a check for this identity, if it has one."""
        return self._outcomes.get(_key(check, identity))

    def put(self, outcome: Outcome) -> Outcome:
        """Write an outcome, and return what the file has of this check now.

        A check that failed stays failed where a later run has no time for it.
        """
        key = _key(outcome.check, outcome.identity)
        earlier = self._outcomes.get(key)
        if earlier is not None and earlier.status is Status.FAILED and outcome.why == OUT_OF_TIME:
            return earlier
        outcome = outcome.model_copy(update={"when": datetime.now(UTC).isoformat(timespec="seconds")})
        self._outcomes[key] = outcome
        document = Document(machine=self._machine, outcomes=tuple(self._outcomes.values()))
        replace_text(self._path, document.model_dump_json(indent=1) + "\n")
        return outcome


def _key(check: str, identity: Identity) -> str:
    return f"{check} {identity.model_dump_json()}"
