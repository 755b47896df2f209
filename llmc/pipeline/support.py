"""Implement `llmc inspect --support`: what each target makes of a model, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.artifact.manifest import PassRecord
from llmc.backends import backend_of
from llmc.config import Dtype, Target
from llmc.errors import LlmcError, ResourceError, UnsupportedError, number_ranges
from llmc.graph.domains import COMPILED, DIALECT
from llmc.graph.model import Graph, layer_of
from llmc.graph.recurrence import is_recurrence
from llmc.pipeline.steps.compile import lower_graph, pass_records, trace
from llmc.progress import Progress, SilentProgress
from llmc.records import Record

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint

#: Standard operators that move data, or change its type or shape.
_MOVING = {
    "Cast", "CastLike", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Reshape", "Shape",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


class GraphPart(Record):
    """Equal parts of a graph.

    Args:
        name: What they are, such as `cached attention, window 512` or `GroupQueryAttention`.
        count: Number of nodes.
        layers: Decoder layers that have one, ascending; empty outside of the layers.
    """

    name: str
    count: int
    layers: tuple[int, ...]

    def render(self) -> str:
        """Return a line for a terminal."""
        return f"  {self.count:5}  {self.name}, {_where(self.layers) or 'outside of the layers'}"


class TargetSupport(Record):
    """What a target makes of a model.

    Args:
        refused: Why it cannot be built; None if it can.
        advice: What to do about that.
        operators: Operators that passes and quantization chose: they are not in the traced graph. Those that
            only move data or compute indices are left out.
        plain: Captured parts that no operator of the target computes: they stay functions over standard
            operators. Empty where only quantized weights can be compiled, and a build has yet to choose bits.
        passes: What each pass did, and where it declined.
        notes: What the backend says of the graph.
    """

    target: str
    refused: str | None = None
    advice: str | None = None
    operators: tuple[GraphPart, ...] = ()
    plain: tuple[GraphPart, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    notes: tuple[str, ...] = ()

    def render(self) -> list[str]:
        """Return lines for a terminal, without the target's name."""
        lines = [f"  {line}" for line in (self.refused, self.advice) if line is not None]
        lines += [part.render() for part in self.operators]
        lines += [f"{part.render()}: in plain operators" for part in self.plain]
        for record in self.passes:
            for d in record.declined:
                where = f"{d.count}, {_where(d.layers)}" if d.layers else str(d.count)
                lines.append(f"  {record.name} declines {where}: {d.reason} [{d.code}]")
        return [*lines, *(f"  {note}" for note in self.notes)]


