"""From a checkpoint to a lowered, quantized graph: the stations before a backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.config import Dtype, Quantization, Target, WeightFormat
from llmc.errors import UnsupportedError
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.progress import Progress

if TYPE_CHECKING:
    from llmc.artifact.manifest import WeightRecord
    from llmc.checkpoint import Checkpoint
    from llmc.quantize.engine import EngineTensor
    from llmc.quantize.linear import QuantizationReport


@dataclass(frozen=True)
class Compiled:
    """A graph ready for its backend.

    Args:
        graph: Lowered and quantized, its weights still lazy.
        passes: What each pass did.
        weights: How every matrix is stored.
        leftovers: Tensors of the checkpoint that nothing in the graph reads.
    """

    graph: Graph
    passes: tuple[PassReport, ...]
    weights: tuple[WeightRecord, ...]
    leftovers: tuple[str, ...]


def trace(checkpoint: Checkpoint, dtype: Dtype, progress: Progress) -> Graph:
    """The canonical graph of a checkpoint's model, without weight data, from the cache where it is known."""
    from llmc.artifact.cache import StageCache, default_cache_folder
    from llmc.graph.serial import dump_graph, load_graph
    from llmc.trace import trace_model

    cache = StageCache(default_cache_folder())
    key = trace_key(checkpoint.config, dtype)
    known = cache.get(key)
    if known is not None:
        progress.note("trace: unchanged model code and configuration, taken from the cache")
        return load_graph(known)
    graph = trace_model(checkpoint.config, dtype)
    cache.put(key, dump_graph(graph))
    return graph


def trace_key(config: Any, dtype: Dtype) -> str:
    """Cache key of a trace: configuration, type, the versions of everything that traces, and our own code."""
    from llmc.artifact.cache import content_key
    from llmc.artifact.provenance import tool_versions

    facts = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "architecture": type(config).__name__,
        "dtype": dtype.value,
        "tools": tool_versions(),
        "code": _own_code(),
    }
    return content_key("trace", facts)


@cache
def _own_code() -> str:
    digest = hashlib.sha256()
    for package in ("llmc.trace", "llmc.graph"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob("*.py")):
                digest.update(file.name.encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def compile_graph(checkpoint: Checkpoint, target: Target, progress: Progress) -> Compiled:
    """Trace, bind, lower and quantize.

    Raises:
        UnsupportedError: The model cannot be traced, or a pass misses what the target asserts.
        CheckpointError: The checkpoint lacks a tensor that the model needs.
    """
    from llmc.graph.verify import verify
    from llmc.passes import resolve_passes, run_passes
    from llmc.quantize.engine import quantize_for_engine
    from llmc.quantize.linear import quantize_weights

    resolve_passes(target.passes)  # a misspelt pass fails before the trace, not after
    with progress.stage("trace"):
        graph = trace(checkpoint, target.dtype, progress)
        for note in graph.notes:
            progress.note(f"trace: {note}")
        leftovers = graph.bind(checkpoint.tensors, checkpoint.tied)
        if target.engine is not None:
            fix_length(graph, target.engine.kv_capacity)
        verify(graph)
    with progress.stage("passes"):
        reports = run_passes(graph, target.passes)
    with progress.stage("quantize"):
        if target.engine is not None:
            records = engine_records(quantize_for_engine(graph, target.engine.weights), target.dtype)
        else:
            rules = target.quantize or Quantization(accuracy_level=0, rules=())
            records = weight_records(quantize_weights(graph, rules, target.dtype), target.dtype)
        verify(graph)
    return Compiled(graph, tuple(reports), records, leftovers)


def fix_length(graph: Graph, capacity: int) -> None:
    """Give the KV cache its fixed number of slots.

    Raises:
        UnsupportedError: The model has fewer positions.
    """
    if graph.max_length is not None and capacity > graph.max_length:
        raise UnsupportedError(
            f"the target's kv_capacity is {capacity}, and the model has {graph.max_length} positions",
            hint=f"copy the target and set kv_capacity to {graph.max_length} or less",
        )
    graph.max_length = capacity


def weight_records(report: QuantizationReport, dtype: Dtype) -> tuple[WeightRecord, ...]:
    """How every matrix is stored, as the manifest keeps it."""
    from llmc.artifact.manifest import WeightRecord

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
        )
        for tensor in report.tensors
    )


def engine_records(tensors: Sequence[EngineTensor], dtype: Dtype) -> tuple[WeightRecord, ...]:
    """How every matrix of an engine's graph is stored, as the manifest keeps it."""
    from llmc.artifact.manifest import WeightRecord

    float_bits = 32 if dtype is Dtype.FLOAT32 else 16
    bits = {WeightFormat.INT4: 4, WeightFormat.NVFP4: 4, WeightFormat.INT8: 8, WeightFormat.FP8: 8}
    return tuple(
        WeightRecord(
            name=tensor.name,
            role=tensor.role,
            shape=tensor.shape,
            bits=bits[tensor.scheme.format] if tensor.scheme else float_bits,
            block_size=tensor.scheme.block_size if tensor.scheme else None,
            symmetric=True if tensor.scheme else None,
            bytes=tensor.bytes,
        )
        for tensor in tensors
    )


def pass_records(reports: Sequence[PassReport]) -> tuple[Any, ...]:
    """Reports as the manifest keeps them: refusals of one code counted, with one example each."""
    from llmc.artifact.manifest import Declined, PassRecord

    records = []
    for report in reports:
        by_code: dict[str, list[Any]] = {}
        for refusal in report.refusals:
            by_code.setdefault(refusal.code, []).append(refusal)
        declined = tuple(
            Declined(code=code, reason=group[0].reason, node=group[0].node, count=len(group))
            for code, group in sorted(by_code.items())
        )
        records.append(PassRecord(name=report.name, applied=len(report.applied), declined=declined))
    return tuple(records)
