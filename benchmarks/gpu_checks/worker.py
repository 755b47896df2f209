"""Run checks in a process of their own: a crash, a hang or a lost CUDA context ends only one check."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from gpu_checks.checks import Check, Settings
from gpu_checks.record import OUT_OF_TIME, Status
from llmc.children import die_with_parent
from llmc.errors import LlmcError, ResourceError, UnsupportedError, failing_line, first_lines

#: Seconds that a check may take beyond a multiple of its forecast before it counts as hanging.
_PATIENCE, _TIMES = 30.0, 4.0
#: Seconds that an idle process has to end.
_FAREWELL = 5.0
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Answer:
    """The answer of a process to a check; see `gpu_checks.record.Outcome`."""

    status: Status
    why: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Worker:
    """A process that runs one check after another, and is replaced by a new one after any that went wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, check: Check, deadline: float) -> Answer:
        """Run a check.

        Args:
            deadline: Time of `time.monotonic` at which it is stopped.
        """
        start = time.monotonic()
        if check.fresh:
            self.stop()
        limit = min(deadline, start + _PATIENCE + _TIMES * check.seconds)
        try:
            self._start()
            self._pipe.send(check.id)
            answered = self._pipe.poll(max(0.0, limit - time.monotonic()))
            answer: Answer | None = self._pipe.recv() if answered else None
        except (EOFError, ConnectionError):
            answer = self._ended()
        unanswered = answer is None
        if answer is None:
            taken = time.monotonic() - start
            if limit < deadline:
                answer = Answer(Status.FAILED, f"no answer within {taken:.0f} s", {}, taken)
            else:
                answer = Answer(Status.NOT_MEASURED, OUT_OF_TIME, {}, taken)
        if answer.status is not Status.MEASURED or check.fresh:
            self.stop(idle=not unanswered)
        return answer

    def _ended(self) -> Answer:
        self._process.join()
        code = self._process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Answer(Status.FAILED, f"the process ended with {how}")

    def _start(self) -> None:
        if self._process is None:
            self._pipe, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=serve, args=(theirs, self._settings), daemon=False)
            self._process.start()
            theirs.close()

    def stop(self, *, idle: bool = True) -> None:
        """End the process and those that it started.

        Args:
            idle: Whether it has no check to run, and ends by itself.
        """
        if self._process is None:
            return
        self._pipe.close()
        if idle:
            self._process.join(_FAREWELL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = self._pipe = None


def serve(pipe: Any, settings: Settings) -> None:
    """Answer identifiers of checks until the other end is closed."""
    from gpu_checks.plan import list_checks
    from gpu_checks.room import Room

    die_with_parent()
    os.setpgid(0, 0)  # so that `stop` reaches the processes that checks start
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is for the results
    checks = {check.id: check for check in list_checks(settings)}
    room = Room(settings)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        start = time.monotonic()
        status, why, figures = _run(room, checks[asked])
        pipe.send(Answer(status, why, figures, time.monotonic() - start))


def _run(room: Any, check: Check) -> tuple[Status, str | None, dict[str, Any]]:
    try:
        found = check.run(room, check)
        figures = json.loads(json.dumps(found.figures))
    except (ResourceError, UnsupportedError) as error:
        return Status.NOT_MEASURED, error.fact, {}
    except LlmcError as error:
        return Status.FAILED, error.fact, {}
    except Exception as error:  # noqa: BLE001 - the run goes on, and reports the error
        return Status.FAILED, first_lines(error) + failing_line(error, "gpu_checks"), {}
    status = Status.MEASURED if found.beyond is None else Status.FAILED
    return status, found.beyond, figures
