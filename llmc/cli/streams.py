"""Wrappers that keep a closed or full standard stream from aborting a build."""

import errno
import io
import os
import sys

from llmc.errors import LlmcError, OutputError, ResourceError


class _Output(io.TextIOWrapper):
    """Standard output that reports failures as typed errors."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _explain(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _explain(error) from error


class _Messages(io.TextIOWrapper):
    """Standard error that ignores failures, because nothing could report them."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def guard_streams() -> None:
    """Wrap the standard streams so that closed pipes and full disks cause no internal error.

    A stream that was closed from the start is opened on the null device, so that no file of a build gets its
    number.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for number in closed:
        # The system assigns the lowest free number. Standard output is opened for reading only, so that
        # writing to it fails.
        os.open(os.devnull, os.O_RDWR if number == 2 else os.O_RDONLY)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _wrap(_Output, sys.stdout, 1)
    sys.stderr = _wrap(_Messages, sys.stderr, 2)


def _wrap(kind: type[io.TextIOWrapper], stream: object, number: int) -> io.TextIOWrapper:
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        return kind(
            stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering or number == 2
        )
    return kind(open(number, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _explain(error: OSError) -> LlmcError:
    if error.errno in (errno.EPIPE, errno.EBADF):
        return OutputError("standard output is closed: the output is lost")
    return ResourceError(
        f"standard output cannot be written: {error.strerror}",
        hint="the built artifact and the measured results are kept",
    )
