"""What a build makes of a checkpoint, once more: the graph and the weights that an artifact must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__
from llmc.artifact.provenance import tool_versions
from llmc.backends import backend_of
from llmc.config import Target
from llmc.pipeline.steps.calibrate import recall
from llmc.pipeline.steps.compile import (
    graph_sources,
    lower_graph,
    pass_records,
    weight_records,
)
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.arrays import Array
    from llmc.artifact.manifest import Manifest, PassRecord, WeightRecord
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.graph.weights import Rows

#: Why nodes are not known where activations are quantized on calibration text.
UNKNOWN_INPUTS = "what calibration decided on activations is not in the cache"
#: What the nodes of a graph depend on, by the names of manifests.
_SHAPING = ("llmc", "torch", "transformers", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Rebuilt:
    """What a build gives for a checkpoint and a target.

    Args:
        graph: As a backend writes it, its weights still lazy.
        sources: What each weight is made of, by the name of its initializer before quantization.
        calibrated: Names in `sources` of matrices whose codes are not known here, such as those that were
            quantized on calibration text whose results are not in the cache.
        complete: Whether nodes are known too; they are not where calibration decides on activations.
        lowered: What the backend's `lower` gave, such as the program of compiled kernels.
        smoothing: What channels of activations were divided by, where calibration is in the cache.
        records: How every matrix is stored, as the manifest keeps it.
        passes: What each pass did, likewise.
    """

    graph: Graph
    sources: Mapping[str, Rows]
    calibrated: frozenset[str] = frozenset()
    complete: bool = True
    lowered: Any = None
    smoothing: Mapping[str, Array] | None = None
    records: tuple[WeightRecord, ...] = ()
    passes: tuple[PassRecord, ...] = ()


def rebuild(
    checkpoint: Checkpoint,
    target: Target,
    records: Sequence[WeightRecord],
    folder: Path,
    progress: Progress,
) -> Rebuilt:
    """Lower and quantize a checkpoint as the build of the artifact in `folder` did; no weight is read.

    Args:
        checkpoint: What was compiled.
        records: How the artifact stores each matrix, which decides where the target allocates bits.

    Raises:
        UnsupportedError: As `compile_graph`.
        CheckpointError: As `compile_graph`.
        ParityError: What the artifact says it did to its weights cannot be read.
    """
    from llmc.quantize.activations import read_smoothing
    from llmc.quantize.fold import scale_graph

    lowered = lower_graph(checkpoint, target, progress)
    graph, backend = lowered.graph, backend_of(target)
    with progress.stage("quantize"):
        quantizer = backend.quantizer(target).restated(records)
        observed = recall(checkpoint, graph, quantizer)
        weight_needs, input_needs = quantizer.weight_needs(graph), quantizer.input_needs(graph)
        calibrated: frozenset[str] = frozenset()
        if weight_needs is not None and observed.weights is None:
            calibrated = frozenset(quantizer.calibrated(graph, weight_needs))
        recalled = observed.weights is not None or observed.inputs is not None
        if quantizer.scales_channels:
            scale_graph(graph, observed.smoothing if recalled else read_smoothing(folder))
        sources = graph_sources(graph)
        tensors = quantizer.apply(graph, observed).tensors
        program = backend.lower(graph, target)
    return Rebuilt(
        graph,
        sources,
        calibrated,
        complete=input_needs is None or observed.inputs is not None,
        lowered=program,
        smoothing=observed.smoothing if recalled and quantizer.scales_channels else None,
        records=weight_records(tensors, target.dtype),
        passes=pass_records(lowered.passes),
    )


def explain_versions(manifest: Manifest) -> str | None:
    """Why a build here may give other files than those of an artifact; None where it gives the same."""
    here = {"llmc": __version__, **tool_versions()}
    there = {"llmc": manifest.llmc_version, **manifest.tools}
    for name in _SHAPING:
        if here.get(name) != there.get(name):
            return f"it was built with {name} {there.get(name)}, and {here.get(name)} is installed"
    return None


def forget_searches(rebuilt: Rebuilt, manifest: Manifest) -> Rebuilt:
    """Leave codes open whose last digits depend on the machine, where an artifact is from another one.

    Scales are searched by sums of float32 numbers, whose order depends on the release of NumPy and on the
    instructions of the machine.
    """
    from llmc.quantize.stored import KEPT

    here = {"llmc": __version__, **tool_versions()}
    there = {"llmc": manifest.llmc_version, **manifest.tools}
    if all(here.get(name) == there.get(name) for name in ("llmc", "numpy", "machine")):
        return rebuilt
    searched = {
        record.name
        for record in manifest.weights
        if record.block_size is not None
        and not (record.origin or "").startswith(KEPT)
        and record.name in rebuilt.sources
    }
    return replace(rebuilt, calibrated=rebuilt.calibrated | searched)
