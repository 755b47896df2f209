"""`llmc check`."""

from typing import Annotated

import typer

from llmc.cli.options import Adapter, Json, Model, SearchPath
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what TensorRT would refuse, before a build.",
        epilog=examples(
            "llmc check demo --target tensorrt-int4 --profile rtx-4090",
            "llmc check ./my-model --target tensorrt-fp16 --profile t4,l4,h100-sxm",
            "llmc check ./my-model --target tensorrt-int8 --profile l4 --json",
        ),
    )(check)


def check(
    model: Model,
    target: Annotated[
        str, typer.Option(metavar="NAME", help="A target of backend tensorrt: `llmc targets`.")
    ],
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="For which GPU: `llmc profiles`; several with commas.")
    ],
    adapter: Adapter = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show every GPU and every node that TensorRT would refuse, why, and what to do (exit 3 if there is one).

    Weights are not read, and no GPU is needed.
    """
    from llmc.plan import plan_build

    plan = plan_build(model, target=target, profile=profile, path=path, adapter=adapter)
    from llmc import pipeline

    emit(pipeline.check(plan, open_progress()), as_json=as_json)
