"""The command `llmc inspect`."""

from typing import Annotated

import typer

from llmc.cli.options import Json, SearchPath
from llmc.cli.text import emit, examples, open_progress
from llmc.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show the contents of an artifact or model.",
        epilog=examples(
            "llmc inspect artifacts/demo/cpu-int4@local",
            "llmc inspect artifacts/demo/cpu-int4@local --explain skip-norm",
            "llmc inspect ./my-model --json",
            "llmc inspect ./my-model --support",
            "llmc inspect ./my-model --support --target cpu-int4,tensorrt-fp16 --json",
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
    show_support: Annotated[
        bool,
        typer.Option(
            "--support",
            help="Show what each target makes of a model, without a build; exit with 3 if none can take it.",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --support: only this target; separate several by commas.",
            show_default="all",
        ),
    ] = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show the operators, the passes applied and declined, the bits per tensor and the sizes."""
    from llmc import pipeline
    from llmc.catalog import list_targets, load_target

    if show_support and explain is None:
        if target is None:
            targets = [listed.document for listed in list_targets(path)]
        else:
            targets = [load_target(name, path) for name in target.split(",")]
        emit(pipeline.support(reference, targets, open_progress()), as_json=as_json)
        return
    if show_support or target is not None or path is not None:
        raise ConfigError("--target and --path belong to --support, which cannot be combined with --explain")
    result = pipeline.inspect(reference) if explain is None else pipeline.explain(reference, explain)
    emit(result, as_json=as_json)
