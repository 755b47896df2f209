"""Build TensorRT engines without a GPU: a table by target and profile, or the tiny architectures one by one.

    python benchmarks/engines.py [--targets tensorrt-fp16 …] [--profiles t4 rtx-4090 …]
    python benchmarks/engines.py --architectures

Seconds and peak memory (peak resident set) are those of the process that builds the engine, except for the
peak "without TensorRT", which is that of the process that lowers, quantizes and writes. The first engine of a
target is built twice. No engine is executed.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

from common.machine import describe
from common.options import make_parser
from common.timing import wait_for

from llmc.artifact.engine import EngineRecord
from llmc.artifact.manifest import FileDigest
from llmc.artifact.store.folder import open_artifact
from llmc.backends.tensorrt.support import EnginePlan, plan_engines
from llmc.catalog import list_targets, load_profile, load_target
from llmc.config import Engine, Span
from llmc.errors import LlmcError, UnsupportedError
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import EOS, MODEL_TYPES, save_tiny_model

TARGETS = (
    "tensorrt-fp16",
    "tensorrt-bf16",
    "tensorrt-int8",
    "tensorrt-w8a8",
    "tensorrt-fp8",
    "tensorrt-int4",
    "tensorrt-nvfp4",
)
PROFILES = ("t4", "rtx-3090", "rtx-4090", "rtx-5090", "dgx-spark")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--profiles", nargs="+", default=PROFILES)
    parser.add_argument("--architectures", action="store_true")
    options = parser.parse_args()
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.architectures:
            try_architectures(Path(scratch))
        else:
            print("target         profile     seconds     MB  peak GB  layers per decoder layer", flush=True)
            for target in options.targets:
                measure_target(options.model, target, options.profiles, Path(scratch) / target)


def measure_target(model: str, name: str, profiles: list[str], folder: Path) -> None:
    """Build one engine per profile from one graph."""
    target, targets = load_target(name), [listed.document for listed in list_targets()]
    plans: list[EnginePlan] = []
    for profile in profiles:
        try:
            plans += plan_engines(target, [load_profile(profile)], targets)
        except UnsupportedError as error:
            print(f"{name:14} {profile:10}  refused: {error.fact}", flush=True)
    if not plans or target.engine is None:
        return
    first = plan_build(model, target=name, profile=plans[0].profiles[0], output=folder, verify=False)
    build(first, SilentProgress())
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    print(f"{name:14} without TensorRT: peak {own / 1e9:.2f} GB", flush=True)
    known_digest = open_artifact(folder).manifest.files[plans[0].name]
    for plan in plans:
        record, digest, seconds, peak = build_measured(folder, plan, target.engine)
        if plan is plans[0]:
            same = "identical" if digest == known_digest else "different"
            print(f"{name:14} two builds in two processes: {same}, sha256 {digest.sha256}", flush=True)
        layers = ", ".join(f"{p.name} {p.layers_per_decoder_layer}" for p in record.phases)
        row = f"{name:14} {plan.profiles[0]:10} {seconds:8.1f} {digest.bytes / 1e6:6.1f} {peak / 1e9:8.2f}"
        print(f"{row}  {layers}", flush=True)


def build_measured(
    folder: Path, plan: EnginePlan, engine: Engine
) -> tuple[EngineRecord, FileDigest, float, float]:
    """Return the engine, seconds and peak resident bytes, measured in a separate process."""
    from llmc.backends.tensorrt.worker import Outcome, build_apart

    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        record, digest = build_apart(folder, plan, engine)
        os.write(write, Outcome(record=record, digest=digest).model_dump_json().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    usage = wait_for(child)
    outcome = Outcome.model_validate_json(text)
    if outcome.record is None or outcome.digest is None:
        raise SystemExit(f"no engine for {plan.name}")
    return outcome.record, outcome.digest, time.perf_counter() - start, usage.peak_bytes


def try_architectures(scratch: Path) -> None:
    """Report which tiny architectures build an engine for SM89, and why the others do not."""
    built = 0
    for model_type in MODEL_TYPES:
        model = save_tiny_model(model_type, scratch / model_type, tokenizer=True, eos_token_id=EOS)
        output = scratch / f"{model_type}.out"
        plan = plan_build(str(model), target="tensorrt-fp16", profile="l4", output=output, verify=False)
        if plan.target.engine is None:
            raise SystemExit("tensorrt-fp16 states no engine")
        sizes = {"kv_capacity": 128, "prefill": Span(least=1, typical=16, most=64)}
        engine = plan.target.engine.model_copy(update=sizes)
        target = plan.target.model_copy(update={"engine": engine})
        try:
            build(plan.model_copy(update={"target": target}), SilentProgress())
        except LlmcError as error:
            print(f"{model_type:14} {error.fact[:300]}", flush=True)
            continue
        built += 1
        prefill, decode = open_artifact(output).manifest.engines[0].phases
        fused = f"fused attention {prefill.fused_attention} and {decode.fused_attention} of 3 layers"
        print(f"{model_type:14} built, {fused}", flush=True)
    print(f"{built} of {len(MODEL_TYPES)} build an engine")


if __name__ == "__main__":
    main()
