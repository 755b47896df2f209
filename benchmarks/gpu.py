"""Settle what only a GPU can settle about artifacts for CUDA and TensorRT, in a given time.

    python benchmarks/gpu.py [--out FILE.json] [--minutes 8] [--only NAME,…] [--artifacts FOLDER]
                             [--device cpu] [--profile NAME]
    python benchmarks/gpu.py --prepare FOLDER [--drop-weights] [--profile NAME]

Each check is settled by itself and written to the JSON file at once (schema: gpu_checks/record.py). A second
run with the same file takes from it what is measured of the same artifact, releases and device, and retries
the rest. A missing part, such as a GPU, torch with CUDA or TensorRT, is a line "not measured", and so is what
the time does not allow. A check is "failed" if numbers are beyond the target's bounds, or if it ends with an
error. A device on which a product of two matrices comes out wrong has no figure at all.

    environment   GPU, driver, memory, clocks
    probe         whether the device computes
    doctor        what `llmc doctor` says
    parity        prompt, piece, steps and ragged batch on CUDA against the same graph on the CPU
    placement     nodes by provider, and copies between devices
    genai         tokens and ms a token as onnxruntime-genai serves it, without and with a CUDA graph
    decode        ms a step without and with a CUDA graph, beside PyTorch run eagerly, in turn
    compiled      the same beside torch.compile over a static cache
    ttft          time to first token
    pytorch       the runs of parity against PyTorch in float32 with the artifact's weights
    engine        TensorRT engines: parity against their ONNX graph on the CPU, ms a step
    memory        device memory after loading and after a prompt
    energy        joules a token
    verify, bench the commands, on the demo

--only takes names of checks, of artifacts, or both joined by a slash, such as
parity,llama-cuda-int4,decode/demo-cuda-int4. --prepare builds all artifacts where there is no GPU, and the
logits of PyTorch; with --drop-weights the large weights of the demo and of the larger shape are left out, and
others are drawn from a seed when they are needed. What is missing is built first, within the time. The exit
code is 1 if a check failed, otherwise 0; docs/gpu-check.md has more.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from common.machine import describe
from common.options import make_parser
from gpu_checks.build import prepare
from gpu_checks.checks import Settings
from gpu_checks.machine import describe_gpu
from gpu_checks.plan import list_checks, list_subjects
from gpu_checks.record import Record, Status
from gpu_checks.run import Run
from gpu_checks.table import print_table
from gpu_checks.worker import Worker

from llmc.artifact.store.lock import output_lock
from llmc.catalog import list_profiles
from llmc.cli.signals import catch_signals
from llmc.errors import LlmcError, ResourceError
from llmc.gpu import require_gpu
from llmc.pipeline.result import require_folder
from llmc.profile import find_profile

#: Profile of artifacts that are built without a GPU; the graph for CUDA is the same for all.
PROFILE = "h200"


def main() -> int:
    options = parse()
    names = tuple(filter(None, options.only.split(",")))
    if options.prepare is not None:
        built = prepare(
            list_subjects(), options.prepare, options.profile or PROFILE, drop=options.drop_weights
        )
        return 0 if built else 1
    deadline = time.monotonic() + 60 * options.minutes
    device, no_gpu = find_device(options.device)
    settings = Settings(options.artifacts.resolve(), no_gpu is None, options.profile or host_profile(no_gpu))
    checks = list_checks(settings)
    unknown = [name for name in names if not any(check.matches((name,)) for check in checks)]
    if unknown:
        raise SystemExit(f"no check is named {', '.join(unknown)}; --help lists them")
    require_folder(options.out.parent)
    with output_lock(options.out.with_name(f".{options.out.name}.lock"), options.out):
        worker = Worker(settings)
        run = Run(settings, Record(options.out, describe()), worker, device, deadline, no_gpu)
        try:
            run.go(checks, names)
        except BaseException:
            worker.stop(idle=False)  # it is in the middle of a check
            raise
        worker.stop()
    print(f"{device}; {describe()}")
    print_table(run.outcomes)
    return int(any(outcome.status is Status.FAILED for outcome in run.outcomes))


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks/gpu.json"))
    parser.add_argument("--minutes", type=a_time, default=8.0)
    parser.add_argument("--only", default="", metavar="NAME,…")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/benchmarks/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile", help="what artifacts are built for; this machine's GPU if there is one")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--drop-weights", action="store_true")
    return parser.parse_args()


def a_time(text: str) -> float:
    """Read a number of minutes.

    Raises:
        argparse.ArgumentTypeError: It is not a number, or is negative.
    """
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes")
    return minutes


def find_device(wanted: str) -> tuple[str, str | None]:
    """Return the device in words, and why no GPU is measured."""
    if wanted == "cpu":
        return "cpu", "the CPU is asked for"
    try:
        return describe_gpu(), None
    except ResourceError as error:
        return "cpu", error.fact


def host_profile(no_gpu: str | None) -> str:
    """Return the name of the profile of this machine's GPU, or of another GPU with its capability."""
    if no_gpu is not None:
        return PROFILE
    gpu, profiles = require_gpu(), [each.document for each in list_profiles()]
    alike = (each for each in profiles if each.compute_capability == gpu.capability)
    profile = find_profile(gpu.name, profiles) or next(alike, None)
    return PROFILE if profile is None else profile.name


if __name__ == "__main__":
    with catch_signals() as stopped:
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit(stopped.exit_code)
        except LlmcError as error:
            hint = f"\nhint: {error.hint}" if error.hint else ""
            raise SystemExit(f"error: {error.fact}{hint}") from error
