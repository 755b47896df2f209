"""The command `llmc report`."""

from typing import Annotated

import typer

from llmc.cli.options import Artifact, Json
from llmc.cli.text import emit, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Combine an artifact's reports into one page.",
        epilog=examples("llmc report artifacts/demo/cpu-int4@local --open"),
    )(report)


def report(
    artifact: Artifact,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write report.html from the reports in ARTIFACT, next to other artifacts of its model."""
    from llmc import pipeline

    page = pipeline.report(artifact)
    emit(page, as_json=as_json)
    if open_it:
        typer.launch(str(page.path))
