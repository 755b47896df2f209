"""Signals that end a command: each unwinds it like Ctrl-C, and has its own exit code."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Not every system has SIGHUP.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
_QUIET_SECONDS = 2.0


class Stop(KeyboardInterrupt):
    """A signal that ends the command. Code that handles Ctrl-C also handles it."""


class Stopped:
    """The signal that has ended the command.

    Args:
        number: Number of the signal; None while no signal has arrived.
    """

    number: int | None = None

    @property
    def words(self) -> str:
        """The cause as human-readable text."""
        if self.number is None or self.number == signal.SIGINT:
            return "interrupted"
        return f"interrupted by {signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """The exit code that shells use for this signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def catch_signals() -> Iterator[Stopped]:
    """Raise `Stop` in the main thread when a signal arrives within this context.

    Further signals that follow immediately, as some wrappers send them, do not interrupt the cleanup. A
    signal that the caller has set to be ignored, as nohup does, stays ignored.
    """
    stopped = Stopped()
    quiet_until = 0.0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal quiet_until
        if time.monotonic() < quiet_until:
            return
        quiet_until = time.monotonic() + _QUIET_SECONDS
        stopped.number = stopped.number or number
        raise Stop(stopped.words)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):
                before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
