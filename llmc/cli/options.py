"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Folder of the artifact.", show_default=False)
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face folder, hub id (append @ and a revision), GGUF file, or `demo`.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="ADAPTER",
        help="LoRA adapter in peft's layout to merge into MODEL: a folder or a hub id.",
    ),
]
OriginalAdapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="Adapter to merge into the original, if not the one in the manifest; `none` for no adapter.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Original to compare with, if not the model that the manifest names."),
]
EvalText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Text for perplexity and KL divergence, in place of the shipped text; - reads standard input; "
        "can be repeated.",
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
        help="How much worse a figure may become: a metric or size; can be repeated. A figure with a "
        "confidence interval also fails if it becomes worse beyond that interval.",
    ),
]
Every = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Measure everything, even if files, settings, tokenizer or weights fail their gates.",
    ),
]
GatesOf = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME|FILE",
        help="Target whose gates apply: a name from `llmc targets`, or a target's YAML file.",
        show_default="the target that ARTIFACT was built for",
    ),
]
OwnGates = Annotated[
    bool,
    typer.Option(
        "--allow-own-gates",
        help="Permit ARTIFACT's gates to differ from its target's, and apply them without --target.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Seed for drawing the positions to verify.",
        show_default="the digest of the artifact's files",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=1.0,
        help="Forecast time that decides how many positions are verified, both sides together.",
        show_default="80",
    ),
]
Environments = Annotated[
    list[str] | None,
    typer.Option(
        "--environment",
        metavar="NAME=FOLDER",
        help="Folder of a server's environment, if not the folder that `llmc servers install` makes; can be "
        "repeated.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Continue even if the original is not the model that ARTIFACT was built from."
    ),
]
SearchPath = Annotated[
    Path | None,
    typer.Option(
        "--path", metavar="DIR", help="Folder with your own targets/ and profiles/; it is searched first."
    ),
]
