"""The command `llmc bisect`."""

import typer

from llmc.cli.options import Against, Artifact, Force, Json, OriginalAdapter
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Find where results first diverge.",
        epilog=examples(
            "llmc bisect artifacts/demo/cpu-int4@local",
            "llmc bisect artifacts/mine --against ./my-model --json",
        ),
    )(bisect)


def bisect(
    artifact: Artifact,
    against: Against = None,
    adapter: OriginalAdapter = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find where ARTIFACT first diverges from the original: layer, operator and responsible step."""
    from llmc import pipeline

    result = pipeline.bisect(artifact, against, open_progress(), force=force, adapter=adapter)
    emit(result, as_json=as_json)
