"""What a build says while it works: stages with their time and peak memory, and notes.

All of it goes to stderr; stdout carries data. A station takes a `Progress` and never prints.
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
    """One finished stage.

    Args:
        name: As given to `Progress.stage`.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far, not of the stage alone; None
            where the system does not tell.
    """

    name: str
    seconds: float
    peak_rss_bytes: int | None


def printable(text: str) -> str:
    """A text for a terminal: what would steer it is written out, as `\\x1b` for an escape character.

    That is control characters but the ends of lines and tabs, and what turns the direction of writing. Names
    of models and tensors, file names and messages of others come from outside.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class Progress(Protocol):
    """Where stages and notes of a long task go."""

    @property
    def records(self) -> Sequence[StageRecord]:
        """The stages that finished, in order of their end."""
        ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time what runs inside; stages may nest."""
        ...

    def note(self, text: str) -> None:
        """Say one line."""
        ...

    def advance(self, done: int, total: int) -> None:
        """How much of the innermost running stage is done, in a unit of its own."""
        ...


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process in bytes, or None where the system does not tell.

    Linux: VmHWM of /proc/self/status, which unlike getrusage starts anew at exec. macOS:
    getrusage, in bytes there.
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
    """One line for people: name, seconds, peak memory in GB (10**9 bytes)."""
    text = f"{record.name}  {record.seconds:.1f} s"
    if record.peak_rss_bytes is not None:
        text += f"  peak {record.peak_rss_bytes / 1e9:.2f} GB"
    return text


class _Pace:
    """How fast the counted work of a stage goes; a count that starts anew is further work."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last = 0

    def describe(self, done: int, total: int) -> str:
        """`12 of 64`, and how long the rest takes at this pace, if that is known and worth saying."""
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


#: Seconds of counted work before its pace is told, and between two lines of a log.
PACE_SECONDS = 2.0
LINE_SECONDS = 30.0


class SilentProgress:
    """Keeps the records and says nothing."""

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
        """Nothing is said."""

    def advance(self, done: int, total: int) -> None:
        """Tell how much of the innermost stage is done, and how long the rest takes."""
        if self._running and total > 0:
            name, pace = self._running[-1]
            self._count(f"{name}  {pace.describe(done, total)}")

    def _begin(self) -> None:
        """A stage starts."""

    def _count(self, text: str) -> None:
        """Some of the innermost stage is done."""

    def _end(self, record: StageRecord) -> None:
        """A stage is done."""

    def _fail(self, name: str, seconds: float) -> None:
        """A stage raised."""


class PlainProgress(SilentProgress):
    """One line for each finished stage and each note, and one every half minute: for logs and CI."""

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
    """A spinner with the innermost running stage, and a line for each that is done."""

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
