"""Implement `llmc compare`: compare two artifacts side by side."""

from __future__ import annotations

from pathlib import Path

from llmc.artifact.manifest import Manifest, WeightRecord
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.store.integrity import require_intact
from llmc.artifact.verdict import Change
from llmc.errors import ConfigError, LlmcError
from llmc.pipeline.inspect import count_operators
from llmc.pipeline.reports import artifact_bytes, stored_report
from llmc.pipeline.result import regression_failure
from llmc.records import Record
from llmc.report import compare_reports, devices_apart, parse_allowed, render_changes


class Difference(Record):
    """A property that differs between two artifacts, or that only one of them has.

    Args:
        kind: device, operator, pass, weights or tool.
    """

    kind: str
    name: str
    before: str
    after: str


class Comparison(Record):
    """The figures of two artifacts, and the differences in how they were built.

    Args:
        changes: Changes of the size and of every figure in the artifacts' reports.
        differences: Differences in devices that figures are of, operators, passes, bits of weights and
            versions of tools.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    differences: tuple[Difference, ...]

    def render(self) -> str:
        """Return text for a terminal."""
        lines = [f"{self.before} -> {self.after}", *render_changes(self.changes)]
        for d in self.differences:
            lines.append(f"  {d.kind:10} {d.name}: {d.before} -> {d.after}")
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return a parity error, or a latency error if nothing else became worse."""
        return regression_failure(self.changes)


def compare(before: Path, after: Path, allow: tuple[str, ...]) -> Comparison:
    """Compare size, quality, measured speed, graph and bits of two artifacts of one model.

    Args:
        allow: `NAME=PERCENT`, how much worse a figure may become.

    Raises:
        ConfigError: One is not an artifact, is damaged or has no report, or their models differ.
    """
    allowed = parse_allowed(allow)
    old, new = open_artifact(before), open_artifact(after)
    for artifact in (old, new):
        require_intact(artifact)
    if old.manifest.model.digest != new.manifest.model.digest:
        raise ConfigError(
            f"{before} was built from {old.manifest.model.ref} and {after} from {new.manifest.model.ref},"
            " which are different models",
            hint="compare artifacts of one model: figures relative to different originals are not comparable",
        )
    reports = (stored_report(old), stored_report(new))
    counts = [count_operators(artifact) for artifact in (old, new)]
    passes = [{p.name: p.applied for p in artifact.manifest.passes} for artifact in (old, new)]
    apart = devices_apart(*reports)
    differences = (
        *([] if apart is None else _differences("device", *({"figures": place} for place in apart))),
        *_differences("operator", *({n: str(c) for n, c in count.items()} for count in counts)),
        *_differences("pass", *({n: f"applied {c} times" for n, c in each.items()} for each in passes)),
        *_differences("weights", _bits(old.manifest), _bits(new.manifest)),
        *_differences("tool", old.manifest.tools, new.manifest.tools),
    )
    return Comparison(
        before=str(before),
        after=str(after),
        changes=compare_reports(reports[0], reports[1], allowed),
        differences=differences,
    )


def _differences(kind: str, old: dict[str, str], new: dict[str, str]) -> list[Difference]:
    names = [*old, *(name for name in new if name not in old)]
    pairs = [(name, old.get(name, "none"), new.get(name, "none")) for name in names]
    return [Difference(kind=kind, name=n, before=a, after=b) for n, a, b in pairs if a != b]


def _bits(manifest: Manifest) -> dict[str, str]:
    """Describe how the weights of each role are stored, and how many bytes they take."""
    by_role: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        by_role.setdefault(record.role.value, []).append(record)
    described = {}
    for role, records in by_role.items():
        forms = sorted({f"{r.bits} bits" + (f" by {r.block_size}" if r.block_size else "") for r in records})
        described[role] = f"{', '.join(forms)}, {sum(r.bytes for r in records) / 1e6:.4g} MB"
    described["all"] = f"{artifact_bytes(manifest) / 1e6:.4g} MB with all files"
    return described
