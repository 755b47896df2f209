"""Implement `llmc inspect --explain`: where a pass applied in an artifact, and why it declined elsewhere."""

from __future__ import annotations

from pathlib import Path

from llmc.artifact.manifest import MANIFEST, Declined
from llmc.artifact.store.folder import open_artifact
from llmc.errors import ConfigError, LlmcError, did_you_mean, number_ranges
from llmc.records import Record


class Explanation(Record):
    """The effect of a pass when the artifact was built.

    Args:
        name: The pass.
        summary: Its purpose.
        applied: Number of places where it applied.
        declined: Places where it almost applied, by kind of reason.
    """

    name: str
    summary: str
    applied: int
    declined: tuple[Declined, ...]

    def render(self) -> str:
        """Return text for a terminal."""
        lines = [f"{self.name}: {self.summary}", f"applied {_times(self.applied)}"]
        for each in self.declined:
            where = f", in layers {number_ranges(each.layers)}" if each.layers else ""
            lines += [
                f"declined {_times(each.count)}{where} [{each.code}]",
                f"  {each.reason}",
                f"  first at {each.node}",
            ]
        return "\n".join(lines if self.declined else [*lines, "never declined"])

    def failure(self) -> LlmcError | None:
        """Return None: an inspection cannot fail."""
        return None


def explain(reference: str, name: str) -> Explanation:
    """Explain what pass `name` did in an artifact.

    Raises:
        ConfigError: `reference` is not an artifact, or its target does not have the pass.
    """
    from llmc.passes import registered_passes

    if not (Path(reference) / MANIFEST).is_file():
        raise ConfigError(
            f"{reference} is not an artifact: passes run when a model is built for a target",
            hint="build it with llmc build, and name the artifact",
        )
    manifest = open_artifact(Path(reference)).manifest
    records = {record.name: record for record in manifest.passes}
    if name not in records:
        raise ConfigError(
            f"target {manifest.target.name} has no pass {name!r}", hint=did_you_mean(name, records)
        )
    record = records[name]
    registered = registered_passes().get(name)
    summary = (
        registered.summary if registered is not None else "a pass that this version of llmc does not have"
    )
    return Explanation(name=name, summary=summary, applied=record.applied, declined=record.declined)


def _times(count: int) -> str:
    return f"{count} time" if count == 1 else f"{count} times"
