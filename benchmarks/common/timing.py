"""Measure times and ratios, and the resource usage of a child process."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Usage:
    """The exit code and resource usage of a process, as the operating system accounts them.

    Args:
        code: Exit code.
        cpu: CPU seconds in the program and in the system.
        peak_bytes: Peak resident set.
    """

    code: int
    cpu: float
    peak_bytes: float


def wait_for(process: int) -> Usage:
    """Wait for the end of a child process, and return its usage."""
    _, status, usage = os.wait4(process, 0)
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(os.waitstatus_to_exitcode(status), cpu, usage.ru_maxrss * 1024.0)


def seconds_of(call: Callable[[], object]) -> float:
    """Measure the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float], middle: float | None = None) -> str:
    """Format the median of values, or a given middle, with their range."""
    return f"{np.median(values) if middle is None else middle:.2f} ({min(values):.2f}-{max(values):.2f})"


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Format the ratio of the medians of two alternating sides, with the range of the rounds' own ratios."""
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    return spread(rounds, float(np.median(a) / np.median(b)))
