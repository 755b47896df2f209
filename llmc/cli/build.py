"""The command `llmc build`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmc.cli.options import Adapter, Budget, EvalText, Every, Json, Model, SearchPath, Seed
from llmc.cli.text import emit, examples, open_progress

TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Target to build, listed by `llmc targets`.",
        show_default="the best target for the profile",
    ),
]
Hardware = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Hardware to build for, listed by `llmc profiles`; engines accept several with commas.",
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder of the artifact.",
        show_default="artifacts/<model>/<target>@<profile>",
    ),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the parity gate.")]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Jinja template to use in place of the model's own."),
]
TokenIds = Annotated[
    bool,
    typer.Option(
        "--token-ids",
        help="Build even if onnxruntime-genai's tokenizer does not produce the model's tokens; "
        "`llmc run` then uses transformers' tokenizer.",
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=2,
        help="Also write a file for each of N ranks of tensor parallelism (backend checkpoint).",
        show_default=False,
    ),
]
ShardsFor = Annotated[
    Literal["vllm", "transformers"] | None,
    typer.Option(
        help="Whose names the tensors of ranks have: vLLM's (asks an installed vLLM), or transformers'. "
        "Default: vllm",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Treat MODEL as an artifact, and build its pending engines on this machine's GPU.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Compile MODEL into a verified artifact.",
        epilog=examples(
            "llmc build demo",
            "llmc build ./my-model --target cpu-int8 -o artifacts/mine",
            "llmc build ./base --adapter ./lora",
            "llmc build org/model@main --target cuda-int4 --profile l4 --no-verify",
            "llmc build ./my-model --target vllm-w4a16 --shards 2",
            "llmc build demo --target tensorrt-fp16 --profile rtx-4090,rtx-3090",
            "llmc build model.gguf --json > build.json",
        ),
    )(build)


def build(
    model: Model,
    adapter: Adapter = None,
    target: TargetName = None,
    profile: Hardware = "local",
    output: OutputFolder = None,
    eval_text: EvalText = None,
    no_verify: NoVerify = False,
    every: Every = False,
    chat_template: ChatTemplate = None,
    token_ids: TokenIds = False,
    resume: Resume = False,
    seed: Seed = None,
    budget: Budget = None,
    shards: Shards = None,
    shards_for: ShardsFor = None,
    path: SearchPath = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL into an artifact and check it against the target's gates; exit with 5 if one fails."""
    if resume:
        from llmc import pipeline

        emit(pipeline.resume(Path(model), open_progress()), as_json=as_json)
        return
    from llmc.errors import KernelError
    from llmc.plan import plan_build, read_eval_text

    choice = None
    if target is None:
        from llmc.defaults import choose_target

        choice = choose_target(profile, path)
        target = choice.target
    plan_for = partial(
        plan_build,
        model,
        profile=profile,
        output=output,
        verify=not no_verify,
        eval_text=read_eval_text(eval_text or (), verify=not no_verify),
        path=path,
        chat_template=chat_template,
        token_ids=token_ids,
        adapter=adapter,
        every_check=every,
        seed=seed,
        budget=budget,
        shards=shards,
        shards_for=shards_for,
    )
    plan = plan_for(target=target)
    from llmc import pipeline

    progress = open_progress()
    if choice is not None:
        progress.note(choice.reason)
    try:
        result = pipeline.build(plan, progress)
    except KernelError as error:
        if choice is None or choice.otherwise is None:
            raise
        progress.note(f"{error.fact}; building target {choice.otherwise} instead")
        result = pipeline.build(plan_for(target=choice.otherwise), progress)
    emit(result, as_json=as_json)
