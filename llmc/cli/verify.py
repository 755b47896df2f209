"""The command `llmc verify`."""

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import (
    Against,
    Allow,
    Artifact,
    Budget,
    Environments,
    EvalText,
    Every,
    Force,
    GatesOf,
    Json,
    OriginalAdapter,
    OwnGates,
    Report,
    SearchPath,
    Seed,
)
from llmc.cli.text import emit, examples, open_progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Run the parity gate again.",
        epilog=examples(
            "llmc verify artifacts/demo/cpu-int4@local --report out/",
            "llmc verify artifacts/mine --baseline last/report.json --allow size=2",
            "llmc verify artifacts/mine --target targets/mine.yaml",
            "llmc verify artifacts/mine --task questions.yaml --report out/",
            "llmc verify artifacts/mine --runtime vllm --runtime deepspeed",
            "llmc verify artifacts/mine --against ./my-model --eval-text domain.txt --json",
        ),
    )(verify)


def verify(
    artifact: Artifact,
    against: Against = None,
    adapter: OriginalAdapter = None,
    eval_text: EvalText = None,
    force: Force = False,
    report: Report = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT", help="report.json of the last release; exit with 5 if ARTIFACT is worse."
        ),
    ] = None,
    allow: Allow = None,
    each_pass: Annotated[
        bool, typer.Option("--each-pass", help="Also compare the graph before and after every pass.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Also measure the accuracy on a multiple-choice task of lm-evaluation-harness "
            "(extra lm-eval), given by its name or as a YAML file; can be repeated.",
        ),
    ] = None,
    task_items: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Use only the first N items of each task.", show_default=False),
    ] = None,
    every: Every = False,
    target: GatesOf = None,
    path: SearchPath = None,
    own_gates: OwnGates = False,
    seed: Seed = None,
    budget: Budget = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also load ARTIFACT, a checkpoint, by this server, which `llmc servers` lists, in its own "
            "environment, and hold what it computes to the gates; can be repeated.",
        ),
    ] = None,
    environment: Environments = None,
    server_seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1.0, help="Most time that each server may take."),
    ] = 1800.0,
    as_json: Json = False,
) -> None:
    """Run the parity gate of ARTIFACT again on this machine; exit with 5 if it fails."""
    from llmc import pipeline
    from llmc.pipeline.gate.servers import Runtimes

    result = pipeline.verify(
        artifact,
        against,
        eval_text or (),
        open_progress(),
        force=force,
        adapter=adapter,
        target=target,
        search=path,
        own_gates=own_gates,
        folder=report,
        baseline=baseline,
        allow=tuple(allow or ()),
        each_pass=each_pass,
        tasks=tuple(task or ()),
        task_items=task_items,
        seed=seed,
        budget=budget,
        every=every,
        runtimes=Runtimes(tuple(runtime or ()), tuple(environment or ()), server_seconds),
    )
    emit(result, as_json=as_json)
