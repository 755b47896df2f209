"""`llmc run`."""

import sys
from typing import Annotated

import typer

from llmc.cli.options import Artifact
from llmc.cli.text import examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Generate text.",
        epilog=examples(
            'llmc run artifacts/demo/cpu-int4@local "Name three rivers of Europe."',
            'llmc run artifacts/mine "Once upon a time" --max-tokens 64',
        ),
    )(run)


def run(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say to it.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens at most.")] = 256,
) -> None:
    """Generate text with ARTIFACT, greedily, as it comes: by its engine, or through onnxruntime-genai."""
    from llmc import pipeline

    pipeline.run(artifact, prompt, max_tokens, _write, open_progress())
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
