"""Functions that the commands share: examples in help pages, results on stdout, progress on stderr."""

import sys
from typing import TYPE_CHECKING, Protocol

import typer

from llmc.errors import LlmcError
from llmc.progress import printable

if TYPE_CHECKING:
    from llmc.progress import Progress


class Result(Protocol):
    """The result of a command, as JSON, as text, and as success or failure."""

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """Serialize the result as one JSON document."""
        ...

    def render(self) -> str:
        """Format the result as text for a terminal."""
        ...

    def failure(self) -> LlmcError | None:
        """Return the error that this result means, such as a failed gate; None for success."""
        ...


def examples(*commands: str) -> str:
    """Format the epilog of a help page; typer keeps the lines of a paragraph that starts with \\b."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


def emit(result: Result, *, as_json: bool) -> None:
    """Print the result, then raise its failure, so that a failed gate still shows its data."""
    typer.echo(result.model_dump_json(indent=2) if as_json else printable(result.render()))
    failure = result.failure()
    if failure is not None:
        raise failure


def open_progress() -> "Progress":
    """Show a spinner if stderr is a terminal, otherwise plain lines."""
    from llmc.progress import PlainProgress, TerminalProgress

    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
