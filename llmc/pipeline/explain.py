"""`llmc inspect --explain`: where one pass applied in an artifact, and why it declined elsewhere."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from llmc.artifact.manifest import MANIFEST, Declined
from llmc.artifact.store.folder import open_artifact
from llmc.errors import ConfigError, LlmcError, did_you_mean
from llmc.records import Record


class Explanation(Record):
    """What one pass did when the artifact was built.

    Args:
        name: The pass.
        summary: What it does.
        applied: Places where it applied.
        declined: Where it nearly did, by kind of reason.
    """

    name: str
    summary: str
    applied: int
    declined: tuple[Declined, ...]

    def render(self) -> str:
        """Text for a terminal."""
        lines = [f"{self.name}: {self.summary}", f"applied at {_places(self.applied)}"]
        for each in self.declined:
            where = f", in layers {_ranges(each.layers)}" if each.layers else ""
            lines += [
                f"declined at {_places(each.count)}{where} [{each.code}]",
                f"  {each.reason}",
                f"  first at {each.node}",
            ]
        return "\n".join(lines if self.declined else [*lines, "declined nowhere"])

    def failure(self) -> LlmcError | None:
        """Looking at something never fails a gate."""
        return None


def explain(reference: str, name: str) -> Explanation:
    """What pass `name` did in an artifact.

    Raises:
        ConfigError: No artifact, or its target does not have the pass.
    """
    from llmc.passes import registered_passes

    if not (Path(reference) / MANIFEST).is_file():
        raise ConfigError(
            f"{reference} is no artifact: passes run when a model is built for a target",
            hint="llmc build it first, and name the artifact",
        )
    manifest = open_artifact(Path(reference)).manifest
    records = {record.name: record for record in manifest.passes}
    if name not in records:
        raise ConfigError(
            f"target {manifest.target.name} has no pass {name!r}", hint=did_you_mean(name, records)
        )
    record = records[name]
    known = registered_passes().get(name)
    summary = known.summary if known is not None else "a pass that this llmc does not have"
    return Explanation(name=name, summary=summary, applied=record.applied, declined=record.declined)


def _places(count: int) -> str:
    return f"{count} place" if count == 1 else f"{count} places"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers in words: (0, 1, 2, 5) as `0-2, 5`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
