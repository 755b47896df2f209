"""The command `llmc compare`."""

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import Allow, Json
from llmc.cli.text import emit, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Compare two artifacts.",
        epilog=examples(
            "llmc compare artifacts/old artifacts/new",
            "llmc compare artifacts/old artifacts/new --allow size=2 --allow text.kl_mean=5 --json",
        ),
    )(compare)


def compare(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="Folder of the earlier artifact.", show_default=False)
    ],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="Folder of the later artifact.", show_default=False)
    ],
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Compare size, quality, speed, graph and bits; exit with 5 if AFTER is worse, 6 if it is only slower."""
    from llmc import pipeline

    emit(pipeline.compare(before, after, tuple(allow or ())), as_json=as_json)
