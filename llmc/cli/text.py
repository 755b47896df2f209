"""What the commands share: examples in help pages, results on stdout, progress on stderr."""

import sys
from typing import TYPE_CHECKING, Protocol

import typer

from llmc.errors import LlmcError
from llmc.progress import printable

if TYPE_CHECKING:
    from llmc.progress import Progress


class Result(Protocol):
    """What a command gets back: data for machines, text for people, and its verdict."""

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """One JSON document."""
        ...

    def render(self) -> str:
        """Text for a terminal."""
        ...

    def failure(self) -> LlmcError | None:
        """The error that this result amounts to, such as a failed gate; None for success."""
        ...


def examples(*commands: str) -> str:
    """An epilog of a help page; typer keeps the lines of a paragraph that starts with \\b."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


def emit(result: Result, *, as_json: bool) -> None:
    """The result on stdout, then its failure as an error, so that a failed gate still shows its data."""
    typer.echo(result.model_dump_json(indent=2) if as_json else printable(result.render()))
    failure = result.failure()
    if failure is not None:
        raise failure


def open_progress() -> "Progress":
    """A spinner where stderr is a terminal, else plain lines."""
    from llmc.progress import PlainProgress, TerminalProgress

    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
