"""Implement `llmc build --resume`: build an artifact's pending engines on this machine."""

from __future__ import annotations

from pathlib import Path

from llmc.artifact.store.folder import open_artifact, update_manifest
from llmc.artifact.store.integrity import require_intact
from llmc.backends import backend_of
from llmc.pipeline.result import BuildResult, build_result
from llmc.progress import Progress


def resume(path: Path, progress: Progress) -> BuildResult:
    """Build the pending engines of an artifact that need the GPU of this machine.

    Args:
        path: An artifact in the state "engine pending".

    Raises:
        ConfigError: There is no artifact, it is damaged, or none of its engines is pending.
        ResourceError: This machine does not have the GPU or the library that a pending engine needs; the
            artifact is unchanged.
        UnsupportedError: TensorRT refuses the graph.
    """
    with progress.stage("artifact"):
        artifact = open_artifact(path)
        backend = backend_of(artifact.manifest.target)
        for name in backend.unfinished_files(artifact.manifest):
            (path / name).unlink(missing_ok=True)
        require_intact(artifact)
    manifest = backend.resume(artifact, progress)
    update_manifest(artifact, manifest)
    return build_result(path, manifest, None, progress)
