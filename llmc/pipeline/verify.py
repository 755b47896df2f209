"""`llmc verify`: the parity gate again."""

from pathlib import Path

from llmc.pipeline.gate import measure_parity, open_pair
from llmc.pipeline.result import GateReport, gate_report
from llmc.progress import Progress


def verify(path: Path, against: str | None, eval_text: Path | None, progress: Progress) -> GateReport:
    """Hold an artifact to its target's parity gates on this machine; the artifact is not changed.

    Args:
        path: An artifact.
        against: The original; None for the one that the manifest names.
        eval_text: The user's text; None for the one that ships.
    """
    with progress.stage("artifact"):
        artifact, checkpoint = open_pair(path, against)
    manifest = artifact.manifest
    gate = measure_parity(
        path, manifest.interface, checkpoint, manifest.target, manifest.profile.threads, eval_text, progress
    )
    return GateReport(report=gate_report(checkpoint.ref, manifest.target, manifest.profile.name, gate))
