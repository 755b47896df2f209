"""Define typed errors: each states a fact with its values, may have a hint, and has an exit code.

Exit codes are part of the contract of the command line: 2 usage or configuration, 3 model or operator
not supported on this target, 4 resources (memory, disk, missing runtime), 5 parity gate,
6 latency gate, 129, 130 and 143 interrupted by SIGHUP, Ctrl-C and SIGTERM, 141 standard output closed.
"""

import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import ClassVar


class ExitCode(IntEnum):
    """The exit code that the process returns to a shell or a CI system."""

    OK = 0
    USAGE = 2
    UNSUPPORTED = 3
    RESOURCES = 4
    PARITY = 5
    LATENCY = 6
    HUNG_UP = 129
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141
    TERMINATED = 143


class LlmcError(Exception):
    """The base of every error that llmc raises on purpose.

    Args:
        fact: What is wrong, with its values, as one sentence.
        hint: What the user can do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE

    def __init__(self, fact: str, *, hint: str | None = None) -> None:
        super().__init__(fact)
        self.fact = fact
        self.hint = hint


class ConfigError(LlmcError):
    """Raised if a target, a profile, an option or a path is not valid (exit code 2)."""


class CheckpointError(LlmcError):
    """Raised if a checkpoint is missing, incomplete or damaged (exit code 2)."""


class UnsupportedError(LlmcError):
    """Raised if the model or one of its operators cannot be compiled for this target (exit code 3)."""

    exit_code = ExitCode.UNSUPPORTED


class GraphError(UnsupportedError):
    """Raised if a graph violates one of its invariants, or a pass violated it (exit code 3)."""


class KernelError(UnsupportedError):
    """Raised if compiled kernels cannot do for this model what the target requires (exit code 3)."""


class ResourceError(LlmcError):
    """Raised if memory, disk space or a runtime is missing (exit code 4)."""

    exit_code = ExitCode.RESOURCES


class OutputError(LlmcError):
    """Raised if nobody reads standard output any more (exit code 141, which shells use for SIGPIPE)."""

    exit_code = ExitCode.OUTPUT_CLOSED


class ParityError(LlmcError):
    """Raised if the artifact's numbers differ from the original's (exit code 5)."""

    exit_code = ExitCode.PARITY


class LatencyError(LlmcError):
    """Raised if the artifact misses a latency gate (exit code 6)."""

    exit_code = ExitCode.LATENCY


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest known words, or lists all of them."""
    options = sorted(known)
    near = get_close_matches(word, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(options)}" if options else "none is known"


def count_names(names: Sequence[str]) -> str:
    """Return the first of several names, and the number of the others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def number_ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as ranges: (0, 1, 2, 5) as `0-2, 5`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def require_failure(error: BaseException) -> None:
    """Raise `error` again if it is not a failure, but an interrupt or the end of the process.

    Libraries in Rust, such as tokenizers, raise their panics as an exception that is not an `Exception`.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def failing_line(error: BaseException, package: str) -> str:
    """Return ` at file.py:12 (code)`, the last line of a package's code that led to `error`; may be empty."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if package in Path(frame.filename).parts]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})" if own else ""


def first_lines(error: BaseException) -> str:
    """Return the type and the first two lines of a foreign exception, for the end of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
