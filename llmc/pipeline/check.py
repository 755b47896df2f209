"""`llmc check`: what of a model TensorRT would refuse, before any long work."""

from __future__ import annotations

from llmc.artifact.manifest import PassRecord
from llmc.backends import backend_of
from llmc.backends.tensorrt.nodes import NodeFinding
from llmc.config import BuildPlan
from llmc.errors import LlmcError, UnsupportedError
from llmc.pipeline.steps.compile import lower_graph, pass_records
from llmc.progress import Progress
from llmc.records import Record


class Obstacle(Record):
    """What stands against a build as a whole: a GPU without the precision, a model that does not lower."""

    where: str
    reason: str
    advice: str | None


class CheckResult(Record):
    """What was found.

    Args:
        asked: Library and release whose parser was asked; None if it did not come to that.
        nodes: Nodes of the lowered graph.
        signatures: Distinct ones.
        obstacles: What stands against the build as a whole.
        refused: Nodes that TensorRT refuses.
        unknown: Nodes that it cannot be asked about.
        passes: What each pass did, and where it declined as the target accepts.
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

    def render(self) -> str:
        """Text for a terminal."""
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
            lines.append("cannot be asked about")
        for each in self.unknown:
            lines += _render(each)
        for record in self.passes:
            lines += [f"{record.name} declines {d.count}: {d.reason} [{d.code}]" for d in record.declined]
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """An error if anything is refused."""
        if not self.obstacles and not self.refused:
            return None
        found = [each.where for each in self.obstacles]
        found += [f"{each.count} x {each.operator}" for each in self.refused]
        return UnsupportedError(f"{self.target} cannot be built: {', '.join(found)}")


def check(plan: BuildPlan, progress: Progress) -> CheckResult:
    """Lower a model for a target, and ask TensorRT about every node; no weight is read, nothing is written.

    What the target leaves out of the model is left in: only weights could say what that is, and it leaves the
    kinds of nodes as they are.

    Raises:
        ConfigError: The target is not of backend tensorrt, or a profile states no compute capability.
        CheckpointError: The checkpoint cannot be opened, or lacks a tensor.
        ResourceError: tensorrt_rtx, whose parser is asked, is missing.
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
        }
    )


def _render(found: NodeFinding) -> list[str]:
    layers = f", layers {', '.join(map(str, found.layers))}" if found.layers else ""
    return [
        f"  {found.count} x {found.operator}({', '.join(found.inputs)}){layers}",
        f"    first at {found.node}",
        f"    {found.reason}",
        f"    {found.advice}",
    ]
