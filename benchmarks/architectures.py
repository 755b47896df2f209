"""Build every language model type that transformers lists, with tiny random weights, and print the result.

    python benchmarks/architectures.py [--only llama,gpt2] [--targets cpu-fp32,cpu-int4] [--jobs 2]
                                       [--timeout 120] [--json FILE] [--earlier FILE]

Each type is built for cpu-fp32 and compared with PyTorch: a prompt, the same in pieces, cached decode, a
ragged batch and the sliding window, within 1e-4 on every logit, or as far as rounding moves PyTorch itself.
Wanted types are also built for cpu-int4 and cpu-int4-compiled under the gates of these targets, with calmer
weights. The tiny model has every kind of layer of the type's default config; module classes and kinds that it
lacks are printed. Types without a working tiny config or model do not test llmc and are left out of the
percentage.

With `--earlier`, types that are not run keep the rows of that JSON file. If every type has a row, the
document docs/architectures.md is written.
"""

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from common.architecture_rows import (
    CRASHED,
    DIFFERENT,
    EQUAL,
    HELD,
    MISSED,
    NO_MODEL,
    REFUSED,
    ROUNDED,
    Result,
    Row,
    describe_capture,
    read_rows,
    render_document,
    totals,
    write_rows,
)
from common.machine import describe
from common.options import make_parser

from llmc.config import Dtype, Gate, Metric
from llmc.errors import LlmcError
from llmc.pipeline import build
from llmc.pipeline.inspect import inspect
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.trace.tracer import trace_model
from tests.architectures import (
    build_on_meta,
    causal_types,
    default_config,
    lacking,
    language_model_types,
    layers_of,
)
from tests.models import EOS, build_tiny_model, save_tiny_model, tiny_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
EXACT = "cpu-fp32"
TARGETS = (EXACT, "cpu-int4", "cpu-int4-compiled")
TOLERANCE = 1e-4
#: The gain of matrices of models for other targets; the introduction of the document says why.
GAIN = 0.5
METRICS = (
    Metric.PREFILL_MAX_ABS,
    Metric.CHUNKS_MAX_ABS,
    Metric.DECODE_MAX_ABS,
    Metric.RAGGED_MAX_ABS,
    Metric.WINDOW_MAX_ABS,
)
# The families that are downloaded most, or asked for.
WANTED = {
    "bamba", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "exaone4", "falcon_h1", "gemma3",
    "gemma3n_text", "gemma4", "glm4_moe", "gpt_oss", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe",
    "llama4", "mamba2", "mistral3", "nemotron_h", "olmo3", "qwen3_5", "qwen3_next", "qwen3_vl", "zamba2",
}  # fmt: skip


def attempt(model_type: str, targets: Sequence[str], answer: Connection) -> None:
    """Build one type in this process, and send its row, and again with each result."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    row = Row(model_type)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LLMC_CACHE"] = f"{scratch}/cache"
        try:
            row.layers, row.lacks = compare_layers(model_type)
            run_original(model_type)
            model = checkpoint_for(EXACT, model_type, Path(scratch))
        except Exception as error:  # noqa: BLE001 - transformers raises many kinds of errors on a config
            row.results[targets[0]] = Result(NO_MODEL, first_line(error))
            answer.send(row)
            return
        answer.send(row)
        try:
            inspection = inspect(str(model))
            row.captured = describe_capture(inspection.operators, inspection.notes)
        except Exception as error:  # noqa: BLE001 - the sweep continues, and reports the error
            row.results = dict.fromkeys(targets, failure(error))
            answer.send(row)
            return
        for target in targets:
            try:
                checkpoint = checkpoint_for(target, model_type, Path(scratch))
                row.results[target] = compare(checkpoint, Path(scratch) / target, target)
            except Exception as error:  # noqa: BLE001 - the sweep continues, and reports the error
                row.results[target] = failure(error)
            answer.send(row)


def checkpoint_for(target: str, model_type: str, scratch: Path) -> Path:
    """Write the tiny model that is built for `target`, unless it is there already."""
    gain = None if target == EXACT else GAIN
    folder = scratch / f"model-{gain}"
    if not folder.exists():
        save_tiny_model(model_type, folder, tokenizer=True, gain=gain, eos_token_id=EOS)
    return folder


def failure(error: Exception) -> Result:
    """Return the result of a type that is refused, or that llmc crashes on."""
    return Result(REFUSED if isinstance(error, LlmcError) else CRASHED, first_line(error))


def run_original(model_type: str) -> None:
    """Run the tiny model in PyTorch on text alone.

    Raises:
        Exception: Any that its code raises, or a ValueError if its logits are not finite.
    """
    import torch

    model = build_tiny_model(model_type, eos_token_id=EOS)
    with torch.inference_mode():
        logits = model(torch.arange(3, 15)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the tiny model's logits are not finite in PyTorch")


def compare_layers(model_type: str) -> tuple[str, list[str]]:
    """Say how many layers the tiny model has of the default one's, and what it lacks."""
    tiny = build_on_meta(tiny_config(model_type))
    kept = len(layers_of(tiny))
    default = default_config(model_type)
    if default is None:
        return f"{kept}", []
    full = build_on_meta(default)
    return f"{kept} of {len(layers_of(full))}", lacking(full, tiny)


