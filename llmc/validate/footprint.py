"""Measure load time and peak memory of one side in a separate process.

The parent runs `main` with a pickled `Job` on stdin and reads one line of JSON from stdout. With a process
per side, memory of one side is not counted for the other; the resident set of the parent is not inherited,
since the peak is read from the child's own memory map.
"""

import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifact.latency import Footprint
from llmc.children import die_with_parent
from llmc.errors import ResourceError
from llmc.gpu import gpu_memory_in_use
from llmc.runtime.failures import missing_resource
from llmc.runtime.session import Session
from llmc.validate.series import timing


@dataclass(frozen=True)
class ArtifactJob:
    """The job of opening an artifact under its runtime, with prompt length and decode steps.

    Args:
        open: Opens the artifact; picklable.
        module: Module of the runtime, imported before the clock starts.
        gpu: Whether it runs on the GPU, whose memory is then measured too.
    """

    open: Callable[[], Session]
    module: str
    prompt_tokens: int
    steps: int
    gpu: bool = False


@dataclass(frozen=True)
class OriginalJob:
    """The job of running the original under PyTorch: its picklable loader, prompt length and decode steps.

    Args:
        gpu: Whether it runs on the GPU, whose memory is then measured too.
    """

    load: Callable[[], Any]
    threads: int
    prompt_tokens: int
    steps: int
    gpu: bool = False


@dataclass(frozen=True)
class Sample:
    """The load time of one process in ms, and its memory in bytes.

    Args:
        peak_bytes: Peak resident set; None if the system does not report it.
        steady_bytes: Last resident set; None likewise.
        gpu_bytes: Memory of the GPU that was taken meanwhile; None if it was not used.
    """

    load_ms: float
    peak_bytes: int | None
    steady_bytes: int | None
    gpu_bytes: int | None


def measure_footprints(
    artifact: ArtifactJob, original: OriginalJob, rounds: int
) -> tuple[Footprint, Footprint]:
    """Measure load time and memory of both sides, in turn, with a process for each side and round."""
    jobs: tuple[ArtifactJob | OriginalJob, ...] = (artifact, original)
    samples = [tuple(take_sample(job) for job in jobs) for _ in range(rounds)]
    one, other = (_footprint([each[side] for each in samples], job) for side, job in enumerate(jobs))
    return one, other


def _footprint(samples: Sequence[Sample], job: ArtifactJob | OriginalJob) -> Footprint:
    peaks = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    steady = [s.steady_bytes for s in samples if s.steady_bytes is not None]
    return Footprint(
        load=timing([s.load_ms for s in samples]),
        peak_bytes=max(peaks, default=None),
        steady_bytes=int(np.median(steady)) if steady else None,
        gpu_bytes=max((s.gpu_bytes for s in samples if s.gpu_bytes is not None), default=None),
        prompt_tokens=job.prompt_tokens,
        decoded_tokens=job.steps,
    )


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
        last = process.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        reason = re.sub(r"^llmc\.errors\.\w+: ", "", last[0])
        raise ResourceError(
            f"the process that measures the memory of the {_side(job)} ended with {process.returncode}:"
            f" {reason}",
            hint=missing_resource(reason)
            or "a process that the system killed ends with -9: it ran out of memory",
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

    prompt = np.arange(job.prompt_tokens, dtype=np.int64) % 7 + 1
    before = gpu_memory_in_use() if job.gpu else None
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
    taken = None if before is None else gpu_memory_in_use() - before
    return Sample(load_ms, *resident_bytes(), taken)


def main() -> None:
    """Run as the entry point of the child process."""
    die_with_parent()
    import json

    sample = _run(pickle.loads(sys.stdin.buffer.read()))
    sys.stdout.write(json.dumps(astuple(sample)) + "\n")
