"""`llmc bench`."""

import typer

from llmc.cli.options import Against, Artifact, Force, Json
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Measure latency beside the original.",
        epilog=examples(
            "llmc bench artifacts/demo/cpu-int4@local",
            "llmc bench artifacts/mine --against ./my-model --json",
        ),
    )(bench)


def bench(artifact: Artifact, against: Against = None, force: Force = False, as_json: Json = False) -> None:
    """Measure the latency of ARTIFACT, interleaved with the original; exit 6 if a latency gate fails."""
    from llmc import pipeline

    emit(pipeline.bench(artifact, against, open_progress(), force=force), as_json=as_json)