def compare(model: Path, output: Path, target: str) -> Result:
    """Build a checkpoint, and report how far its logits are from PyTorch's, or which gates it misses."""
    plan = plan_build(str(model), target=target, profile="local", output=output, verify=True)
    if target == EXACT:
        gates = tuple(Gate(metric=m, max=TOLERANCE, reason="float32 in another order") for m in METRICS)
        plan = plan.model_copy(update={"target": plan.target.model_copy(update={"gates": gates})})
    result = build(plan, SilentProgress())
    if result.verdict is None:
        raise SystemExit("the build measured nothing")
    passed = result.verdict.passed
    figures = {c.metric.value: c.value for c in result.verdict.checks if c.value is not None}
    if target == EXACT:
        worst = max(figures, key=lambda name: figures[name])
        equal = EQUAL if figures[worst] <= TOLERANCE else ROUNDED
        return Result(equal if passed else DIFFERENT, f"{figures[worst]:.1e} in {worst}")
    missed = [
        f"{c.metric.value} {'not measured' if c.value is None else f'{c.value:.3g}'}"
        for c in result.verdict.missed
    ]
    stated = [f"{m.value} {figures[m.value]:.1e}" for m in (Metric.TEXT_KL_MEAN,) if m.value in figures]
    return Result(HELD if passed else MISSED, ", ".join(missed or stated))


def first_line(error: Exception) -> str:
    text = error.fact if isinstance(error, LlmcError) else f"{type(error).__name__}: {error}"
    return " ".join(text.strip().split())[:300]


def run(model_type: str, targets: Sequence[str], seconds: float) -> Row:
    """Run `attempt` in a separate process, within a time limit for each target."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=attempt, args=(model_type, targets, theirs))
    process.start()
    theirs.close()
    row = Row(model_type)
    while row.first.outcome != NO_MODEL and (missing := [t for t in targets if t not in row.results]):
        try:
            answer = ours.recv() if ours.poll(seconds) else f"no answer in {seconds:.0f} s"
        except EOFError:
            answer = "the process ended without an answer"
        if isinstance(answer, str):
            row.results |= dict.fromkeys(missing, Result(CRASHED, answer))
        else:
            row = answer
    process.kill()
    process.join()
    return row


def warm_up() -> None:
    """Import and prepare in this process what every forked one needs, by tracing a model."""
    trace_model(tiny_config("llama"), Dtype.FLOAT32)


def targets_of(model_type: str, stated: str | None) -> tuple[str, ...]:
    if stated:
        return tuple(stated.split(","))
    return TARGETS if model_type in WANTED else (EXACT,)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--targets", help="targets, separated by commas, for every type")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one target of one type")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--earlier", type=Path, help="file with rows of an earlier run")
    options = parser.parse_args()
    every = language_model_types()
    types = options.only.split(",") if options.only else every

    rows = read_rows(options.earlier) if options.earlier else {}
    warm_up()
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda t: run(t, targets_of(t, options.targets), options.timeout), types):
            for target, result in row.results.items():
                print(f"{row.type:28} {target:18} {result.outcome:19} {result.detail}", flush=True)
            if row.lacks:
                print(f"{'':28} lacks {', '.join(row.lacks)}", flush=True)
            rows[row.type] = row
            if options.json:
                write_rows(options.json, describe(), rows.values())
    print(describe())
    print(totals(rows.values()))
    if set(every) <= rows.keys():
        kept = [rows[model_type] for model_type in every]
        document = render_document(describe(), kept, TARGETS, causal_types())
        DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
