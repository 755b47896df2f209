"""Signals that end a command: each unwinds it as Ctrl-C does, and has its own exit code."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: SIGHUP is not on every system.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
_QUIET_SECONDS = 2.0


class Stop(KeyboardInterrupt):
    """A signal that ends the command. Whatever handles Ctrl-C handles it."""


class Stopped:
    """Which signal has ended the command.

    Args:
        number: Its number; None so far.
    """

    number: int | None = None

    @property
    def words(self) -> str:
        """The cause, for people."""
        if self.number is None or self.number == signal.SIGINT:
            return "interrupted"
        return f"interrupted by {signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """As shells name an end by a signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def catch_signals() -> Iterator[Stopped]:
    """Within this context a signal raises `Stop` in the main thread.

    Others that follow at once, as some wrappers send them, do not disturb the cleaning up. A signal that the
    caller has set to be ignored, as nohup does, stays ignored.
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
