"""`llmc bench`: latency beside the original."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.pipeline.gate import GateResult, latency_gates, open_pair
from llmc.pipeline.original import read_text, tokenize
from llmc.pipeline.result import GateReport, gate_report, require_folder, write_all
from llmc.progress import Progress


@dataclass(frozen=True)
class OriginalLoader:
    """Loads the original in a process of its own."""

    ref: str

    def __call__(self) -> Any:
        from llmc.checkpoint import open_checkpoint

        return open_checkpoint(self.ref).load_reference("sdpa")


def bench(
    path: Path,
    against: str | None,
    progress: Progress,
    *,
    force: bool = False,
    folder: Path | None = None,
) -> GateReport:
    """Measure an artifact's latency interleaved with the original's, and hold the latency gates.

    Args:
        path: An artifact.
        against: The original; None for the one that the manifest names.
        force: Take an original that the artifact was not built from.
        folder: Where the report goes in all its forms; None for nowhere.
    """
    from llmc.artifact.store import check_files
    from llmc.pipeline.engines import require_no_engine
    from llmc.validate.gates import evaluate
    from llmc.validate.latency import Schedule, measure_latency, ratios
    from llmc.validate.reference import TorchModel
    from llmc.validate.session import shares_buffer

    if folder is not None:
        require_folder(folder)
    with progress.stage("artifact"):
        artifact, checkpoint, _ = open_pair(path, against, force=force)
        check_files(artifact)
    manifest = artifact.manifest
    require_no_engine(manifest)
    with progress.stage("load the original"):
        tokens, _ = tokenize(checkpoint.tokenizer(), read_text(()))
        reference = TorchModel(checkpoint.load_reference("sdpa"))
    with progress.stage("latency"):
        latency = measure_latency(
            path,
            manifest.interface,
            reference,
            OriginalLoader(checkpoint.ref),
            tokens=tokens,
            profile=manifest.profile,
            threads=manifest.profile.threads or os.cpu_count() or 1,
            share_buffer=shares_buffer(path),
            schedule=Schedule(),
        )
    measurements = ratios(latency)
    gate = GateResult(measurements, evaluate(latency_gates(manifest.target), measurements), latency)
    name = manifest.profile.name
    report = gate_report(checkpoint.ref, manifest.target, name, gate, manifest.weights, path)
    if folder is not None:
        write_all(report, folder)
    return GateReport(report=report)
