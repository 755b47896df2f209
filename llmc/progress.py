"""Report the progress of a build: stages with their time and peak memory, and notes.

All of it goes to stderr; stdout is for data. A station receives a `Progress` and never prints.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class StageRecord:
    """The measurements of one finished stage.

    Args:
        name: Name as given to `Progress.stage`.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far, not of the stage alone; None
            if the system does not report it.
    """

    name: str
    seconds: float
    peak_rss_bytes: int | None


def printable(text: str) -> str:
    """Escape the characters of a text that would control a terminal, such as `\\x1b` for an escape character.

    These are control characters except line ends and tabs, and characters that change the direction of
    writing. Names of models and tensors, file names and foreign messages are untrusted.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class Progress(Protocol):
    """The receiver of the stages and notes of a long task."""

    @property
    def records(self) -> Sequence[StageRecord]:
        """The finished stages, in order of their end."""
        ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the code of this context; stages may nest."""
        ...

    def note(self, text: str) -> None:
        """Print one line."""
        ...

    def advance(self, done: int, total: int) -> None:
        """Report how much of the innermost running stage is done, in any unit."""
        ...


def peak_rss_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes; None if the system does not report it.

    On Linux it is VmHWM of /proc/self/status, which unlike getrusage is reset at exec. On macOS it is
    getrusage's, which is in bytes there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def describe_record(record: StageRecord) -> str:
    """Return a human-readable line: name, seconds, peak memory in GB (10**9 bytes)."""
    text = f"{record.name}  {record.seconds:.1f} s"
    if record.peak_rss_bytes is not None:
        text += f"  peak {record.peak_rss_bytes / 1e9:.2f} GB"
    return text


class _Pace:
    """The speed of the counted work of a stage; a count that starts again is further work."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last = 0

    def describe(self, done: int, total: int) -> str:
        """Return `12 of 64`, and how long the rest takes at this pace, if that is known and long enough."""
        now = time.perf_counter()
        if self._first is None or done < self._last:
            self._first = (now, done)
        self._last = done
        text = f"{done:,} of {total:,}"
        begun, at = self._first
        if done == at or now - begun < PACE_SECONDS:
            return text
        left = (now - begun) / (done - at) * (total - done)
        if left < 1:
            return text
        return f"{text}, about {left:.0f} s left" if left < 90 else f"{text}, about {left / 60:.0f} min left"


#: Seconds of counted work before its pace is reported, and between two lines of a log.
PACE_SECONDS = 2.0
LINE_SECONDS = 30.0


class SilentProgress:
    """The progress that keeps the records and prints nothing."""

    def __init__(self) -> None:
        self._records: list[StageRecord] = []
        self._running: list[tuple[str, _Pace]] = []

    @property
    def records(self) -> Sequence[StageRecord]:
        return tuple(self._records)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._running.append((name, _Pace()))
        self._begin()
        try:
            yield
        except BaseException:
            self._running.pop()
            self._fail(name, time.perf_counter() - start)
            raise
        self._running.pop()
        record = StageRecord(name, time.perf_counter() - start, peak_rss_bytes())
        self._records.append(record)
        self._end(record)

    def note(self, text: str) -> None:
        """Print nothing."""

    def advance(self, done: int, total: int) -> None:
        """Report how much of the innermost stage is done, and how long the rest takes."""
        if self._running and total > 0:
            name, pace = self._running[-1]
            self._count(f"{name}  {pace.describe(done, total)}")

    def _begin(self) -> None:
        """Handle the start of a stage; does nothing here."""

    def _count(self, text: str) -> None:
        """Handle progress of the innermost stage; does nothing here."""

    def _end(self, record: StageRecord) -> None:
        """Handle the end of a stage; does nothing here."""

    def _fail(self, name: str, seconds: float) -> None:
        """Handle a stage that raised; does nothing here."""


class PlainProgress(SilentProgress):
    """The progress for logs and CI: a line for each finished stage and note, and one every half minute."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream if stream is not None else sys.stderr
        self._written = time.perf_counter()

    def note(self, text: str) -> None:
        self._write(text)

    def _end(self, record: StageRecord) -> None:
        self._write(describe_record(record))

    def _fail(self, name: str, seconds: float) -> None:
        self._write(f"{name}  stopped after {seconds:.1f} s")

    def _count(self, text: str) -> None:
        if time.perf_counter() - self._written > LINE_SECONDS:
            self._write(text)

    def _write(self, text: str) -> None:
        self._written = time.perf_counter()
        self._stream.write(printable(text) + "\n")
        self._stream.flush()


class TerminalProgress(SilentProgress):
    """The progress with a spinner for the innermost running stage, and a line for each finished one."""

    def __init__(self, console: "Console | None" = None) -> None:
        super().__init__()
        if console is None:
            from rich.console import Console

            console = Console(stderr=True, highlight=False)
        self._console = console
        self._status: Status | None = None

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def _begin(self) -> None:
        self._show()

    def _count(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def _end(self, record: StageRecord) -> None:
        self._console.print(printable(f"✓ {describe_record(record)}"), style="green", markup=False)
        self._show()

    def _fail(self, name: str, seconds: float) -> None:
        self._console.print(printable(f"✗ {name}  stopped after {seconds:.1f} s"), style="red", markup=False)
        self._show()

    def _show(self) -> None:
        if not self._running:
            if self._status is not None:
                self._status.stop()
                self._status = None
        elif self._status is None:
            self._status = self._console.status(self._running[-1][0])
            self._status.start()
        else:
            self._status.update(self._running[-1][0])
