"""Times and ratios, and what a child process took."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Usage:
    """How a process ended and what it took, from the operating system's account of it.

    Args:
        code: Its exit code.
        cpu: Seconds in the program and in the system.
        peak_bytes: Its highest resident set.
    """

    code: int
    cpu: float
    peak_bytes: float


def wait_for(process: int) -> Usage:
    """Wait for the end of a child process."""
    _, status, usage = os.wait4(process, 0)
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(os.waitstatus_to_exitcode(status), cpu, usage.ru_maxrss * 1024.0)


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float], middle: float | None = None) -> str:
    """The median of values, or the middle that is given, with their range."""
    return f"{np.median(values) if middle is None else middle:.2f} ({min(values):.2f}-{max(values):.2f})"


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """The ratio of the medians of two sides measured in turn, with the range of the rounds' own ratios."""
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    return spread(rounds, float(np.median(a) / np.median(b)))
