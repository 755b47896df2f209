"""Measure wall time and peak memory of a build beside onnxruntime-genai's own builder, without verification.

    python benchmarks/build_cost.py [--checkpoint demo|rescaled|llama-1b] [--rounds 3]

Both build int4 by block of 32 from one Hugging Face folder, in turn. llmc starts with an empty trace cache
every time (`cold`), and once more with the trace in it (`warm`). Memory is the peak resident set of the
process, as the operating system reports it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common.machine import describe
from common.options import add_checkpoint, make_parser
from common.peers import genai_command
from common.sources import checkpoint
from common.timing import spread, wait_for


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--target", default="cpu-int4")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source = checkpoint(options.checkpoint, options.cache)

    figures: dict[str, list[tuple[float, float]]] = {"llmc cold": [], "llmc warm": [], "genai": []}
    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        work = Path(scratch)
        bytecode = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        bytecode["PYTHONPYCACHEPREFIX"] = str(options.cache.resolve() / "bytecode")  # as installed
        for round_ in range(options.rounds):
            environment = {**bytecode, "LLMC_CACHE": str(work / f"cache{round_}")}
            command = [sys.executable, "-m", "llmc", "build", str(source), "--target", options.target]
            command += ["--no-verify", "-o", str(work / "ours")]
            for name in ("llmc cold", "llmc warm"):
                figures[name].append(run(command, environment))
            shutil.rmtree(work / "genai", ignore_errors=True)
            peer = genai_command(source, work / "genai", "int4")
            figures["genai"].append(run(peer, bytecode))
    print(describe())
    print(f"{options.checkpoint}, medians of {options.rounds} rounds")
    for name, runs in figures.items():
        seconds, peak = (np.median([run[i] for run in runs]) for i in (0, 1))
        print(f"{name:10} {seconds:6.1f} s  {peak / 1e9:5.2f} GB peak")
    for name in ("llmc cold", "llmc warm"):
        pairs = [(a[0] / b[0], a[1] / b[1]) for a, b in zip(figures[name], figures["genai"], strict=True)]
        wall, memory = zip(*pairs, strict=True)
        print(f"{name} / genai: wall {spread(wall)}, peak {np.median(memory):.2f}")


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return seconds and peak resident bytes of one command."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        usage = wait_for(process.pid)
        seconds = time.perf_counter() - start
        if usage.code:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.peak_bytes


if __name__ == "__main__":
    main()
