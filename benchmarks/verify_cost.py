"""Measure CPU time and peak memory of `llmc verify` on a model that does not fit in memory, by stage.

    python benchmarks/verify_cost.py [--layers 32] [--vocabulary 128256] [--target cpu-int4] [--kill SECONDS]

The model has the shape of Llama-3.1-8B and random weights: 16 GB of bfloat16 with all layers, and the
artifact's 5 GB beside them; both are removed afterwards. The original is streamed from disk however much
memory there is, as if float32 did not fit in half of it. With fewer layers or tokens the cost is proportional
to the number of parameters, which is printed. `--kill` kills the run after so many seconds and starts it
again: the total of both is printed beside what the first of them had done.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.machine import describe
from common.models import make_llama_8b
from common.options import add_cache, make_parser
from common.timing import wait_for

#: Code that runs llmc as if no memory were free and every original were large.
STREAMED = (
    "from llmc.pipeline.gate import loaders, subject; from llmc.validate import quality;"
    "loaders.available_memory = subject.available_memory = lambda: 0; quality.LARGE_BYTES = 0;"
    "from llmc.cli import program; program()"
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--target", default="cpu-int4")
    parser.add_argument("--kill", type=float, help="seconds after which the first run is killed")
    add_cache(parser)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        work = Path(scratch)
        source, artifact = work / "model", work / "artifact"
        make_llama_8b(source, layers=options.layers, vocabulary=options.vocabulary)
        environment = {**os.environ, "LLMC_CACHE": str(work / "cache")}
        build = ["build", str(source), "--target", options.target, "--no-verify", "-o", str(artifact)]
        print(describe())
        matrices = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
        parameters = options.layers * matrices + 2 * options.vocabulary * 4096
        print(f"{parameters / 1e9:.2f} B parameters; {shutil.disk_usage(work).free / 1e9:.0f} GB free")
        run("build", build, environment)
        if options.kill is not None:
            run("verify, killed", ["verify", str(artifact)], environment, options.kill)
        run("verify", ["verify", str(artifact)], environment)
        run("verify, cached", ["verify", str(artifact)], environment)


def run(name: str, arguments: list[str], environment: dict[str, str], limit: float | None = None) -> None:
    """Print CPU and wall time and peak resident memory of one llmc command, and its stages."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", STREAMED, *arguments], env=environment)
    if limit is not None:
        time.sleep(limit)
        process.send_signal(signal.SIGKILL)
    usage = wait_for(process.pid)
    seconds = time.perf_counter() - start
    print(
        f"{name}: exit {usage.code}, {usage.cpu:.0f} CPU s, {seconds:.0f} s,"
        f" {usage.peak_bytes / 1e9:.2f} GB peak",
        flush=True,
    )


if __name__ == "__main__":
    main()
