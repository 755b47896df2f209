"""Quantize a checkpoint at 4 bits by group with llmc, llm-compressor or AutoRound, each in its own process.

The two other tools have one environment below the cache folder, with the versions in `peers.RECIPES`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.peers import make_environment
from common.timing import wait_for
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.config import CalibrationText
from llmc.data import calibration_text
from llmc.pipeline.steps.calibrate import cut_text
from llmc.pipeline.steps.original import tokenize

LLMC, GPTQ, AUTOROUND = "llmc", "llm-compressor GPTQ", "AutoRound"
#: The calibration text of every tool, as the targets of llmc state it.
TEXT = CalibrationText(window_tokens=512, max_windows=32)
#: Size of groups by checkpoint: 128 does not divide the 576 inputs of the demo.
GROUPS = {"rescaled": 64, "demo": 64, "gemma3-270m": 128}
_PROGRAM = Path(__file__).parents[1] / "server_checks" / "peer_quantize.py"


@dataclass(frozen=True)
class Scheme:
    """The settings of one comparison.

    Args:
        group: Number of inputs that share a scale.
        symmetric: Whether groups have no zero points.
        iters: Steps of AutoRound for each layer; its default is 200.
        scale_channels: Whether llmc scales channels (AWQ) before it rounds.
    """

    group: int
    symmetric: bool = True
    iters: int = 200
    scale_channels: bool = False


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds, CPU time in seconds and peak resident bytes of a process."""

    seconds: float
    cpu: float
    peak_bytes: float


def calibration_windows(source: Checkpoint) -> np.ndarray:
    """Return the calibration windows of llmc, (windows, length) int64, for every tool."""
    tokens, start = tokenize(source.tokenizer(), calibration_text())
    positions = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    windows: np.ndarray = cut_text(tokens, start, TEXT, positions)
    return windows


def quantize(tool: str, source: Path, output: Path, scheme: Scheme, cache: Path, python: Path | None) -> Cost:
    """Quantize a Hugging Face folder into `output`, which does not exist, with nothing cached.

    Args:
        cache: Folder for environments.
        python: Interpreter of an environment with both other tools; None for the one in `cache`.
    """
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder = Path(scratch)
        if tool == LLMC:
            (folder / "targets").mkdir()
            (folder / "targets" / "four-bits.yaml").write_text(json.dumps(target("four-bits", scheme)))
            command = [sys.executable, "-m", "llmc", "build", str(source), "--target", "four-bits"]
            command += ["--path", str(folder), "--profile", "local", "--no-verify", "-o", str(output)]
            return measure(command, LLMC_CACHE=str(folder / "cache"))
        interpreter = python or make_environment("quantizers", cache)
        windows = folder / "windows.npy"
        np.save(windows, calibration_windows(open_checkpoint(str(source))))
        name = "gptq" if tool == GPTQ else "autoround"
        command = [str(interpreter), "-P", str(_PROGRAM), name, str(source), str(windows), str(output)]
        command += ["--group", str(scheme.group), "--iters", str(scheme.iters)]
        return measure(command + ([] if scheme.symmetric else ["--asymmetric"]))


def target(name: str, scheme: Scheme, extends: str = "vllm-w4a16") -> dict[str, object]:
    """Return a target of 4-bit codes in linear layers of decoder layers, with all else in float."""
    form = {"bits": 4, "block_size": scheme.group, "symmetric": scheme.symmetric, "method": "gptq"}
    rules = [{"role": role, "scheme": None} for role in ("router", "embedding", "lm_head")]
    quantize = {"rules": [*rules, {"scheme": form}], "scale_channels": scheme.scale_channels}
    return {"name": name, "summary": "a benchmark's", "extends": extends, "quantize": quantize}


def measure(command: list[str], **variables: str) -> Cost:
    """Run a command; its last lines are shown if it fails.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
        usage = wait_for(process.pid)
        seconds = time.perf_counter() - start
        if usage.code:
            log.seek(0)
            last = log.read().decode(errors="replace")[-1500:]
            raise RuntimeError(f"{' '.join(command)} ended with {usage.code}: {last}")
    return Cost(seconds, usage.cpu, usage.peak_bytes)
