"""Implement `llmc inspect`: describe the contents of an artifact or a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from llmc.artifact.engine import EnginePhase, EngineRecord
from llmc.artifact.manifest import MANIFEST, MODEL, AdapterRecord, PassRecord, PruneRecord, WeightRecord
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.artifact.store.integrity import find_damage
from llmc.artifact.text import TextRecord
from llmc.backends import backend_of
from llmc.config import Dtype
from llmc.errors import LlmcError
from llmc.graph.interface import Interface
from llmc.pipeline.steps.compile import trace
from llmc.progress import SilentProgress
from llmc.records import Record


class Inspection(Record):
    """The contents of an artifact or a model.

    Args:
        kind: Artifact, or the canonical graph of a model.
        operators: Number of nodes by operator, `domain::name` outside of the standard domain; empty for a
            checkpoint, and for a damaged artifact, whose graph is not read.
        adapter: The adapter that was merged into the model; None if there is none.
        pruned: What was pruned from the model; None if nothing was.
        passes: What each pass did; empty for a model.
        weights: How every matrix is stored; empty for a model.
        engines: TensorRT engines, built and pending; empty for a model.
        files: Size of every file in bytes; empty for a model.
        damage: How the files differ from the manifest, one sentence each; empty for a model.
        bits_per_weight: Stored bits divided by matrix elements; None for a model.
        text: How an artifact turns text into tokens; None for a model.
        notes: Notes for the reader: on tracing for a model, on text for an artifact.
    """

    kind: Literal["artifact", "model"]
    architecture: str
    state: str | None
    interface: Interface
    adapter: AdapterRecord | None = None
    pruned: PruneRecord | None = None
    text: TextRecord | None = None
    operators: dict[str, int]
    passes: tuple[PassRecord, ...]
    weights: tuple[WeightRecord, ...]
    engines: tuple[EngineRecord, ...]
    files: dict[str, int]
    damage: tuple[str, ...] = ()
    bits_per_weight: float | None
    notes: tuple[str, ...]

    def render(self) -> str:
        """Return text for a terminal."""
        lines = [f"{self.architecture} ({self.state or self.kind})"]
        lines += [f"DAMAGED, does not match the manifest: {wrong}" for wrong in self.damage]
        lines += [each.render() for each in (self.adapter, self.pruned) if each is not None]
        if self.operators:
            lines += ["", "operators"]
        lines += [f"  {count:6}  {name}" for name, count in self.operators.items()]
        if self.passes:
            lines += ["", "passes"]
        for record in self.passes:
            lines.append(f"  {record.applied:6}  {record.name}")
            lines += [f"          declined {d.count}: {d.reason} [{d.code}]" for d in record.declined]
        if self.weights:
            lines += ["", f"weights, {self.bits_per_weight:.2f} bits each with scales and zero points"]
            lines += [
                f"  {w.bits:2} bits  {w.bytes / 1e6:9.2f} MB  {w.role.value:9}  {w.name}"
                + (f"; codes of the checkpoint: {w.origin}" if w.origin else "")
                for w in self.weights
            ]
        engines = [line for engine in self.engines for line in _render_engine(engine)]
        if engines:
            lines += ["", "engines", *engines]
        if self.files:
            lines += ["", "files", *(f"  {size / 1e6:9.2f} MB  {name}" for name, size in self.files.items())]
        return "\n".join([*lines, *self.notes])

    def failure(self) -> LlmcError | None:
        """Return None: an inspection cannot fail."""
        return None


def inspect(reference: str) -> Inspection:
    """Describe an artifact by its manifest and graph, or a model by its canonical graph.

    Args:
        reference: Folder of an artifact, or a model as for `build`.
    """
    if (Path(reference) / MANIFEST).is_file():
        return _inspect_artifact(Path(reference))
    return _inspect_model(reference)


def _inspect_artifact(path: Path) -> Inspection:
    artifact = open_artifact(path)
    manifest, damage = artifact.manifest, find_damage(artifact, remember=True)
    elements = sum(_product(w.shape) for w in manifest.weights)
    unfinished = [] if manifest.unfinished is None else [f"{manifest.unfinished}; llmc verify continues it"]
    return Inspection(
        kind="artifact",
        architecture=manifest.model.architecture,
        state=manifest.state.value,
        interface=manifest.interface,
        adapter=manifest.model.adapter,
        pruned=manifest.pruned,
        text=manifest.text,
        operators={} if damage.all else count_operators(artifact),
        damage=damage.all,
        passes=manifest.passes,
        weights=manifest.weights,
        engines=manifest.engines,
        files={name: f.bytes for name, f in manifest.files.items()},
        bits_per_weight=8 * sum(w.bytes for w in manifest.weights) / elements if elements else None,
        notes=(*manifest.model.notes, *manifest.text.describe(), *unfinished),
    )


def _inspect_model(reference: str) -> Inspection:
    from llmc.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(reference)
    graph = trace(checkpoint, Dtype.FLOAT32, SilentProgress())
    return Inspection(
        kind="model",
        architecture=checkpoint.architecture,
        state=None,
        interface=graph.interface(),
        operators=_count(graph.model),
        passes=(),
        weights=(),
        engines=(),
        files={},
        bits_per_weight=None,
        notes=tuple(graph.notes),
    )


def count_operators(artifact: Artifact) -> dict[str, int]:
    """Count the operators of an artifact's graph by name, the most frequent first; a checkpoint has none."""
    if not backend_of(artifact.manifest.target).writes_graph:
        return {}
    return _count(ir.load(artifact.path / MODEL))


def _render_engine(engine: EngineRecord) -> list[str]:
    """Describe an engine's purpose and contents, and each of its phases on a line."""
    where = f"{', '.join(engine.sms)} ({', '.join(engine.profiles)})"
    if engine.file is None:
        return [f"  {where}: pending, built by {engine.library} on its GPU"]
    weights = f", {engine.weight_bytes / 1e6:.1f} MB of weights" if engine.weight_bytes else ""
    weights += ", kernels for 2:4 sparse weights allowed" if engine.sparse_weights else ""
    products = [f"{count} products from {kind}" for kind, count in sorted(engine.quantized_products.items())]
    head = f"  {engine.file}: {where}, {engine.library} {engine.version}{weights}"
    return [
        ", ".join([head, *products]),
        *(f"    {phase.name:7}  {', '.join(_render_phase(phase))}" for phase in engine.phases),
        *([f"    in doubt: {engine.doubt}"] if engine.doubt else []),
        *(
            [f"    {engine.context}  for ONNX Runtime, experimental: never executed"]
            if engine.context
            else []
        ),
    ]


def _render_phase(phase: EnginePhase) -> Iterator[str]:
    """Yield what is known of an optimization profile."""
    if phase.layers is not None:
        yield f"{phase.layers} layers, {phase.layers_per_decoder_layer} per decoder layer"
    if phase.fused_attention is not None:
        yield f"{phase.fused_attention} fused attention"
    scratch = phase.scratch_bytes
    yield "scratch memory not stated" if scratch is None else f"{scratch / 1e6:.1f} MB of scratch"


def _count(model: ir.Model) -> dict[str, int]:
    counter = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph)
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count
