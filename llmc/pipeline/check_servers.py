"""Implement `llmc check --runtime`: say which servers take what a target builds, before any long work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.config import ServedCheckpoint, Target
from llmc.errors import ConfigError, LlmcError, UnsupportedError, count_names, did_you_mean
from llmc.progress import Progress
from llmc.records import Record
from llmc.servers.support import Matrix, schemes_of, treatments
from llmc.servers.support_models import ServedModel, of_model
from llmc.servers.support_table import VERSIONS
from llmc.servers.support_terms import Runtime, Status, Treatment


class ServerFinding(Record):
    """What a server does with a scheme, a matrix or a property of the folder.

    Args:
        evidence: How that was found, and where; empty if nothing was found.
    """

    subject: str
    status: Status
    reason: str
    evidence: str


class RuntimeCheck(Record):
    """What a server does with all that a target builds."""

    runtime: Runtime
    version: str
    findings: tuple[ServerFinding, ...]


class ServerCheck(Record):
    """The result of a check.

    Args:
        architecture: The model whose matrices were looked at; None if none was named.
        matrices: Number of its matrices that the target quantizes.
        obstacles: Why the format cannot hold the model or the schemes, whatever the server.
    """

    target: str
    format: str
    architecture: str | None
    matrices: int
    obstacles: tuple[str, ...]
    runtimes: tuple[RuntimeCheck, ...]

    def render(self) -> str:
        """Return text for a terminal."""
        model = "" if self.architecture is None else f"{self.architecture}, {self.matrices} matrices, "
        lines = [f"{model}{self.target} in format {self.format}", *self.obstacles]
        for check in self.runtimes:
            lines.append(f"{check.runtime.value} ({check.version})")
            for finding in check.findings:
                reason = f": {finding.reason}" if finding.reason else ""
                evidence = f" [{finding.evidence}]" if finding.evidence else ""
                lines.append(f"  {finding.subject}: {finding.status.value}{reason}{evidence}")
        return "\n".join(lines)

    def failure(self) -> LlmcError | None:
        """Return an error if the format or a server refuses anything, or a server reads it wrongly."""
        refused = list(self.obstacles)
        for check in self.runtimes:
            bad = [f for f in check.findings if f.status in (Status.REFUSED, Status.WRONG)]
            if bad:
                more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
                refused.append(f"{check.runtime.value}: {bad[0].subject} {bad[0].status.value}{more}")
        if not refused:
            return None
        return UnsupportedError(
            f"{self.target} is not for these servers: {'; '.join(refused)}",
            hint="docs/server-checkpoints.md says which server takes which format",
        )


def parse_runtimes(names: str) -> tuple[Runtime, ...]:
    """Return the servers of a list that is separated by commas; `all` stands for every one.

    Raises:
        ConfigError: One of them is unknown.
    """
    if names == "all":
        return tuple(Runtime)
    known = {runtime.value: runtime for runtime in Runtime}
    for name in names.split(","):
        if name not in known:
            raise ConfigError(f"server {name} is unknown", hint=did_you_mean(name, known))
    return tuple(dict.fromkeys(known[name] for name in names.split(",")))


def check_servers(
    target: Target, runtimes: Sequence[Runtime], model: str | None, adapter: str | None, progress: Progress
) -> ServerCheck:
    """Ask the table of servers about a target, and about a model's matrices; writes nothing.

    Args:
        model: The model as the user named it; None to ask about the target alone.

    Raises:
        ConfigError: The target is not of backend checkpoint.
        CheckpointError: The checkpoint cannot be opened, or lacks a tensor.
    """
    from llmc.backends.checkpoint.formats.choice import format_of

    found = {runtime: treatments(runtime, target) for runtime in runtimes}
    section = target.checkpoint
    if section is None:
        raise ConfigError(f"target {target.name} makes no checkpoint")
    architecture: str | None = None
    matrices: tuple[Matrix, ...] = ()
    obstacles: tuple[str, ...] = ()
    if model is not None:
        architecture, matrices, obstacles, config = _of_model(target, section, model, adapter, progress)
        found = {runtime: treatments(runtime, target, matrices) for runtime in runtimes}
        served = ServedModel(config, architecture, tuple(matrix.name for matrix in matrices))
        for runtime in runtimes:
            found[runtime] += of_model(runtime, served)
    form = format_of(section)
    refused: dict[str, list[str]] = {}
    for matrix in matrices:
        refusal = form.refusal(matrix.scheme, matrix.shape)
        if refusal is not None:
            refused.setdefault(refusal, []).append(matrix.name)
    mixed = form.mixed_refusal(schemes_of(target))
    obstacles += tuple(f"{count_names(names)}: {reason}" for reason, names in refused.items())
    obstacles += () if mixed is None else (mixed,)
    return ServerCheck(
        target=target.name,
        format=section.format.value,
        architecture=architecture,
        matrices=len(matrices),
        obstacles=obstacles,
        runtimes=tuple(
            RuntimeCheck(runtime=runtime, version=VERSIONS[runtime], findings=_findings(found[runtime]))
            for runtime in runtimes
        ),
    )


def _of_model(
    target: Target, section: ServedCheckpoint, model: str, adapter: str | None, progress: Progress
) -> tuple[str, tuple[Matrix, ...], tuple[str, ...], Any]:
    """Return the architecture, the quantized matrices, why the target cannot be lowered, and the config."""
    from llmc.backends.checkpoint.requirements import planned_experts, planned_matrices
    from llmc.checkpoint import open_checkpoint
    from llmc.pipeline.steps.compile import lower_graph

    checkpoint = open_checkpoint(model, adapter)
    config = checkpoint.config.get_text_config(decoder=True)
    try:
        graph = lower_graph(checkpoint, target, progress).graph
    except UnsupportedError as error:
        return checkpoint.architecture, (), (error.fact,), config
    planned = planned_matrices(graph, target, section)
    matrices = [Matrix(each.source, each.shape, scheme) for each in planned for scheme in each.schemes]
    experts = planned_experts(graph, target, section, checkpoint.file_tensors())
    matrices += [Matrix(each.source, each.shape, each.schemes[0], is_expert=True) for each in experts]
    return checkpoint.architecture, tuple(matrices), (), config


def _findings(found: Sequence[Treatment]) -> tuple[ServerFinding, ...]:
    return tuple(
        ServerFinding(subject=each.subject, status=each.status, reason=each.reason, evidence=each.where)
        for each in found
    )
