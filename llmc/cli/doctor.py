"""The command `llmc doctor`."""

from pathlib import Path

import typer

from llmc.cli.options import Json
from llmc.cli.text import emit, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(short_help="Show what is installed.", epilog=examples("llmc doctor", "llmc doctor --json"))(
        doctor
    )


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what is missing and how to get it; exit with 4 if no CPU build can work."""
    from llmc.doctor import examine

    emit(examine(Path("artifacts")), as_json=as_json)
