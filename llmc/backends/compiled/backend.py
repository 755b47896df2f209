"""Implement the backend of ONNX Runtime with operators compiled for the model and the profile's CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.backends.base import Stage
from llmc.backends.compiled.stage import LIBRARY, KernelStage, compile_again, require_kernels
from llmc.backends.onnxruntime.backend import OnnxRuntimeBackend
from llmc.config import BuildPlan, CacheType, Target

if TYPE_CHECKING:
    from llmc.artifact.manifest import Manifest
    from llmc.artifact.store.folder import Artifact
    from llmc.backends.compiled.lower import KernelSource
    from llmc.graph.model import Graph


class CompiledBackend(OnnxRuntimeBackend):
    """The backend with compiled kernels where possible, and ONNX Runtime's own for the rest."""

    rounds_attention = True
    compiles_dialect = True
    library = LIBRARY

    def prepare(self, plan: BuildPlan) -> Stage:
        """See `Backend`."""
        return KernelStage.prepare(plan.target, plan.profile)

    def lower(self, graph: Graph, target: Target) -> KernelSource:
        """See `Backend`; returns the program of the kernels without compiling it."""
        from llmc.backends.compiled.lower import lower_kernels
        from llmc.backends.onnxruntime.finish import finish_graph

        return finish_graph(graph, partial(lower_kernels, cache=target.kv_cache or CacheType.FLOAT32))

    def describe_lowered(self, lowered: Any) -> tuple[str, ...]:
        """See `Backend`."""
        by_reason: dict[str, list[str]] = {}
        for name, why, count in lowered.outside:
            by_reason.setdefault(why, []).append(f"{count} {name}")
        return tuple(f"not compiled, {why}: {', '.join(names)}" for why, names in by_reason.items())

    def require_host(self, artifact: Artifact) -> None:
        """See `Backend`."""
        require_kernels(artifact)

    def describe_unexecuted(self, manifest: Manifest) -> str:
        """See `Backend`."""
        if manifest.kernels is None:
            return super().describe_unexecuted(manifest)
        return f"llmc verify does that on a CPU with {manifest.kernels.isa}"

    def own_files(self, manifest: Manifest) -> set[str]:
        """See `Backend`."""
        return set() if manifest.kernels is None else {manifest.kernels.library}

    def differences(self, path: Path, manifest: Manifest, lowered: Any) -> Iterator[str]:
        """Compare the program of the kernels, and the library compiled from it."""
        record, source = manifest.kernels, lowered
        if record is None or source is None:
            return
        if record.source != source.digest:
            yield f"{record.library} is compiled from another program than a build generates"
            return
        library, file = compile_again(record, source), path / record.library
        if library is not None and (not file.is_file() or file.read_bytes() != library):
            yield f"{record.library} differs from the output of {record.compiler} for its program"
