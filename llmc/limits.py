"""Limit what a checkpoint's own code may use: a chat template is a program, as a tokenizer's regex may be.

The call is tried once in a forked child, whose time and memory the system limits. Neither a signal handler
nor Jinja's sandbox would suffice: one expression such as 10 ** 10 ** 10 is a single call that Python cannot
interrupt.
"""

from __future__ import annotations

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Sized
from pathlib import Path
from typing import NoReturn

SECONDS = 4  # of CPU time
MEMORY = 1 << 30  # bytes in addition to the memory of this process
LONGEST = 16 << 20  # characters of a text, elements of other results

_WALL_SECONDS = 120  # on a machine that does not run the child
_OVER_MEMORY, _TOO_LONG = 3, 4


def exceeded_limit(call: Callable[[], Sized]) -> str | None:
    """Try a call in a child, and say which limit it exceeds; None if it returns or raises.

    Returns:
        The end of a sentence about the called code, such as "does not end within 4 s".
    """
    child = _fork()
    if child == 0:
        _end(call)
    try:
        status = _wait(child, time.monotonic() + _WALL_SECONDS)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        timed = number in (signal.SIGXCPU, signal.SIGKILL)
        return f"does not end within {SECONDS} s" if timed else f"ends its process with signal {number}"
    return {
        _OVER_MEMORY: f"needs more than {MEMORY >> 30} GiB of memory",
        _TOO_LONG: f"returns more than {LONGEST:,} characters",
    }.get(os.WEXITSTATUS(status))


def _fork() -> int:
    """Fork without the warning of the library `tokenizers`, which it prints if it has used threads."""
    name = "TOKENIZERS_PARALLELISM"
    configured = name in os.environ
    os.environ.setdefault(name, "true")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # about forks with threads, which are not used
            return os.fork()
    finally:
        if not configured:
            del os.environ[name]


def _wait(child: int, deadline: float) -> int:
    """Return the exit status of `child`, which is killed at `deadline`."""
    pause = 0.0005
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _end(call: Callable[[], Sized]) -> NoReturn:
    """Make the call under the limits and end this process, without any of its parent's clean-up."""
    code = 0
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, SECONDS)
        statm = Path("/proc/self/statm")
        if statm.is_file():
            pages = int(statm.read_text().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
        code = _TOO_LONG if len(call()) > LONGEST else 0
    except MemoryError:
        code = _OVER_MEMORY
    except BaseException:  # noqa: BLE001 - the parent makes the call again and sees what it raises
        code = 0
    finally:
        os._exit(code)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
