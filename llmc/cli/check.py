"""The command `llmc check`."""

from typing import Annotated

import typer

from llmc.cli.options import Adapter, Json, SearchPath
from llmc.cli.text import emit, examples, open_progress
from llmc.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what TensorRT or a server would refuse, without a build.",
        epilog=examples(
            "llmc check demo --target tensorrt-int4 --profile rtx-4090",
            "llmc check ./my-model --target tensorrt-fp16 --profile t4,l4,h100-sxm",
            "llmc check ./my-model --target tensorrt-int8 --profile l4 --json",
            "llmc check ./my-model --target gptq-int4 --runtime vllm,edgellm",
            "llmc check --target modelopt-fp8 --runtime all",
        ),
    )(check)


def check(
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Target with backend tensorrt, or checkpoint with --runtime, listed by `llmc targets`.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face folder, hub id (append @ and a revision), GGUF file, or `demo`. May be left "
            "out with --runtime.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="GPU to check for, listed by `llmc profiles`; separate several by commas."
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Server that is to load the checkpoint, such as vllm; separate several by commas, or `all`.",
        ),
    ] = None,
    adapter: Adapter = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Show every GPU and node that TensorRT would refuse, or all that servers do with a target's checkpoint.

    It says why, and what to do; the exit code is 3 if anything is refused, or read wrongly. The command reads
    no weights and needs neither a GPU nor a server.
    """
    from llmc import pipeline

    if runtime is not None:
        from llmc.catalog import load_target

        if profile is not None:
            raise ConfigError("--profile is for targets of backend tensorrt, and --runtime for checkpoints")
        runtimes, resolved = pipeline.parse_runtimes(runtime), load_target(target, path)
        found = pipeline.check_servers(resolved, runtimes, model, adapter, open_progress())
        emit(found, as_json=as_json)
        return
    if model is None or profile is None:
        raise ConfigError(
            f"{'MODEL' if model is None else '--profile'} is missing",
            hint="name a model and a GPU, or a server by --runtime",
        )
    from llmc.plan import plan_build

    plan = plan_build(model, target=target, profile=profile, path=path, adapter=adapter)
    emit(pipeline.check(plan, open_progress()), as_json=as_json)
