"""Run checks in their order within a budget of time, and record each outcome."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpu_checks.checks import COMPUTES_NOTHING, Check, Settings
from gpu_checks.record import OUT_OF_TIME, Identity, Outcome, Record, Status
from gpu_checks.worker import Answer, Worker
from llmc.artifact.provenance import code_digest, tool_versions


@dataclass
class Run:
    """One run of the program.

    Args:
        device: The GPU in words, or "cpu".
        deadline: Time of `time.monotonic` at which the run ends.
        no_gpu: Why there is no GPU to measure, for the checks that need one.
    """

    settings: Settings
    record: Record
    worker: Worker
    device: str
    deadline: float
    no_gpu: str | None
    outcomes: list[Outcome] = field(default_factory=list)
    _versions: dict[str, str] = field(default_factory=tool_versions)
    _doubt: str | None = None
    _accepts: bool = False

    def go(self, checks: Sequence[Check], names: tuple[str, ...]) -> None:
        """Run the checks that `names` select, all if there are none, and those that they need."""
        by_id = {check.id: check for check in checks}
        for check in checks:
            if check.name == "probe" and self.settings.cuda:
                why = self._settle(check).why
                self._accepts = why is not None and why.startswith(COMPUTES_NOTHING)
                self._doubt = COMPUTES_NOTHING if self._accepts else why
            elif check.name != "build" and (not names or check.matches(names)):
                self._settle_built(check, by_id)
            elif names and check.matches(names):
                self._settle(check)

    def _settle_built(self, check: Check, checks: dict[str, Check]) -> None:
        """Settle a check, and before it the build of its artifact if that is missing."""
        subject = check.subject
        if self._doubts(check) and not self._runs_for_nothing(check):
            self._put(check, Answer(Status.NOT_MEASURED, self._doubt))
            return
        if subject is not None and (self.settings.cuda or not check.gpu):
            build = checks[f"build/{subject.name}"]
            if not subject.is_built(self.settings.artifacts):
                known = [o for o in self.outcomes if o.check == build.id]
                built = known[0] if known else self._settle(build)
                if built.status is not Status.MEASURED:
                    self._put(check, Answer(Status.NOT_MEASURED, f"the artifact is not built: {built.why}"))
                    return
        self._settle(check)

    def _settle(self, check: Check) -> Outcome:
        """Return the outcome of a check, of an earlier run if it was measured there."""
        earlier = self.record.find(check.id, self._identity(check))
        if earlier is not None and earlier.status is Status.MEASURED:
            return self._tell(earlier, "measured before")
        if check.gpu and not self.settings.cuda:
            return self._put(check, Answer(Status.NOT_MEASURED, self.no_gpu))
        if check.seconds > self.deadline - time.monotonic():
            return self._put(check, Answer(Status.NOT_MEASURED, OUT_OF_TIME))
        print(f"{check.id} …", end="", file=sys.stderr, flush=True)
        answer = self.worker.ask(check, self.deadline)
        if self._doubts(check) and answer.why != OUT_OF_TIME:
            beyond = answer.status is Status.FAILED and answer.figures
            how = f"; the check ended with: {answer.why}" if answer.why and not beyond else ""
            answer = Answer(Status.NOT_MEASURED, f"{self._doubt}{how}", {}, answer.seconds)
        return self._put(check, answer)

    def _doubts(self, check: Check) -> bool:
        """Return whether the figures of a check come from a device that did not pass the probe."""
        return self._doubt is not None and check.computed

    def _runs_for_nothing(self, check: Check) -> bool:
        """Return whether a check is run on a device that accepts work but computes nothing.

        Its figures are dropped, but the way to them is tried.
        """
        return self._accepts and check.subject is not None and check.subject.tiny

    def _put(self, check: Check, answer: Answer) -> Outcome:
        outcome = Outcome(
            check=check.id,
            identity=self._identity(check),
            status=answer.status,
            why=answer.why,
            figures=answer.figures,
            seconds=round(answer.seconds, 4),
            code=code_digest("llmc"),
        )
        return self._tell(self.record.put(outcome), f"{answer.seconds:.1f} s")

    def _tell(self, outcome: Outcome, how: str) -> Outcome:
        self.outcomes.append(outcome)
        why = f": {outcome.why}" if outcome.why else ""
        print(f"\r{outcome.check} {outcome.status.value}{why} ({how})", file=sys.stderr, flush=True)
        return outcome

    def _identity(self, check: Check) -> Identity:
        folder = self.settings.artifacts
        artifact = None if check.subject is None else check.subject.digest(folder)
        return Identity(artifact=artifact, versions=self._versions, device=self.device)
