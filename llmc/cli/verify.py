"""`llmc verify`."""

import typer

from llmc.cli.options import Against, Artifact, EvalText, Force, Json
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Run the parity gate again.",
        epilog=examples(
            "llmc verify artifacts/demo/cpu-int4@local",
            "llmc verify artifacts/mine --against ./my-model --eval-text domain.txt --json",
        ),
    )(verify)


def verify(
    artifact: Artifact,
    against: Against = None,
    eval_text: EvalText = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run the parity gate of ARTIFACT again, on this machine; exit 5 if it fails."""
    from llmc import pipeline

    emit(pipeline.verify(artifact, against, eval_text or (), open_progress(), force=force), as_json=as_json)
