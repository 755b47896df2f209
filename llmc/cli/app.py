"""The typer application, with one file per command."""

from typing import Annotated

import typer

from llmc import __version__
from llmc.cli import (
    bench,
    bisect,
    build,
    check,
    compare,
    doctor,
    inspect,
    profiles,
    report,
    run,
    servers,
    targets,
    tune,
    verify,
)
from llmc.cli.text import examples
from llmc.errors import ExitCode

app = typer.Typer(
    name="llmc",
    help="Compile a Hugging Face causal language model into a fused, quantized and verified artifact.",
    epilog=examples("llmc build demo", "llmc doctor", "llmc targets"),
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _module in (
    build,
    check,
    verify,
    bench,
    compare,
    report,
    bisect,
    tune,
    run,
    inspect,
    targets,
    profiles,
    servers,
    doctor,
):
    _module.register(app)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"llmc {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Handle the options that precede the command."""
    context.ensure_object(dict)["debug"] = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)
