"""Implement `llmc check`: list what TensorRT would refuse of a model, before any long work."""

from __future__ import annotations

from llmc.artifact.manifest import PassRecord
from llmc.backends import backend_of
from llmc.backends.tensorrt.nodes import NodeFinding
from llmc.config import BuildPlan
from llmc.errors import LlmcError, UnsupportedError, number_ranges
from llmc.graph.dialect import EXPERTS
from llmc.graph.domains import DIALECT
from llmc.graph.model import Graph, layer_of
from llmc.pipeline.steps.compile import lower_graph, pass_records
from llmc.progress import Progress
from llmc.records import Record


class Obstacle(Record):
    """A reason against the whole build: a GPU without the precision, or a model that cannot be lowered."""

    where: str
    reason: str
    advice: str | None


#: What it means that a part of the dialect is computed in standard operators.
_PLAIN = {EXPERTS: ": all experts are computed, not the chosen ones alone"}


class CheckResult(Record):
    """The result of a check.

    Args:
        asked: Library and version of the parser that was asked; None if no parser was.
        nodes: Number of nodes of the lowered graph.
        signatures: Number of distinct nodes.
        obstacles: Reasons against the whole build.
        refused: Nodes that TensorRT refuses.
        unknown: Nodes that cannot be submitted to the parser.
        plain: Captured parts that no operator of the target computes, such as all experts of a layer instead
            of the chosen ones: they are expanded to standard operators.
        passes: What each pass did, and where it declined with a code that the target accepts.
    """

    architecture: str
    target: str
    profiles: tuple[str, ...]
    asked: str | None
    nodes: int
    signatures: int
    obstacles: tuple[Obstacle, ...]
    refused: tuple[NodeFinding, ...]
    unknown: tuple[NodeFinding, ...]
    passes: tuple[PassRecord, ...]
    plain: tuple[str, ...] = ()

    def render(self) -> str:
        """Return text for a terminal."""
        lines = [f"{self.architecture} for {self.target} on {', '.join(self.profiles)}"]
        for obstacle in self.obstacles:
            lines += [f"{obstacle.where}: {obstacle.reason}"]
            lines += [f"  {obstacle.advice}"] if obstacle.advice else []
        if self.asked is not None:
            refused = sum(each.count for each in self.refused)
            lines.append(f"{self.nodes} nodes, {self.signatures} distinct: {refused} refused by {self.asked}")
        for each in self.refused:
            lines += _render(each)
        if self.unknown:
            lines.append("not checkable by the parser")
        for each in self.unknown:
            lines += _render(each)
        lines += [f"in plain operators: {each}" for each in self.plain]
        for record in self.passes:
            lines += [f"{record.name} declines {d.count}: {d.reason} [{d.code}]" for d in record.declined]
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return an error if anything is refused."""
        if not self.obstacles and not self.refused:
            return None
        refused = [each.where for each in self.obstacles]
        refused += [f"{each.count} x {each.operator}" for each in self.refused]
        return UnsupportedError(f"{self.target} cannot be built: {', '.join(refused)}")


def check(plan: BuildPlan, progress: Progress) -> CheckResult:
    """Lower a model for a target and ask TensorRT about every node; reads no weights, writes nothing.

    Pruning is not applied: only weights decide what is pruned, and pruning does not change the kinds of
    nodes.

    Raises:
        ConfigError: The target is not of backend tensorrt, or a profile states no compute capability.
        CheckpointError: The checkpoint cannot be opened, or lacks a tensor.
        ResourceError: tensorrt_rtx, which provides the parser, is missing.
    """
    from llmc.checkpoint import open_checkpoint
    from llmc.quantize.quantizer import Observations

    backend = backend_of(plan.target)
    checker = backend.node_checker(plan.target)
    obstacles = tuple(
        Obstacle(where=profile.name, reason=error.fact, advice=error.hint)
        for profile, error in checker.obstacles(plan.target, (plan.profile, *plan.also))
    )
    checkpoint = open_checkpoint(plan.model, plan.adapter)
    result = CheckResult(
        architecture=checkpoint.architecture,
        target=plan.target.name,
        profiles=tuple(profile.name for profile in (plan.profile, *plan.also)),
        asked=None,
        nodes=0,
        signatures=0,
        obstacles=obstacles,
        refused=(),
        unknown=(),
        passes=(),
    )
    try:
        lowered = lower_graph(checkpoint, plan.target, progress)
        backend.quantizer(plan.target).apply(lowered.graph, Observations())
    except UnsupportedError as error:
        model = Obstacle(where="model", reason=error.fact, advice=error.hint)
        return result.model_copy(update={"obstacles": (*obstacles, model)})
    with progress.stage("nodes"):
        report = checker.check(lowered.graph.model)
    return result.model_copy(
        update={
            "asked": f"{checker.library} {report.version}",
            "nodes": report.nodes,
            "signatures": report.signatures,
            "refused": report.refused,
            "unknown": report.unknown,
            "passes": pass_records(lowered.passes),
            "plain": _plain(lowered.graph),
        }
    )


def _plain(graph: Graph) -> tuple[str, ...]:
    """Name what is left of the dialect, with its layers."""
    layers: dict[str, set[int]] = {}
    for node in graph.graph:
        if node.domain == DIALECT:
            layer = layer_of(node)
            layers.setdefault(node.op_type, set()).update(() if layer is None else (layer,))
    return tuple(
        f"{name}, layers {number_ranges(sorted(found))}{_PLAIN.get(name, '')}"
        for name, found in layers.items()
    )


def _render(finding: NodeFinding) -> list[str]:
    layers = f", layers {', '.join(map(str, finding.layers))}" if finding.layers else ""
    return [
        f"  {finding.count} x {finding.operator}({', '.join(finding.inputs)}){layers}",
        f"    first at {finding.node}",
        f"    {finding.reason}",
        f"    {finding.advice}",
    ]
