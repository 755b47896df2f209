"""Measure the build of a checkpoint of 8 B parameters beside reading and writing the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from common.models import make_llama_8b
from common.timing import wait_for

from server_checks.check import Check, Figures, Settings

#: Goals: time of the build to that of reading and writing, and bytes of memory.
RATIO, PEAK = 2.0, 1.5e9
_LAYERS, _VOCABULARY, _CHUNK = 32, 128256, 16 << 20
#: Rounding to nearest by groups of 128, in the format of `vllm-w4a16`.
_TARGET = """\
name: stream
summary: "4-bit weights by groups of 128, rounded to nearest"
extends: vllm-w4a16
quantize:
  calibration: null
  accuracy_level: 0
  scales: bfloat16
  regrid: true
  rules:
    - {role: embedding, scheme: null}
    - {role: lm_head, scheme: null}
    - {scheme: {bits: 4, block_size: 128, symmetric: true, method: rtn}}
gates: []
"""


def list_checks() -> list[Check]:
    """Return the check of the build of a large checkpoint."""
    goal = f"<= {RATIO:g} x reading and writing, <= {PEAK / 1e9:g} GB"
    return [Check("stream", goal, partial(measure_stream, _LAYERS, _VOCABULARY), missed_stream)]


def measure_stream(layers: int, vocabulary: int, settings: Settings) -> Figures:
    """Return times in s of the build and of plain reading and writing, each from a cold page cache.

    The model has the shape of Llama-3.1-8B and random weights, and is removed afterwards.
    """
    with TemporaryDirectory(dir=settings.cache) as scratch:
        work = Path(scratch)
        source, output = work / "model", work / "output"
        make_llama_8b(source, layers=layers, vocabulary=vocabulary)
        weights = sorted(source.glob("*.safetensors"))
        forget(weights)
        figures = build(source, output, work)
        written = sorted(output.glob("*.safetensors"))
        forget([*weights, *written])
        start = time.perf_counter()
        for file in weights:
            read(file)
        figures["reading, s"] = time.perf_counter() - start
        size = sum(file.stat().st_size for file in written)
        start = time.perf_counter()
        write(work / "plain", size)
        figures["writing, s"] = time.perf_counter() - start
        figures["read, GB"] = sum(file.stat().st_size for file in weights) / 1e9
        figures["written, GB"] = size / 1e9
    figures["ratio"] = figures["build, s"] / (figures["reading, s"] + figures["writing, s"])
    return figures


def missed_stream(figures: Figures) -> str | None:
    """Return whether the build takes too long or too much memory."""
    if figures["ratio"] > RATIO:
        return f"the build takes {figures['ratio']:.2f} x the time of reading and writing"
    return f"{figures['peak, GB']:.2f} GB of memory" if figures["peak, GB"] > PEAK / 1e9 else None


def build(source: Path, output: Path, work: Path) -> Figures:
    """Build the checkpoint in a process of its own."""
    targets = work / "own" / "targets"
    targets.mkdir(parents=True)
    (targets / "stream.yaml").write_text(_TARGET)
    command = [sys.executable, "-m", "llmc", "build", str(source), "--target", "stream", "--no-verify"]
    command += ["--path", str(targets.parent), "-o", str(output)]
    with TemporaryFile() as log:
        start = time.perf_counter()
        usage = wait_for(subprocess.Popen(command, stdout=log, stderr=log).pid)
        seconds = time.perf_counter() - start
        if usage.code:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-2000:])
    return {"build, s": seconds, "CPU, s": usage.cpu, "peak, GB": usage.peak_bytes / 1e9}


def forget(files: list[Path]) -> None:
    """Write files to disk and drop them from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path) -> None:
    """Read a file from its first byte to its last."""
    buffer = bytearray(_CHUNK)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def write(file: Path, size: int) -> None:
    """Write as many bytes, down to the disk."""
    block = os.urandom(_CHUNK)
    with file.open("wb", buffering=0) as stream:
        for start in range(0, size, _CHUNK):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())
