"""Build artifacts for the benchmarks, here or in a separate process, and open them in onnxruntime."""

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from llmc.artifact.store.folder import open_artifact
from llmc.pipeline import build
from llmc.pipeline.result import BuildResult
from llmc.plan import plan_build
from llmc.progress import TerminalProgress
from llmc.runtime.ort_model import OrtModel, shares_buffer


def show_progress() -> TerminalProgress:
    """Show progress on stderr, since stdout is for figures."""
    return TerminalProgress(Console(stderr=True))


def build_target(source: Path, target: str, cache: Path) -> BuildResult:
    """Build a checkpoint for this machine in a folder of `cache`, without verification."""
    output = cache / f"{source.name}-{target}"
    plan = plan_build(str(source), target=target, profile="local", output=output, verify=False)
    return build(plan, show_progress())


def build_apart(source: str, target: str, output: Path, path: Path | None = None) -> Path:
    """Build a checkpoint in a separate process: a process that has loaded torch is ten times as large.

    Args:
        source: The model argument of `llmc build`.
        path: A folder with the user's targets/.
    """
    command = [sys.executable, "-m", "llmc", "build", source, "--target", target, "--no-verify"]
    more = [] if path is None else ["--path", str(path)]
    subprocess.run([*command, *more, "-o", str(output)], check=True, stdout=sys.stderr)
    return output


def open_model(folder: Path, threads: int = 2) -> OrtModel:
    """Open an artifact in onnxruntime; past and present share the KV cache if possible."""
    interface = open_artifact(folder).manifest.interface
    return OrtModel(folder, interface, threads=threads, share_buffer=shares_buffer(folder))
