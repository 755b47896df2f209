"""Build every causal LM type that transformers lists, with tiny random weights, and print a line for each.

    python benchmarks/architectures.py [--only llama,gpt2] [--jobs 2] [--timeout 120] [--json FILE]

Each type is built for cpu-fp32 and compared with PyTorch: prefill, cached decode, a ragged batch and the
sliding window, within 1e-4 on every logit. Types without a working tiny config or model do not test
llmc and are left out of the percentage.
"""

import json
import multiprocessing
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from common.machine import describe
from common.options import make_parser

from llmc.config import Gate, Metric
from llmc.errors import LlmcError
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import EOS, save_tiny_model

TOLERANCE = 1e-4
METRICS = (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS, Metric.WINDOW_MAX_ABS)
EQUAL, DIFFERENT, REFUSED, CRASHED = "built and equal", "built, not equal", "refused", "crashed"
NO_MODEL = "no tiny model"


def attempt(model_type: str, answer: Connection) -> None:
    """Build one type in this process, and send the outcome."""
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LLMC_CACHE"] = f"{scratch}/cache"
        try:
            model = save_tiny_model(model_type, Path(scratch) / "model", tokenizer=True, eos_token_id=EOS)
        except Exception as error:  # noqa: BLE001 - transformers raises many kinds of errors on a config
            answer.send((NO_MODEL, first_line(error)))
            return
        try:
            answer.send(compare(model, Path(scratch) / "out"))
        except LlmcError as error:
            answer.send((REFUSED, first_line(error)))
        except Exception as error:  # noqa: BLE001 - the sweep continues, and reports the error
            answer.send((CRASHED, first_line(error)))


def compare(model: Path, output: Path) -> tuple[str, str]:
    """Build a checkpoint, and report how far its logits are from PyTorch's."""
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=output, verify=True)
    gates = tuple(Gate(metric=m, max=TOLERANCE, reason="float32 in another order") for m in METRICS)
    target = plan.target.model_copy(update={"gates": gates})
    result = build(plan.model_copy(update={"target": target}), SilentProgress())
    if result.verdict is None:
        raise SystemExit("the build measured nothing")
    figures = {c.metric.value: c.value for c in result.verdict.checks if c.value is not None}
    worst = max(figures, key=lambda name: figures[name])
    return (EQUAL if result.verdict.passed else DIFFERENT), f"{figures[worst]:.1e} in {worst}"


def first_line(error: Exception) -> str:
    text = error.fact if isinstance(error, LlmcError) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [""])[0][:160]


def run(model_type: str, seconds: float) -> tuple[str, str, str]:
    """Run `attempt` in a separate process, within a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=attempt, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        outcome, detail = ours.recv() if ours.poll(seconds) else (CRASHED, f"no answer in {seconds:.0f} s")
    except EOFError:
        outcome, detail = CRASHED, "the process ended without an answer"
    process.kill()
    process.join()
    return model_type, outcome, detail


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = make_parser(__doc__)
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one type")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    types = options.only.split(",") if options.only else sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for model_type, outcome, detail in pool.map(lambda t: run(t, options.timeout), types):
            print(f"{model_type:28} {outcome:17} {detail}", flush=True)
            results.append({"type": model_type, "outcome": outcome, "detail": detail})
    tiny = [r for r in results if r["outcome"] != NO_MODEL]
    equal = sum(r["outcome"] == EQUAL for r in tiny)
    print(describe())
    print(
        f"{len(types)} types, {len(tiny)} can be made tiny, {equal} built and equal: {equal / len(tiny):.0%}"
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=1))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
