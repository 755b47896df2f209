"""`llmc tune`."""

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import Adapter, EvalText, Json, Model, SearchPath
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Find the best target for MODEL on this machine.",
        epilog=examples(
            "llmc tune demo --max-kl 0.2",
            "llmc tune demo --target cpu-int4,cpu-int4-compiled --min-tok-s 100 --budget 1h",
            "llmc tune ./my-model --max-size 80 -o mine/targets/small.yaml --report out",
            "llmc build ./my-model --target small --path mine",
        ),
    )(tune)


def tune(
    model: Model,
    adapter: Adapter = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What to start from; passes, types and kernels stay its own. Several with commas; times are "
            "ratios to the first.",
        ),
    ] = "cpu-int4",
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="For which machine; it is measured on this one.")
    ] = "local",
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Most KL divergence from the original per token.")
    ] = None,
    max_size: Annotated[float | None, typer.Option(metavar="MB", help="Most MB of all files.")] = None,
    min_tok_s: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="Least tokens per second in decode.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Time for candidates, over all runs of the same tuning: 90s, 30m, 1.5h.",
        ),
    ] = "30m",
    candidates: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most candidates besides the first target.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the target is written; in a folder targets, whose parent is --path of a build.",
            show_default="artifacts/<model>/targets/<target>-tuned.yaml",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="DIR", help="Write tuning.json and tuning.html, with pictures, into DIR."
        ),
    ] = None,
    eval_text: EvalText = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Measure candidates within a time, show the Pareto front, and write the best target as YAML.

    Of those that meet the constraints the most faithful is taken; the fastest if --max-kl is given; the
    smallest if --min-tok-s is, too. Exit 5 if none meets them, 6 if the nearest is only too slow. A tuning
    that was stopped goes on when it is run again.
    """
    from llmc import pipeline
    from llmc.plan import default_output

    first = target.split(",")[0]
    folder = default_output(model, first, profile, adapter).parent / "targets"
    place = output or folder / f"{first}-tuned.yaml"
    plan = pipeline.plan_tune(
        model,
        targets=target,
        profile=profile,
        output=place,
        max_kl=max_kl,
        max_size=max_size,
        min_tok_s=min_tok_s,
        budget=budget,
        most=candidates,
        report=report,
        eval_text=eval_text or (),
        path=path,
        adapter=adapter,
    )
    emit(pipeline.tune(plan, open_progress()), as_json=as_json)
