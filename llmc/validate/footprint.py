"""Measure load time and peak memory of one side in a separate process.

The parent runs `main` with a pickled `Job` on stdin and reads one line of JSON from stdout. With a process
per side, memory of one side is not counted for the other; the resident set of the parent is not inherited,
since the peak is read from the child's own memory map.
"""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from llmc.children import die_with_parent
from llmc.errors import ResourceError
from llmc.runtime.session import Session


@dataclass(frozen=True)
class ArtifactJob:
    """The job of opening an artifact under its runtime, with prompt length and decode steps.

    Args:
        open: Opens the artifact; picklable.
        module: Module of the runtime, imported before the clock starts.
    """

    open: Callable[[], Session]
    module: str
    prompt_tokens: int
    steps: int


@dataclass(frozen=True)
class OriginalJob:
    """The job of running the original under PyTorch: its picklable loader, prompt length and decode steps."""

    load: Callable[[], Any]
    threads: int
    prompt_tokens: int
    steps: int


@dataclass(frozen=True)
class Sample:
    """The load time of one process in ms, and its peak and last resident set in bytes if they are known."""

    load_ms: float
    peak_bytes: int | None
    steady_bytes: int | None


def take_sample(job: ArtifactJob | OriginalJob) -> Sample:
    """Run `job` in a new process.

    Raises:
        ResourceError: The process failed or was killed; the last line of its errors is the reason.
    """
    import json
    import os
    import subprocess

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.run(
        [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
        input=pickle.dumps(job),
        capture_output=True,
        env=environment,
        check=False,
    )
    if process.returncode != 0:
        reason = process.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ResourceError(
            f"the process that measures the memory of the {_side(job)} ended with {process.returncode}:"
            f" {reason[0]}",
            hint="a process that the system killed ends with -9: it ran out of memory",
        )
    return Sample(*json.loads(process.stdout.decode().splitlines()[-1]))


def resident_bytes() -> tuple[int | None, int | None]:
    """Return this process's peak and current resident set; None where the system does not report it.

    Linux reports both at once: it counts pages in batches, so that of two readings the later may be larger.
    """
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    if sys.platform != "linux":
        return None, None
    # VmHWM starts at zero with the process image; ru_maxrss would count the parent's.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) << 10, int(lines["VmRSS"].split()[0]) << 10


def _side(job: ArtifactJob | OriginalJob) -> str:
    return "artifact" if isinstance(job, ArtifactJob) else "original"


def _run(job: ArtifactJob | OriginalJob) -> Sample:
    import time

    import numpy as np

    prompt = np.arange(job.prompt_tokens, dtype=np.int64) % 7 + 1
    if isinstance(job, ArtifactJob):
        import_module(job.module)
        start = time.perf_counter()
        model = job.open()
        load_ms = 1e3 * (time.perf_counter() - start)
        model.prefill(prompt[None], steps=job.steps)
        for _ in range(job.steps):
            model.decode(prompt[None, :1])
    else:
        import torch
        import transformers.modeling_utils  # noqa: F401  (imported before the clock starts)

        from llmc.validate.reference import TorchModel

        torch.set_num_threads(job.threads)
        start = time.perf_counter()
        original = TorchModel(job.load())
        load_ms = 1e3 * (time.perf_counter() - start)
        original.prefill(prompt)
        for _ in range(job.steps):
            original.decode(1)
    return Sample(load_ms, *resident_bytes())


def main() -> None:
    """Run as the entry point of the child process."""
    die_with_parent()
    import json

    sample = _run(pickle.loads(sys.stdin.buffer.read()))
    sys.stdout.write(json.dumps([sample.load_ms, sample.peak_bytes, sample.steady_bytes]) + "\n")
