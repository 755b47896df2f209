"""The command `llmc servers`."""

import json
import shlex
import sys
from typing import Annotated

import typer

from llmc.cli.options import Environments, Json
from llmc.cli.text import examples, open_progress

_app = typer.Typer(
    help="Show or make the environments of the servers that `llmc verify --runtime` asks.",
    epilog=examples(
        "llmc servers",
        "llmc servers install vllm",
        "llmc servers install deepspeed --environment deepspeed=~/envs/deepspeed",
    ),
    invoke_without_command=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the command and its sub-commands."""
    app.add_typer(_app, name="servers")


@_app.callback()
def servers(context: typer.Context) -> None:
    """Show or make the environments of the servers that `llmc verify --runtime` asks."""
    if context.invoked_subcommand is None:
        show(None)


@_app.command(name="list", epilog=examples("llmc servers list --json"))
def show(environment: Environments = None, as_json: Json = False) -> None:
    """Show each server: the version that llmc installs, and what is in its environment."""
    from llmc.servers.environment import list_servers

    listed = list_servers(environment or ())
    if as_json:
        typer.echo(json.dumps([each.as_json() for each in listed], indent=2))
        return
    for each in listed:
        typer.echo(f"{each.recipe.name:<10} {each.status:<14} {each.detail}")


@_app.command(epilog=examples("llmc servers install vllm", "llmc servers install edgellm --python python3"))
def install(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A server that `llmc servers` lists.", show_default=False)
    ],
    python: Annotated[
        str,
        typer.Option(
            metavar="EXE",
            help="Interpreter to make the environment from.",
            show_default="the interpreter that runs llmc",
        ),
    ] = sys.executable,
    pip_args: Annotated[
        str,
        typer.Option(
            metavar="ARGS",
            envvar="PIP_ARGS",
            help="Arguments of every pip install, such as an index of torch for CPUs.",
        ),
    ] = "",
    environment: Environments = None,
) -> None:
    """Make the environment of a server, or continue an installation that was interrupted."""
    from llmc.servers.environment import (
        environment_folder,
        find_server,
        install_server,
        known_recipe,
        parse_environments,
    )

    recipe = known_recipe(name)
    folder = environment_folder(recipe, parse_environments(environment or ()).get(name))
    install_server(recipe, folder, open_progress(), python=python, pip_arguments=shlex.split(pip_args))
    found = find_server(name, folder)
    typer.echo(f"{found.name} {found.version} in {folder}")
