"""The command `llmc check`."""

from typing import Annotated

import typer

from llmc.cli.options import Adapter, Json, Model, SearchPath
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what TensorRT would refuse, without a build.",
        epilog=examples(
            "llmc check demo --target tensorrt-int4 --profile rtx-4090",
            "llmc check ./my-model --target tensorrt-fp16 --profile t4,l4,h100-sxm",
            "llmc check ./my-model --target tensorrt-int8 --profile l4 --json",
        ),
    )(check)


def check(
    model: Model,
    target: Annotated[
        str, typer.Option(metavar="NAME", help="Target with backend tensorrt, listed by `llmc targets`.")
    ],
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="GPU to check for, listed by `llmc profiles`; separate several by commas."
        ),
    ],
    adapter: Adapter = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show every GPU and node that TensorRT would refuse, why, and what to do; exit with 3 if there are any.

    The command reads no weights and needs no GPU.
    """
    from llmc.plan import plan_build

    plan = plan_build(model, target=target, profile=profile, path=path, adapter=adapter)
    from llmc import pipeline

    emit(pipeline.check(plan, open_progress()), as_json=as_json)
