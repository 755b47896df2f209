"""`llmc verify`: the parity gate again."""

from collections.abc import Sequence
from pathlib import Path

from llmc.pipeline.compile import lower_graph
from llmc.pipeline.gate import Subject, measure_parity, open_pair
from llmc.pipeline.result import GateReport, gate_report
from llmc.progress import Progress


def verify(
    path: Path, against: str | None, eval_text: Sequence[str], progress: Progress, *, force: bool = False
) -> GateReport:
    """Hold an artifact to its target's parity gates on this machine; the artifact is not changed.

    Args:
        path: An artifact.
        against: The original; None for the one that the manifest names.
        eval_text: Files with the user's text; none for the one that ships.
        force: Take an original that the artifact was not built from.
    """
    from llmc.artifact.store import damaged_files

    with progress.stage("artifact"):
        artifact, checkpoint, digest = open_pair(path, against, force=force)
        damaged = damaged_files(artifact)
    manifest = artifact.manifest
    sources = lower_graph(checkpoint, manifest.target, progress).sources
    subject = Subject(
        folder=path,
        interface=manifest.interface,
        target=manifest.target,
        threads=manifest.profile.threads,
        checkpoint=checkpoint,
        model_digest=digest,
        sources=sources,
        damaged=damaged,
    )
    gate = measure_parity(subject, eval_text, progress)
    return GateReport(report=gate_report(checkpoint.ref, manifest.target, manifest.profile.name, gate))
