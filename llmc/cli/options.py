"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.", show_default=False)
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face folder, hub id (revision with @), GGUF file, or `demo`.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="ADAPTER",
        help="LoRA adapter in peft's layout that is merged into MODEL: a folder, or a hub id.",
    ),
]
OriginalAdapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="What is merged into the original, where it is not what the manifest names; `none` for nothing.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The original, where it is not what the manifest names."),
]
EvalText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Text for perplexity and KL divergence instead of the one that ships; - for standard input, "
        "may be given several times.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="DIR", help="Write report.json, junit.xml, report.md and report.html into DIR."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PERCENT",
        help="By how much a figure may be worse: a metric, or size; may be given several times. Figures "
        "with a confidence interval may not be worse beyond it.",
    ),
]
Every = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Measure everything although files, settings, tokenizer or weights have missed their gates.",
    ),
]
GatesOf = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME|FILE",
        help="Whose gates are held: `llmc targets`, or a target's YAML file.",
        show_default="the target that ARTIFACT was built for",
    ),
]
OwnGates = Annotated[
    bool,
    typer.Option(
        "--allow-own-gates",
        help="Let the gates in ARTIFACT differ from its target's, and hold them where no --target is named.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Draw the positions that are verified by another seed.",
        show_default="the digest of the artifact's files",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=1.0,
        help="Verify as many positions as are forecast to take this long, original and artifact together.",
        show_default="80",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on where MODEL is not the one that ARTIFACT was built from.")
]
SearchPath = Annotated[
    Path | None,
    typer.Option(
        "--path", metavar="DIR", help="Folder with your own targets/ and profiles/, searched first."
    ),
]
