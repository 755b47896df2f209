"""The command `llmc tune`."""

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import Adapter, EvalText, Json, Model, SearchPath
from llmc.cli.text import emit, examples, open_progress

FirstTargets = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Target to start from; candidates keep its passes, types and kernels. Separate several by "
        "commas; times are ratios to the first.",
    ),
]
Hardware = Annotated[
    str,
    typer.Option(metavar="NAME", help="Hardware to build for; candidates are measured on this machine."),
]
MaxKl = Annotated[
    float | None, typer.Option(metavar="NATS", help="Maximum KL divergence from the original per token.")
]
MaxSize = Annotated[float | None, typer.Option(metavar="MB", help="Maximum total size of all files.")]
MinSpeed = Annotated[
    float | None, typer.Option(metavar="TOKENS", help="Minimum tokens per second in decode.")
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Time for measuring candidates, over all runs of the same tuning, such as 90s, 30m or 1.5h.",
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Maximum number of candidates in addition to the first target."),
]
TargetFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File to write the target to. If its folder is named targets, builds find "
        "it with --path and the parent of that folder.",
        show_default="artifacts/<model>/targets/<target>-tuned.yaml",
    ),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Write tuning.json and tuning.html, with charts, into DIR."),
]


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
    target: FirstTargets = "cpu-int4",
    profile: Hardware = "local",
    max_kl: MaxKl = None,
    max_size: MaxSize = None,
    min_tok_s: MinSpeed = None,
    budget: Budget = "30m",
    candidates: Candidates = None,
    output: TargetFile = None,
    report: ReportFolder = None,
    eval_text: EvalText = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Measure candidates within a time limit, show the Pareto front, and write the best target as YAML.

    Among the candidates that meet the constraints, the result is the one closest to the original; with
    --max-kl it is the fastest, and with --min-tok-s in addition the smallest. The command exits with 5 if no
    candidate meets the constraints, and with 6 if the nearest one is only too slow. A stopped tuning
    continues when it is run again.
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
