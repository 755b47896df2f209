"""The command `llmc run`."""

import sys
from typing import Annotated

import typer

from llmc.cli.options import Artifact, Json
from llmc.cli.text import emit, examples, open_progress
from llmc.progress import printable


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Generate text.",
        epilog=examples(
            'llmc run artifacts/demo/cpu-int4@local "Name three rivers of Europe."',
            'llmc run artifacts/mine "Once upon a time" --max-tokens 64',
            'llmc run artifacts/mine "Summarise: …" --lookup 7 --json',
        ),
    )(run)


def run(
    artifact: Artifact,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to answer or continue.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of new tokens.")] = 256,
    lookup: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draft up to N tokens per step from the text so far (prompt lookup), and accept those that "
            "the model also chooses.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text greedily with ARTIFACT and print it as it is generated.

    TensorRT artifacts run on their engine, all others through onnxruntime-genai.
    """
    from llmc import pipeline

    result = pipeline.run(artifact, prompt, max_tokens, _hold if as_json else _write, open_progress(), lookup)
    if as_json:
        emit(result, as_json=True)
    else:
        _write("\n")


def _hold(_: str) -> None:
    """Print nothing, because the JSON document contains the text."""


def _write(text: str) -> None:
    """Write a part of the text unchanged, or on a terminal with control characters escaped."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
