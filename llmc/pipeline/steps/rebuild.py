"""Repeat a build up to its graph and weights, to compare them with those of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__
from llmc.artifact.provenance import tool_versions
from llmc.backends import backend_of
from llmc.config import Target
from llmc.pipeline.steps.calibrate import recall, recall_cache
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

#: Why nodes cannot be compared if activations are quantized on calibration text.
UNKNOWN_INPUTS = "the results of calibrating activations are not in the cache"
#: Tools that determine the nodes of a graph, by their names in manifests.
_SHAPING = ("llmc", "torch", "transformers", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Rebuilt:
    """The result of a build for a checkpoint and a target.

    Args:
        graph: As a backend writes it, with lazy weights.
        sources: Origin of each weight, by the name of its initializer before quantization.
        calibrated: Names in `sources` of matrices whose codes are unknown here, such as matrices quantized on
            calibration text whose results are not cached.
        complete: Whether the nodes are known too; they are not if calibration decides on activations.
        cache_known: Whether the scales of the KV cache are known, if the artifact has any.
        lowered: The result of the backend's `lower`, such as the program of compiled kernels.
        smoothing: Divisors of the channels of activations, if the calibration is cached.
        records: How every matrix is stored, as recorded in the manifest.
        passes: What each pass did, as recorded in the manifest.
    """

    graph: Graph
    sources: Mapping[str, Rows]
    calibrated: frozenset[str] = frozenset()
    complete: bool = True
    cache_known: bool = True
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
    """Lower and quantize a checkpoint as the build of the artifact in `folder` did, without reading weights.

    Args:
        checkpoint: The checkpoint that was compiled.
        records: How the artifact stores each matrix; decides the bits if the target allocates them.

    Raises:
        UnsupportedError: As `compile_graph`.
        CheckpointError: As `compile_graph`.
        ParityError: The artifact's record of the changes to its weights cannot be read.
    """
    from llmc.quantize.activations import read_ranges, read_smoothing
    from llmc.quantize.cache_scales import mark_cache
    from llmc.quantize.fold import scale_graph

    lowered = lower_graph(checkpoint, target, progress)
    graph, backend = lowered.graph, backend_of(target)
    with progress.stage("quantize"):
        quantizer = backend.quantizer(target).restated(records)
        weight_needs, input_needs = quantizer.weight_needs(graph), quantizer.input_needs(graph)
        observed = recall(checkpoint, weight_needs, input_needs)
        calibrated: frozenset[str] = frozenset()
        if weight_needs is not None and observed.weights is None:
            calibrated = frozenset(quantizer.calibrated(graph, weight_needs))
        recalled = observed.weights is not None or observed.inputs is not None
        if input_needs is not None and observed.inputs is None and not backend.writes_graph:
            observed = replace(observed, inputs=read_ranges(folder))
        if quantizer.scales_channels:
            scale_graph(graph, observed.smoothing if recalled else read_smoothing(folder))
        sources = graph_sources(graph)
        peaks = None if target.cache_text is None else recall_cache(checkpoint, target.cache_text)
        if target.cache_text is not None:
            mark_cache(graph, checkpoint.config, peaks)
        tensors = quantizer.apply(graph, observed).tensors
        program = backend.lower(graph, target)
    return Rebuilt(
        graph,
        sources,
        calibrated,
        complete=input_needs is None or observed.inputs is not None,
        cache_known=target.cache_text is None or peaks is not None,
        lowered=program,
        smoothing=observed.smoothing if recalled and quantizer.scales_channels else None,
        records=weight_records(tensors, target.dtype),
        passes=pass_records(lowered.passes),
    )


def explain_versions(manifest: Manifest) -> str | None:
    """Explain why a build here may give other files than the artifact's; None if it gives the same."""
    here = {"llmc": __version__, **tool_versions()}
    there = {"llmc": manifest.llmc_version, **manifest.tools}
    for name in _SHAPING:
        if here.get(name) != there.get(name):
            return f"it was built with {name} {there.get(name)}, but {here.get(name)} is installed"
    return None


def forget_searches(rebuilt: Rebuilt, manifest: Manifest) -> Rebuilt:
    """Mark codes as unknown if their last digits depend on the machine and the artifact is from another one.

    Scales are searched with sums of float32 numbers, whose order depends on the version of NumPy and on the
    machine's instruction set.
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
