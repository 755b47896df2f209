"""Measure how close decoding comes to the time that memory needs to deliver what a step reads.

    python benchmarks/memory_bound.py [--checkpoint rescaled] [--target cpu-int4-compiled] [--contexts 128 …]

A step reads every packed weight once and the KV cache of its context. As many threads read a buffer of as
many bytes (reading.cpp), in turn with decoding through onnxruntime-genai; a cache of the CPU that keeps part
of either keeps as much of the other. The fraction is the time of reading over the time of a step.
"""

import ctypes
import tempfile
from pathlib import Path

import numpy as np
from common.machine import describe
from common.options import add_checkpoint, add_timing, make_parser
from common.runners import build_ours
from common.sources import checkpoint

from llmc.artifact.store.folder import open_artifact
from llmc.backends.compiled.toolchain import TranslationUnit, compile_library, find_compiler
from llmc.graph.interface import Interface

PASSES = 20
BYTES = {"float32": 4, "float16": 2, "int8": 1}


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser, "rescaled")
    parser.add_argument("--target", default="cpu-int4-compiled")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    add_timing(parser, steps=32)
    parser.set_defaults(batch=1, path=None)
    options = parser.parse_args()
    runner = build_ours(checkpoint(options.checkpoint, options.cache), options.target, options)
    weights = (runner.model / "model.onnx.data").stat().st_size
    row = bytes_of_token(open_artifact(runner.model).manifest.interface)
    reader = load_reader()
    print(describe())
    runner.start(options.threads)
    for context in options.contexts:
        size = weights + row * (context + options.steps // 2)
        buffer = np.ones(size + 64, np.uint8)
        start = buffer.ctypes.data + -buffer.ctypes.data % 64
        reading = []
        for round_ in range(-1, options.rounds):
            pass_seconds = reader(start, size, options.threads, PASSES)
            runner.ask(context, options.steps, 1, counted=round_ >= 0)
            reading += [1e3 * pass_seconds] * (round_ >= 0)
        steps = runner.step_ms[context]
        parts = [a / b for a, b in zip(reading, steps, strict=True)]
        print(
            f"context {context:5}: {size / 1e6:.0f} MB read in {np.median(reading):.2f} ms "
            f"({size / np.median(reading) / 1e6:.0f} GB/s), a step {np.median(steps):.2f} ms: "
            f"{np.median(reading) / np.median(steps):.0%} ({min(parts):.0%}-{max(parts):.0%}) of the limit"
        )
    runner.stop()


def bytes_of_token(interface: Interface) -> int:
    """Return the bytes of the KV cache per token."""
    types = {spec.name: spec.dtype for spec in interface.inputs}
    return sum(
        slot.kv_heads * (slot.key_width + slot.value_width) * BYTES[types[slot.past_key]]
        for slot in interface.cache
    )


def load_reader():  # type: ignore[no-untyped-def]
    """Load `seconds_of_pass` of reading.cpp."""
    source = Path(__file__).with_name("reading.cpp").read_text()
    flags = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread")
    library = compile_library(
        find_compiler(), {"reading.cpp": source}, (TranslationUnit("reading.cpp"),), flags
    )
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        function = ctypes.CDLL(file.name).seconds_of_pass
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return function


if __name__ == "__main__":
    main()
