"""The command `llmc targets`."""

import json
from typing import Annotated

import typer

from llmc.cli.options import Json, SearchPath
from llmc.cli.text import examples

_app = typer.Typer(
    help="Show the targets that llmc can build.",
    epilog=examples("llmc targets", "llmc targets show cpu-int4", "llmc targets --path ./mine --json"),
    invoke_without_command=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the command and its sub-command."""
    app.add_typer(_app, name="targets")


@_app.callback()
def targets(context: typer.Context, path: SearchPath = None, as_json: Json = False) -> None:
    """Show the targets that llmc can build."""
    if context.invoked_subcommand is not None:
        return
    from llmc.catalog import list_targets

    listed = list_targets(path)
    if as_json:
        rows = [
            {"name": each.document.name, "summary": each.document.summary, "file": str(each.file)}
            for each in listed
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(each.document.name) for each in listed)
    for each in listed:
        typer.echo(f"{each.document.name:<{width}}  {each.document.summary}")


@_app.command(epilog=examples("llmc targets show cpu-int4"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the target.", show_default=False)],
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show one target: passes, precision, gates with reasons.

    A comment names the file that states each value: the target's own file, or one that it extends.
    """
    from llmc.catalog import find_target_origins, load_target
    from llmc.document import render_document

    target = load_target(name, path)
    if as_json:
        typer.echo(target.model_dump_json(indent=2))
    else:
        typer.echo(render_document(target, find_target_origins(name, path)))
