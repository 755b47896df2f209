"""The command `llmc profiles`."""

import json
from typing import Annotated

import typer

from llmc.cli.options import Json, SearchPath
from llmc.cli.text import examples

_app = typer.Typer(
    help="Show the hardware profiles that llmc can build for.",
    epilog=examples("llmc profiles", "llmc profiles show l4", "llmc profiles detect --json"),
    invoke_without_command=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the command and its sub-commands."""
    app.add_typer(_app, name="profiles")


@_app.callback()
def profiles(context: typer.Context, path: SearchPath = None, as_json: Json = False) -> None:
    """Show the hardware profiles that llmc can build for."""
    if context.invoked_subcommand is not None:
        return
    from llmc.catalog import list_profiles

    listed = list_profiles(path)
    if as_json:
        rows = [
            {
                "name": each.document.name,
                "kind": each.document.kind,
                "device": each.document.device,
                "file": str(each.file),
            }
            for each in listed
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(each.document.name) for each in listed)
    typer.echo(f"{'local':<{width}}  this machine; see `llmc profiles detect`")
    for each in listed:
        typer.echo(f"{each.document.name:<{width}}  {each.document.kind}  {each.document.device}")


@_app.command(epilog=examples("llmc profiles show rtx-4090"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the profile.", show_default=False)],
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show one profile and the source of each fact."""
    from llmc.catalog import load_profile
    from llmc.document import render_document

    profile = load_profile(name, path)
    typer.echo(profile.model_dump_json(indent=2) if as_json else render_document(profile))


@_app.command(epilog=examples("llmc profiles detect", "llmc profiles detect --cpu --json"))
def detect(
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Describe the CPU even if the machine has a GPU.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Describe this machine.

    For a CPU, the command measures the read bandwidth of its memory in a second or two.
    """
    from llmc.document import render_document
    from llmc.machine import detect_profile

    profile = detect_profile(gpu=not cpu, measure=True)
    typer.echo(profile.model_dump_json(indent=2) if as_json else render_document(profile))
