"""Implement the backends, a folder each, and select a target's backend.

A backend is an `llmc.backends.base.Backend`. To add one, write its folder and name its class here, twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.config import BackendName, Target

if TYPE_CHECKING:
    from llmc.backends.base import Backend


def backend_of(target: Target) -> Backend:
    """Return the backend of a target."""
    if target.backend is BackendName.TENSORRT:
        from llmc.backends.tensorrt.backend import TensorRtBackend

        return TensorRtBackend()
    if target.backend is BackendName.CHECKPOINT:
        from llmc.backends.checkpoint.backend import CheckpointBackend

        return CheckpointBackend()
    if target.kernels == "compiled":
        from llmc.backends.compiled.backend import CompiledBackend

        return CompiledBackend()
    from llmc.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend()


def backends() -> tuple[Backend, ...]:
    """All backends."""
    from llmc.backends.checkpoint.backend import CheckpointBackend
    from llmc.backends.compiled.backend import CompiledBackend
    from llmc.backends.onnxruntime.backend import OnnxRuntimeBackend
    from llmc.backends.tensorrt.backend import TensorRtBackend

    return (OnnxRuntimeBackend(), CompiledBackend(), TensorRtBackend(), CheckpointBackend())
