"""Build and open the artifacts of the benchmarks in this process."""

from pathlib import Path

from rich.console import Console

from llmc.artifact.store.folder import open_artifact
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import TerminalProgress
from llmc.runtime.ort_model import OrtModel, shares_buffer


def build_target(source: Path, target: str, cache: Path) -> Path:
    """Build the artifact of a checkpoint for this machine, below `cache`, without verification."""
    output = cache / f"{source.name}-{target}"
    plan = plan_build(str(source), target=target, profile="local", output=output, verify=False)
    build(plan, TerminalProgress(Console(stderr=True)))
    return output


def open_model(folder: Path, threads: int = 2) -> OrtModel:
    """Open an artifact in onnxruntime; past and present share its KV cache where possible."""
    interface = open_artifact(folder).manifest.interface
    return OrtModel(folder, interface, threads=threads, share_buffer=shares_buffer(folder))
