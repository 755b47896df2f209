"""Compile a checkpoint to a lowered, quantized graph: the stations before a backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class
from llmc.arrays import Array
from llmc.artifact.manifest import Declined, PassRecord, WeightRecord
from llmc.artifact.provenance import code_digest, tool_versions
from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.backends import backend_of
from llmc.config import Dtype, Target
from llmc.errors import UnsupportedError
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.graph.weights import LazyWeight, Rows
from llmc.pipeline.steps.allocate import allocate_bits
from llmc.pipeline.steps.calibrate import look_for_overflow, observe, observe_cache
from llmc.pipeline.steps.context import limit_context
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.backends.base import Stage
    from llmc.checkpoint import Checkpoint
    from llmc.quantize.activations import Activations
    from llmc.quantize.place import QuantizedTensor
    from llmc.quantize.quantizer import FloatInput


#: Fields of a configuration that change nothing in a trace.
_NOT_TRACED = frozenset({"architectures", "dtype"})


@dataclass(frozen=True)
class Compiled:
    """A graph ready for its backend.

    Args:
        graph: The lowered and quantized graph, with lazy weights.
        passes: What each pass did.
        weights: How every matrix is stored.
        unread: Tensors of the checkpoint that the graph does not read.
        sources: Origin of each weight, by the name of its initializer before quantization.
        activations: Statistics of the original's activations; empty if none were collected.
        floats: Activations that stay in float despite their rule.
        smoothing: Divisors of the channels of activations, by the first of the weights that read the
            activation.
    """

    graph: Graph
    passes: tuple[PassReport, ...]
    weights: tuple[WeightRecord, ...]
    unread: tuple[str, ...]
    sources: Mapping[str, Rows]
    activations: Activations
    floats: tuple[FloatInput, ...] = ()
    smoothing: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """A graph after its target's passes, before quantization, with the fields of `Compiled` known by then."""

    graph: Graph
    passes: tuple[PassReport, ...]
    unread: tuple[str, ...]
    sources: Mapping[str, Rows]


def trace(checkpoint: Checkpoint, dtype: Dtype, progress: Progress) -> Graph:
    """Return the canonical graph of a checkpoint's model, without weight data, from the cache if possible."""
    from llmc.graph.serial import dump_graph, load_graph
    from llmc.trace import trace_model

    cache = StageCache(default_cache_folder() / "traces")
    key = trace_key(checkpoint.config, dtype)
    data = cache.get(key)
    if data is not None:
        progress.note("trace: unchanged model code and configuration, taken from the cache")
    else:
        data = dump_graph(trace_model(checkpoint.config, dtype))
        cache.put(key, data)
    return load_graph(data)  # also of a new trace: its attributes are rounded to float32 as in the cache


def trace_key(config: Any, dtype: Dtype) -> str:
    """Compute the cache key of a trace: configuration, type, versions of tracing tools, and llmc's code.

    The type that weights are stored in is left out, since `dtype` replaces it, and the names of classes in
    `architectures`, since a trace depends only on the class that is built.
    """
    fields = json.loads(config.to_json_string(use_diff=False))
    facts = {
        "config": {name: value for name, value in fields.items() if name not in _NOT_TRACED},
        "architecture": [type(config).__name__, auto_class(config).__name__],
        "dtype": dtype.value,
        "tools": tool_versions(),
        "code": code_digest("llmc.architecture", "llmc.trace", "llmc.graph"),
    }
    return content_key("trace", facts)


def lower_graph(checkpoint: Checkpoint, target: Target, progress: Progress) -> Lowered:
    """Trace, bind and lower a model.

    Raises:
        UnsupportedError: The model cannot be traced, or a pass misses what the target asserts.
        CheckpointError: The checkpoint lacks a tensor that the model needs.
    """
    from llmc.graph.verify import verify_graph
    from llmc.passes import resolve_passes, run_passes

    resolve_passes(target.passes)  # a misspelt pass fails before the trace, not after
    with progress.stage("trace"):
        graph = trace(checkpoint, target.dtype, progress)
        limit = limit_context(graph, checkpoint.config, target)
        for note in (*graph.notes, *(() if limit is None else (limit,))):
            progress.note(f"trace: {note}")
        unread = graph.bind(checkpoint.tensors, checkpoint.tied)
        capacity = backend_of(target).capacity(target)
        if capacity is not None:
            fix_length(graph, capacity, limit)
        verify_graph(graph)
    with progress.stage("passes"):
        traced = len(graph.notes)
        reports = run_passes(graph, target.passes)
        for note in graph.notes[traced:]:
            progress.note(f"passes: {note}")
    return Lowered(graph, tuple(reports), unread, graph_sources(graph))