class Support(Record):
    """What llmc makes of a model.

    Args:
        layers: Number of decoder layers.
        captured: Parts that are traced as one operator each.
        uncaptured: Decoder layers without any such part.
        notes: What was traced otherwise or left out.
        targets: What each target makes of it.
    """

    architecture: str
    layers: int
    captured: tuple[GraphPart, ...]
    uncaptured: tuple[int, ...]
    notes: tuple[str, ...]
    targets: tuple[TargetSupport, ...]

    def render(self) -> str:
        """Return text for a terminal."""
        lines = [f"{self.architecture}, {self.layers} layers"]
        lines += [f"{part.render()}: captured" for part in self.captured]
        if self.uncaptured:
            lines.append(f"         {_where(self.uncaptured)}: in plain operators")
        lines += [f"  {note}" for note in self.notes]
        alike: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        for each in self.targets:
            alike.setdefault((each.refused is None, tuple(each.render())), []).append(each.target)
        for (possible, described), names in alike.items():
            lines += ["", f"{', '.join(names)}: {'can be built' if possible else 'refused'}", *described]
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return an error if no target can be built."""
        if any(each.refused is None for each in self.targets):
            return None
        names = ", ".join(each.target for each in self.targets)
        return UnsupportedError(
            f"{self.architecture} cannot be built for {names}", hint="the reason stands above for each target"
        )


def support(reference: str, targets: Sequence[Target], progress: Progress) -> Support:
    """Trace and lower a model for every target; reads no matrices, writes no artifact.

    Raises:
        UnsupportedError: No target can take the model; the message gives the reason.
        CheckpointError: The checkpoint cannot be opened, or lacks a tensor.
    """
    from llmc.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(reference)
    with progress.stage("trace"):
        graph = trace(checkpoint, targets[0].dtype if targets else Dtype.FLOAT32, SilentProgress())
        captured = _parts(node for node in graph.graph if node.domain == DIALECT)
        traced = frozenset((node.domain, node.op_type) for node in graph.graph)
        covered = {layer for part in captured for layer in part.layers}
        left_out = checkpoint.text_only_note(graph.bind(checkpoint.tensors, checkpoint.tied))
    found = []
    for target in targets:
        with progress.stage(target.name):
            found.append(_ask(checkpoint, target, traced))
    return Support(
        architecture=checkpoint.architecture,
        layers=graph.layers,
        captured=captured,
        uncaptured=tuple(sorted(set(range(graph.layers)) - covered)),
        notes=(*graph.notes, *checkpoint.notes, *([left_out] if left_out else [])),
        targets=tuple(found),
    )


def _ask(checkpoint: Checkpoint, target: Target, traced: frozenset[tuple[str, str]]) -> TargetSupport:
    """Lower the model for one target as a build does, and collect what passes and backend say.

    Args:
        traced: Operators of the traced graph, by domain and name.
    """
    from llmc.quantize.quantizer import Observations

    backend = backend_of(target)
    quantizer = backend.quantizer(target)
    try:
        lowered = lower_graph(checkpoint, target, SilentProgress())
        graph = lowered.graph
        notes: list[str] = []
        if quantizer.unsolved is None:
            notes += quantizer.apply(graph, Observations()).notes
            notes += backend.describe_lowered(backend.lower(graph, target))
        else:
            notes.append("before quantization: a build measures the model to choose the bits of each matrix")
        _require_serving(checkpoint, target, graph)
    except UnsupportedError as error:
        return TargetSupport(target=target.name, refused=error.fact, advice=error.hint)
    try:
        refusals = backend.refused_nodes(target, graph)
    except ResourceError as error:
        refusals = ()
        notes.append(f"its operators were not checked: {error.fact}")
    chosen = [node for node in graph.graph if (node.domain, node.op_type) not in traced]
    undecided = quantizer.unsolved is not None and backend.compiles_dialect
    return TargetSupport(
        target=target.name,
        refused="; ".join(refusals) if refusals else None,
        operators=_parts(node for node in chosen if _computes(node)),
        plain=() if undecided else _parts(node for node in graph.graph if node.domain == DIALECT),
        passes=pass_records(lowered.passes),
        notes=tuple(notes),
    )


def _require_serving(checkpoint: Checkpoint, target: Target, graph: Graph) -> None:
    """Check that the target's runtime feeds the inputs of the graph.

    Raises:
        UnsupportedError: It does not.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint.save_tokenizer(folder)
        settings = checkpoint.generation_config()
        backend_of(target).write_serving(folder, target, None, checkpoint, settings, graph)


def _parts(nodes: Iterable[ir.Node]) -> tuple[GraphPart, ...]:
    """Group nodes by what they are, in the order of their first."""
    groups: dict[str, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(_name(node), []).append(node)
    return tuple(
        GraphPart(
            name=name,
            count=len(group),
            layers=tuple(sorted({layer for node in group if (layer := layer_of(node)) is not None})),
        )
        for name, group in groups.items()
    )


def _computes(node: ir.Node) -> bool:
    """Return whether a node computes with activations, rather than move them or compute indices."""
    if not node.domain and node.op_type in _MOVING:
        return False
    return not all(
        output.dtype is ir.DataType.BOOL or (output.dtype is not None and output.dtype.is_integer())
        for output in node.outputs
    )


def _where(layers: Sequence[int]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {number_ranges(layers)}" if layers else ""


def _name(node: ir.Node) -> str:
    """Return what a node is, with the attributes that make it another kind of layer."""
    if node.domain == COMPILED:
        return "compiled region"
    if is_recurrence(node):
        return "recurrence, token by token"
    name = node.op_type
    if node.domain == DIALECT:
        name = re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()
    window = node.attributes.get("window") or node.attributes.get("local_window_size")
    size = window.as_int() if window is not None else 0
    return f"{name}, window {size}" if size > 0 else name
