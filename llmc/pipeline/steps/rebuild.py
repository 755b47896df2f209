"""What a build makes of a checkpoint, once more: the graph and the weights that an artifact must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmc import __version__
from llmc.artifact.provenance import tool_versions
from llmc.config import Backend, CacheType, Engine, Quantization, Target, WeightRole, WeightRule, WeightScheme
from llmc.pipeline.steps.calibrate import recall_activations, recall_calibration
from llmc.pipeline.steps.compile import (
    graph_sources,
    lower_graph,
    pass_records,
    scales_channels,
    weight_records,
)
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.arrays import Array
    from llmc.artifact.manifest import Manifest, PassRecord, WeightRecord
    from llmc.backends.compiled.lower import KernelSource
    from llmc.checkpoint import Checkpoint
    from llmc.graph.model import Graph
    from llmc.graph.weights import Rows
    from llmc.quantize.calibrate import Calibration

Made = TypeVar("Made")
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
        kernels: The program of compiled kernels; None for targets without.
        smoothing: What channels of activations were divided by, where calibration is in the cache.
        records: How every matrix is stored, as the manifest keeps it.
        passes: What each pass did, likewise.
    """

    graph: Graph
    sources: Mapping[str, Rows]
    calibrated: frozenset[str] = frozenset()
    complete: bool = True
    kernels: KernelSource | None = None
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
    lowered = lower_graph(checkpoint, target, progress)
    with progress.stage("quantize"):
        if target.engine is not None:
            made = _for_engine(checkpoint, lowered.graph, target, target.engine, folder)
        else:
            made = _for_runtime(checkpoint, lowered.graph, target, records, folder)
    return replace(made, passes=pass_records(lowered.passes))


def finish_graph(graph: Graph, target: Target, kernels: Callable[[Graph], Made] | None) -> Made | None:
    """Bring a quantized graph into the form that its backend writes.

    Args:
        kernels: Puts operators of compiled kernels into the graph; None for targets without.

    Returns:
        What `kernels` gives.
    """
    from llmc.backends.onnxruntime.minimums import split_minimums
    from llmc.backends.onnxruntime.rotary_tables import compute_tables, find_pairs

    if target.backend is not Backend.ONNXRUNTIME:
        return None
    tables = find_pairs(graph)
    made = None if kernels is None else kernels(graph)
    split_minimums(graph)
    compute_tables(graph, tables)
    return made


def _for_runtime(
    checkpoint: Checkpoint, graph: Graph, target: Target, records: Sequence[WeightRecord], folder: Path
) -> Rebuilt:
    from llmc.backends.compiled.lower import lower_kernels
    from llmc.quantize.activations import read_smoothing
    from llmc.quantize.fold import scale_graph
    from llmc.quantize.linear import plan_calibration, plan_matrices, quantize_weights

    rules = restate_rules(target.quantize or Quantization(accuracy_level=0, rules=()), records)
    wanted = plan_calibration(graph, rules, target.dtype)
    known = _recall(checkpoint, graph, target, rules, wanted) if wanted else None
    calibrated = frozenset(
        plan.name
        for plan in plan_matrices(graph, rules, target.dtype)
        if known is None and wanted.keys() & set(plan.sources)
    )
    if scales_channels(target):
        scale_graph(graph, read_smoothing(folder) if known is None else known.smoothing)
    sources = graph_sources(graph)
    stored = quantize_weights(graph, rules, target.dtype, known)
    lower = partial(lower_kernels, cache=target.kv_cache or CacheType.FLOAT32)
    kernels = finish_graph(graph, target, lower if target.kernels == "compiled" else None)
    smoothing = known.smoothing if known is not None and scales_channels(target) else None
    made = weight_records(stored.tensors, target.dtype)
    return Rebuilt(graph, sources, calibrated, kernels=kernels, smoothing=smoothing, records=made)


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


def restate_rules(quantization: Quantization, records: Sequence[WeightRecord]) -> Quantization:
    """The rules with one more in front for each matrix that an allocation decided on, by the records."""
    from glob import escape

    wanted = quantization.allocation
    if wanted is None:
        return quantization
    schemes = [*wanted.choices, *(rule.scheme for rule in quantization.rules if rule.scheme is not None)]
    made = []
    for record in records:
        scheme = next((s for s in schemes if _fits(s, record)), None)
        if scheme is not None and record.role is not WeightRole.EXPERTS:
            made.append(WeightRule(match=escape(record.name), scheme=scheme))
    return quantization.model_copy(update={"rules": (*made, *quantization.rules), "allocation": None})


def _fits(scheme: WeightScheme, record: WeightRecord) -> bool:
    stated = (record.bits, record.block_size, record.symmetric)
    return stated == (scheme.bits, scheme.block_size, scheme.symmetric)


def _recall(
    checkpoint: Checkpoint,
    graph: Graph,
    target: Target,
    rules: Quantization,
    wanted: Mapping[str, WeightScheme],
) -> Calibration | None:
    from llmc.quantize.awq import plan_channels
    from llmc.quantize.linear import scale_type

    if rules.calibration is None:
        return None
    kind = scale_type(rules, target.dtype)
    channels = plan_channels(graph, wanted) if rules.scale_channels else ()
    return recall_calibration(checkpoint, rules.calibration, kind, wanted, channels)


def _for_engine(
    checkpoint: Checkpoint, graph: Graph, target: Target, engine: Engine, folder: Path
) -> Rebuilt:
    from llmc.quantize.activations import plan_inputs, read_smoothing
    from llmc.quantize.engine import quantize_for_engine
    from llmc.quantize.fold import scale_graph

    found = None
    if engine.calibration is not None:
        found = recall_activations(checkpoint, engine.calibration, plan_inputs(graph, engine.weights))
    if scales_channels(target):
        scale_graph(graph, read_smoothing(folder) if found is None else found.smoothing)
    sources = graph_sources(graph)
    ranges = None if found is None else found.ranges
    tensors, _ = quantize_for_engine(graph, engine.weights, ranges, engine.least_activation_db)
    complete = engine.calibration is None or found is not None
    smoothing = None if found is None else found.smoothing
    made = weight_records(tensors, target.dtype)
    return Rebuilt(graph, sources, complete=complete, smoothing=smoothing, records=made)
