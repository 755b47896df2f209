"""`llmc bench`: latency beside the original."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.config import Metric, Provider
from llmc.errors import ResourceError
from llmc.pipeline.gate import GateResult, latency_gates, open_pair
from llmc.pipeline.original import read_text, tokenize
from llmc.pipeline.result import GateReport, gate_report, require_folder, write_all
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.store import Artifact
    from llmc.artifact.verdict import Measurement


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
    previous: Path | None = None,
) -> GateReport:
    """Measure an artifact's latency interleaved with the original's, and hold the latency gates.

    Args:
        path: An artifact.
        against: The original; None for the one that the manifest names.
        force: Take an original that the artifact was not built from.
        folder: Where the report goes in all its forms; None for nowhere.
        previous: An earlier artifact, timed in turn with this one.

    Raises:
        ConfigError: `previous` is no artifact, or is damaged.
        ResourceError: An artifact is not for the CPU.
    """
    from llmc.artifact.store import check_files, open_artifact
    from llmc.pipeline.engines import require_no_engine
    from llmc.validate.gates import evaluate
    from llmc.validate.latency import Schedule, measure_latency, ratios
    from llmc.validate.reference import TorchModel
    from llmc.validate.session import shares_buffer

    if folder is not None:
        require_folder(folder)
    with progress.stage("artifact"):
        artifact, checkpoint, _ = open_pair(path, against, force=force)
        earlier = None if previous is None else open_artifact(previous)
        for each in (artifact, earlier):
            if each is not None:
                require_no_engine(each.manifest)
                _require_cpu(each)
                check_files(each)
    manifest = artifact.manifest
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
    measurements = (*ratios(latency), _against(earlier, artifact, tokens, progress))
    gate = GateResult(measurements, evaluate(latency_gates(manifest.target), measurements), latency)
    name = manifest.profile.name
    report = gate_report(checkpoint.ref, manifest.target, name, gate, manifest.weights, path)
    if folder is not None:
        write_all(report, folder)
    return GateReport(report=report)


def _require_cpu(artifact: Artifact) -> None:
    provider = artifact.manifest.target.provider
    if provider is not Provider.CPU:
        raise ResourceError(
            f"{artifact.path} is built for {provider.value.upper()}; its latency on the CPU says nothing",
            hint="llmc verify measures the numbers of its graph on the CPU",
        )


def _against(earlier: Artifact | None, artifact: Artifact, tokens: Any, progress: Progress) -> Measurement:
    from llmc.artifact.verdict import MeasurementStatus
    from llmc.validate.measure import unmeasured
    from llmc.validate.rival import CONTEXT, Pairing, measure_rival
    from llmc.validate.session import OrtModel, shares_buffer

    if earlier is None:
        status = MeasurementStatus.NOT_APPLICABLE
        return unmeasured(Metric.PREVIOUS_RATIO, status, "no earlier artifact was given", "nowhere")
    threads = artifact.manifest.profile.threads or os.cpu_count() or 1
    makers = [
        partial(OrtModel, a.path, a.manifest.interface, threads=threads, share_buffer=shares_buffer(a.path))
        for a in (artifact, earlier)
    ]
    limits = [a.manifest.interface.max_length for a in (artifact, earlier)]
    length = min(CONTEXT, *(n // 2 for n in limits if n is not None), len(tokens))
    with progress.stage("latency against the earlier artifact"):
        return measure_rival(makers[0], makers[1], tokens[:length], Pairing())
