"""The command `llmc bench`."""

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import (
    Against,
    Artifact,
    Force,
    GatesOf,
    Json,
    OriginalAdapter,
    OwnGates,
    Report,
    SearchPath,
)
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Measure latency next to the original's.",
        epilog=examples(
            "llmc bench artifacts/demo/cpu-int4@local",
            "llmc bench artifacts/new --previous artifacts/old",
            "llmc bench artifacts/mine --against ./my-model --json",
        ),
    )(bench)


def bench(
    artifact: Artifact,
    against: Against = None,
    adapter: OriginalAdapter = None,
    force: Force = False,
    report: Report = None,
    previous: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="Earlier artifact; the benchmark fails if ARTIFACT is slower."),
    ] = None,
    target: GatesOf = None,
    path: SearchPath = None,
    own_gates: OwnGates = False,
    as_json: Json = False,
) -> None:
    """Measure the latency of ARTIFACT, interleaved with the original's; exit with 6 if a gate fails."""
    from llmc import pipeline

    result = pipeline.bench(
        artifact,
        against,
        open_progress(),
        force=force,
        folder=report,
        previous=previous,
        adapter=adapter,
        target=target,
        search=path,
        own_gates=own_gates,
    )
    emit(result, as_json=as_json)
