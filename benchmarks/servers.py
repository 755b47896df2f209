"""Measure checkpoints for servers: formats, servers' arithmetic, quality and cost at 4 bits, ranks, faults.

    python benchmarks/servers.py [--only NAME,…] [--out FILE.json] [--iters 200] [--rounds 3]
                                 [--peers PYTHON] [--modelopt PYTHON] [--edgellm PYTHON]

Each check is settled by itself and written to the JSON file at once (schema: gpu_checks/record.py). A second
run with the same file takes from it what is measured with the same releases and code, and retries the rest.
The table is printed as Markdown. A check is "failed" if it ends with an error or misses its goal, and "not
measured" if an environment is missing.

    readers     forms read back bit for bit by readers of others (server_checks/readers.py)
    encodings   the same codes in compressed-tensors, gptq and awq: prompt log-probabilities in vLLM
    logits      transformers, vLLM and DeepSpeed against the artifact's own weights (`llmc verify --runtime`)
    quality     dNLL at 4 bits by group, against llm-compressor's GPTQ and AutoRound
    cost        wall time and peak memory of those builds, in turn
    stream      a build of 8 B parameters beside reading and writing its bytes (server_checks/stream.py)
    ranks       three ranks of the demo against one (server_checks/ranks.py)
    sabotage    faults of folders by `llmc verify`, and of the served path by vLLM (server_checks/sabotage.py)

Servers have the environments of `llmc servers install`, or those that its variables name. llm-compressor and
AutoRound share an environment that is made in the cache folder, unless --peers names an interpreter. They are
calibrated on the windows that llmc takes (32 of 512 tokens at most), and every tool stores the linear layers
of decoder layers in the same groups: of 128, and of 64 for the demo, whose 576 inputs 128 does not divide.
"""

import argparse
import sys
import time
from pathlib import Path

from common.machine import describe
from common.options import add_cache, make_parser
from gpu_checks.record import Identity, Outcome, Record, Status
from gpu_checks.table import shorten
from server_checks.check import Check, MissingError, Settings, versions
from server_checks.plan import CHECKS

from llmc.artifact.provenance import code_digest
from llmc.artifact.store.lock import output_lock
from llmc.pipeline.result import require_folder


def main() -> int:
    options = parse()
    names = tuple(filter(None, options.only.split(",")))
    chosen = [check for check in CHECKS if not names or check.matches(names)]
    if not chosen or any(not any(check.matches((name,)) for check in CHECKS) for name in names):
        raise SystemExit(f"no such check; known: {', '.join(check.name for check in CHECKS)}")
    require_folder(options.out.parent)
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        options.cache.resolve(),
        options.iters,
        options.rounds,
        *(None if each is None else each.absolute() for each in (options.peers, options.modelopt)),
        None if options.edgellm is None else options.edgellm.absolute(),
    )
    with output_lock(options.out.with_name(f".{options.out.name}.lock"), options.out):
        record = Record(options.out, describe())
        outcomes = [settle(check, settings, record) for check in chosen]
    print_table(chosen, outcomes)
    return int(any(outcome.status is Status.FAILED for outcome in outcomes))


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks/servers.json"))
    parser.add_argument("--only", default="", metavar="NAME,…")
    parser.add_argument("--iters", type=int, default=200, help="steps of AutoRound for each layer")
    parser.add_argument("--rounds", type=int, default=3, help="builds of each tool that are timed")
    for name, what in (("peers", "llm-compressor and AutoRound"), ("modelopt", ""), ("edgellm", "")):
        parser.add_argument(f"--{name}", type=Path, metavar="PYTHON", help=f"has {what or name}")
    return parser.parse_args()


def settle(check: Check, settings: Settings, record: Record) -> Outcome:
    """Run a check, or return what the file has of it."""
    code = code_digest("llmc")
    identity = Identity(artifact=check.facts(settings), versions=versions(), device="cpu")
    earlier = record.find(check.name, identity)
    if earlier is not None and earlier.status is Status.MEASURED and earlier.code == code:
        return earlier
    print(f"{check.name} …", file=sys.stderr, flush=True)
    start, why = time.monotonic(), None
    status, figures = Status.MEASURED, {}
    try:
        figures = check.run(settings)
        why = check.missed(figures)
        status = Status.FAILED if why else status
    except MissingError as error:
        status, why = Status.NOT_MEASURED, str(error)
    except Exception as error:  # noqa: BLE001 - a check that ends with an error is a row of the table
        status, why = Status.FAILED, f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return record.put(
        Outcome(
            check=check.name,
            identity=identity,
            status=status,
            why=why,
            figures=figures,
            seconds=seconds,
            code=code,
        )
    )


def print_table(checks: list[Check], outcomes: list[Outcome]) -> None:
    """Print one row of Markdown for each check."""
    print(f"{describe()}\n\n| measure | goal | figures |\n|---|---|---|")
    for check, outcome in zip(checks, outcomes, strict=True):
        shown = "; ".join(f"{name} {shorten(value)}" for name, value in outcome.figures.items())
        why = "" if outcome.why is None else f"{outcome.status.value}: {outcome.why}".replace("\n", " ")
        print(f"| {check.name} | {check.goal} | {'; '.join(part for part in (shown, why) if part)} |")


if __name__ == "__main__":
    sys.exit(main())
