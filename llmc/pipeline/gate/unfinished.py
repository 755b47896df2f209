"""Keep artifacts whose gate is interrupted without an outcome, for `llmc verify` to finish."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmc.artifact.manifest import REPORTS, CheckRecord, Manifest, State
from llmc.artifact.store.folder import Artifact, Staging, reopened
from llmc.artifact.verdict import MISSED, Verdict
from llmc.config import Metric
from llmc.errors import LlmcError, ResourceError, first_lines
from llmc.pipeline.result import write_report
from llmc.progress import Progress
from llmc.runtime.failures import is_out_of_memory
from llmc.scratch import record_output

if TYPE_CHECKING:
    from llmc.report import Report

#: Reason in the manifest while the gate runs, and after a process that could not write another.
BEGUN = "the gates were begun and not finished"


@contextmanager
def explaining(
    stage: Staging, manifest: Manifest, eval_text: Sequence[str], progress: Progress
) -> Iterator[None]:
    """Record why the gates of a kept artifact have no outcome if they are interrupted or cannot run.

    Args:
        stage: The output where it was kept.
        manifest: Its manifest.
        eval_text: Files with the user's text, for the command that continues.

    Raises:
        ResourceError: No memory is left.
    """
    try:
        yield
    except BaseException as error:
        if not stage.path.exists():  # interrupted while it was moved to its output path
            raise
        reason = _reason(error)
        progress.note(
            f"built, not verified: {stage.path} is kept; {_command(stage, eval_text)} continues from the "
            "measurements so far"
        )
        try:
            stage.restate(manifest.model_copy(update={"unfinished": f"{BEGUN}: {reason}"}))
        except LlmcError as unwritten:  # the manifest already says that they were not finished
            progress.note(f"the reason is not in its manifest: {unwritten.fact}")
        if is_out_of_memory(error):
            raise ResourceError(
                f"the gates ran out of memory: {reason}", hint="end other programs, or take a larger machine"
            ) from error
        raise


def _command(stage: Staging, eval_text: Sequence[str]) -> str:
    texts = [part for name in eval_text for part in ("--eval-text", name)]
    return shlex.join(["llmc", "verify", str(stage.path), *texts])


def _reason(error: BaseException) -> str:
    """Describe the cause in one line."""
    if isinstance(error, LlmcError):
        return error.fact
    if isinstance(error, Exception):
        return first_lines(error)
    return str(error) or "interrupted"


def record_verdict(manifest: Manifest, verdict: Verdict, besides: Collection[Metric] = ()) -> Manifest:
    """Return the manifest of an artifact with the decision of its gates.

    Args:
        besides: Measured metrics that builds do not check.
    """
    checks = tuple(
        CheckRecord(metric=c.metric, status=c.status, where=c.where)
        for c in verdict.checks
        if c.metric not in (Metric.GATES, *besides)
    )
    state = State.VERIFIED if manifest.state is State.NOT_VERIFIED else manifest.state
    if any(check.status in MISSED for check in checks):
        state = State.FAILED
    fields = {name: getattr(manifest, name) for name in Manifest.model_fields}
    return Manifest(**{**fields, "state": state, "checks": checks, "unfinished": None})


def put_by_verdict(stage: Staging, manifest: Manifest) -> Artifact:
    """Move an artifact to its output path, or keep it as failed."""
    return stage.keep_failed(manifest) if manifest.state is State.FAILED else stage.commit(manifest)


def finish(
    artifact: Artifact,
    verdict: Verdict,
    report: Report,
    progress: Progress,
    *,
    besides: Collection[Metric] = (),
) -> Artifact:
    """Record the outcome of an artifact that was kept without one, as its build would have.

    Args:
        besides: As `record_verdict`.

    Raises:
        ConfigError: The artifact is being built, has changed since it was opened, or is not writable.
    """
    manifest = record_verdict(artifact.manifest, verdict, besides)
    record_output(artifact.path)
    with reopened(artifact) as stage:
        write_report(report, artifact.path / REPORTS, "parity")
        finished = put_by_verdict(stage, manifest)
    progress.note(f"{manifest.state.value}: {finished.path}")
    return finished