def compile_graph(checkpoint: Checkpoint, target: Target, stage: Stage, progress: Progress) -> Compiled:
    """Trace, bind, lower and quantize a model.

    Args:
        stage: The backend's part of the build, which may refuse the lowered graph.

    Raises:
        UnsupportedError: As `lower_graph`; `stage` refuses the graph; or a rule quantizes a weight that is
            not a tensor of the checkpoint.
        CheckpointError: The checkpoint lacks a tensor that the model needs.
    """
    from llmc.graph.verify import verify_graph
    from llmc.quantize.activations import Activations
    from llmc.quantize.cache_scales import mark_cache
    from llmc.quantize.fold import describe_scaling, scale_graph

    lowered = lower_graph(checkpoint, target, progress)
    graph = lowered.graph
    stage.require_graph(graph, checkpoint)
    quantizer = backend_of(target).quantizer(target)
    peaks = Activations()
    if not quantizer.observes_inputs:
        peaks = look_for_overflow(checkpoint, target.dtype, progress)
    if quantizer.unsolved is not None:
        with progress.stage("allocate"):
            joined = backend_of(target).joined_products(graph)
            rules = allocate_bits(checkpoint, graph, quantizer.unsolved, target.dtype, progress, joined)
            quantizer = quantizer.solved(rules)
    observed = observe(checkpoint, graph, quantizer, target.dtype, progress)
    if target.cache_text is not None:
        mark_cache(graph, checkpoint.config, observe_cache(checkpoint, target.cache_text, progress))
    with progress.stage("quantize"):
        scale_graph(graph, observed.smoothing)
        if observed.smoothing:
            progress.note(f"quantize: {describe_scaling(len(observed.smoothing))}")
        sources = graph_sources(graph)
        quantized = quantizer.apply(graph, observed)
        for note in quantized.notes:
            progress.note(f"quantize: {note}")
        verify_graph(graph)
    return Compiled(
        graph=graph,
        passes=lowered.passes,
        weights=weight_records(quantized.tensors, target.dtype),
        unread=lowered.unread,
        sources=sources,
        activations=peaks if observed.inputs is None else observed.inputs,
        floats=quantized.floats,
        smoothing=observed.smoothing,
    )


def graph_sources(graph: Graph) -> dict[str, Rows]:
    """Return the rows of every weight that a node reads."""
    sources: dict[str, Rows] = {}
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, LazyWeight) and tensor.rows is not None and value.uses():
            sources[str(value.name)] = tensor.rows
    return sources


def fix_length(graph: Graph, capacity: int, limit: str | None = None) -> None:
    """Give the KV cache its fixed number of slots.

    Args:
        limit: Why the model has fewer positions than its configuration states.

    Raises:
        UnsupportedError: The model has fewer positions.
    """
    if graph.max_length is not None and capacity > graph.max_length:
        fact = limit or f"the model has {graph.max_length} positions"
        raise UnsupportedError(
            f"the target's kv_capacity is {capacity}, but {fact}",
            hint=f"copy the target and set kv_capacity to {graph.max_length} or less",
        )
    graph.max_length = capacity


def weight_records(tensors: Sequence[QuantizedTensor], dtype: Dtype) -> tuple[WeightRecord, ...]:
    """Describe how every matrix is stored, as recorded in the manifest."""
    float_bits = 32 if dtype is Dtype.FLOAT32 else 16
    return tuple(
        WeightRecord(
            name=tensor.name,
            role=tensor.role,
            shape=tensor.shape,
            bits=tensor.scheme.bits if tensor.scheme else float_bits,
            block_size=tensor.scheme.block_size if tensor.scheme else None,
            symmetric=tensor.scheme.symmetric if tensor.scheme else None,
            bytes=tensor.bytes,
            origin=tensor.origin,
        )
        for tensor in tensors
    )


def pass_records(reports: Sequence[PassReport]) -> tuple[Any, ...]:
    """Convert reports to records of the manifest: refusals counted by code, with one example each."""
    records = []
    for report in reports:
        by_code: dict[str, list[Any]] = {}
        for refusal in report.refusals:
            by_code.setdefault(refusal.code, []).append(refusal)
        declined = tuple(
            Declined(
                code=code,
                reason=group[0].reason,
                node=group[0].node,
                count=len(group),
                layers=tuple(sorted({refusal.layer for refusal in group if refusal.layer is not None})),
            )
            for code, group in sorted(by_code.items())
        )
        records.append(PassRecord(name=report.name, applied=len(report.applied), declined=declined))
    return tuple(records)
