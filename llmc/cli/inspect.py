"""The command `llmc inspect`."""

from typing import Annotated

import typer

from llmc.cli.options import Json
from llmc.cli.text import emit, examples


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show the contents of an artifact or model.",
        epilog=examples(
            "llmc inspect artifacts/demo/cpu-int4@local",
            "llmc inspect artifacts/demo/cpu-int4@local --explain skip-norm",
            "llmc inspect ./my-model --json",
        ),
    )(inspect)


def inspect(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|MODEL",
            help="Folder of an artifact, or a model as for `llmc build`.",
            show_default=False,
        ),
    ],
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="PASS", help="Show only where this pass applied, and why it declined elsewhere."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the operators, the passes applied and declined, the bits per tensor and the sizes."""
    from llmc import pipeline

    result = pipeline.inspect(reference) if explain is None else pipeline.explain(reference, explain)
    emit(result, as_json=as_json)
