"""Implement `llmc bench`: measure an artifact's latency beside the original's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.artifact.store.integrity import require_intact
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.backends import backend_of
from llmc.catalog import list_profiles
from llmc.config import Metric
from llmc.data import eval_text
from llmc.errors import ResourceError, first_lines
from llmc.machine import detect_profile
from llmc.pipeline.gate.parity import GateResult, latency_gates
from llmc.pipeline.gate.thresholds import choose_thresholds
from llmc.pipeline.result import GateReport, gate_report, require_folder, write_all
from llmc.pipeline.steps.original import open_pair, tokenize
from llmc.pipeline.steps.stored import require_graph
from llmc.profile import Profile, ProfileKind, find_profile
from llmc.progress import Progress
from llmc.runtime.failures import MEMORY_HINT, is_out_of_memory
from llmc.validate.gates import evaluate
from llmc.validate.measure import unmeasured
from llmc.validate.reference import TorchModel
from llmc.validate.roofline import streamed_weight_bytes

if TYPE_CHECKING:
    from llmc.artifact.manifest import Manifest
    from llmc.validate.latency import Timed


@dataclass(frozen=True)
class OriginalLoader:
    """The function that loads the original; picklable, so that a separate process can call it too.

    Args:
        ref: The checkpoint.
        dtype: Type in which it computes on the GPU; None for float32 on the CPU.
        adapter: Adapter to merge into it.
    """

    ref: str
    dtype: str | None = None
    adapter: str | None = None

    def __call__(self) -> Any:
        from llmc.checkpoint import open_checkpoint

        model: Any = open_checkpoint(self.ref, self.adapter).load_reference(None)
        if self.dtype is None:
            return model
        import torch

        try:
            return model.to("cuda", getattr(torch, self.dtype))
        except RuntimeError as error:
            raise ResourceError(
                f"PyTorch cannot move the original to the GPU in {self.dtype}: {first_lines(error)}",
                hint=MEMORY_HINT if is_out_of_memory(error) else "llmc doctor tells what the GPU needs",
            ) from error


def bench(
    path: Path,
    against: str | None,
    progress: Progress,
    *,
    force: bool = False,
    folder: Path | None = None,
    previous: Path | None = None,
    adapter: str | None = None,
    target: str | None = None,
    search: Path | None = None,
    own_gates: bool = False,
) -> GateReport:
    """Measure an artifact's latency interleaved with the original's, and check the latency gates.

    Args:
        path: An artifact.
        against: The original; None for the model that the manifest names.
        force: Accept an original that the artifact was not built from.
        folder: Folder for the report in all its formats; None to write none.
        previous: An earlier artifact, timed alternately with this one.
        adapter: As `open_pair`.
        target: As `verify`, for the latency gates.
        search: As `verify`.
        own_gates: As `verify`.

    Raises:
        ConfigError: `previous` is not an artifact, or is damaged.
        ResourceError: An artifact needs hardware that this machine does not have.
        ParityError: An artifact cannot be run, or its latency gates differ from those of its target.
    """
    from llmc.validate.latency import Schedule, measure_latency
    from llmc.validate.ratios import ratios

    if folder is not None:
        require_folder(folder)
    with progress.stage("artifact"):
        artifact, earlier = open_artifact(path), None if previous is None else open_artifact(previous)
        for each in filter(None, (artifact, earlier)):
            require_graph(each, "llmc bench times")
            require_intact(each)
        thresholds = choose_thresholds(artifact.manifest, target, search, own=own_gates, latency=True)
        thresholds.require()
        _, checkpoint, _ = open_pair(path, against, force=force, adapter=adapter)
        timed = _timed(artifact)
        rival = None if earlier is None else _timed(earlier)
    manifest = artifact.manifest
    with progress.stage("load the original"):
        tokens, _ = tokenize(checkpoint.tokenizer(), eval_text())
        merged = checkpoint.adapter.ref if checkpoint.adapter is not None else None
        load = OriginalLoader(checkpoint.ref, _original_dtype(manifest), merged)
        reference = TorchModel(load())
    with progress.stage("latency"):
        latency = measure_latency(
            timed,
            reference,
            load,
            tokens=tokens,
            profile=_host_profile(manifest),
            threads=_threads(manifest),
            schedule=Schedule(),
        )
    measurements = (*ratios(latency), _against(rival, timed, tokens, progress))
    gate = GateResult(measurements, evaluate(latency_gates(thresholds.target), measurements), latency)
    name = manifest.profile.name
    report = gate_report(checkpoint.ref, manifest.target, name, gate, manifest.pruned, manifest.weights, path)
    if folder is not None:
        write_all(report, folder)
    return GateReport(report=report)


def _timed(artifact: Artifact) -> Timed:
    """Return what is timed of an artifact on this machine: its engine, or its graph on the CPU.

    Raises:
        ResourceError: The artifact needs hardware that this machine does not have.
    """
    from llmc.validate.latency import Timed

    manifest = artifact.manifest
    executable = backend_of(manifest.target).executable(artifact)
    weights = (
        streamed_weight_bytes(artifact.path) if executable.weight_bytes is None else executable.weight_bytes
    )
    first, *others = executable.timed or (executable.open,)
    return Timed(
        first,
        executable.library,
        manifest.interface,
        weights,
        gpu=executable.gpu,
        rows=executable.rows,
        others=tuple(others),
    )


def _threads(manifest: Manifest) -> int:
    return manifest.profile.threads or os.cpu_count() or 1


def _host_profile(manifest: Manifest) -> Profile:
    """Return the profile whose bandwidth bounds the latency; on a GPU, the profile of the GPU that CUDA uses.

    A GPU that no profile lists has no bandwidth.
    """
    if manifest.target.hardware is not ProfileKind.GPU:
        return manifest.profile
    host = detect_profile()
    listed = (each.document for each in list_profiles())
    return find_profile(host.device, (manifest.profile, *manifest.also, *listed)) or host


def _original_dtype(manifest: Manifest) -> str | None:
    """Return the original's type on the GPU for comparison with an engine; None if PyTorch has no GPU."""
    import torch

    on_gpu = manifest.target.hardware is ProfileKind.GPU and torch.cuda.is_available()
    return manifest.target.dtype.value if on_gpu else None


def _against(earlier: Timed | None, timed: Timed, tokens: Any, progress: Progress) -> Measurement:
    from llmc.validate.rival import CONTEXT, Pairing, measure_rival

    if earlier is None:
        status = MeasurementStatus.NOT_APPLICABLE
        return unmeasured(Metric.PREVIOUS_RATIO, status, "no earlier artifact was given", "nowhere")
    limits = [side.interface.max_length for side in (timed, earlier)]
    length = min(CONTEXT, *(n // 2 for n in limits if n is not None), len(tokens))
    with progress.stage("latency against the earlier artifact"):
        return measure_rival(timed.open, earlier.open, tokens[:length], Pairing())
