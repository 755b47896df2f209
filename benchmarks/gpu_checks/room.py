"""Hold what checks share in their process: sessions of artifacts, and models of PyTorch of the same shape."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpu_checks.checks import Settings
from gpu_checks.subjects import Subject, config_of
from llmc.artifact.manifest import Manifest
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.config import Metric, Provider
from llmc.errors import ResourceError, UnsupportedError
from llmc.runtime.failures import is_out_of_memory
from llmc.runtime.ort_model import OrtModel, shares_buffer


class Room:
    """The sessions and models that one process has opened so far.

    Args:
        settings: The choices of the command line.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._held: dict[tuple[object, ...], Any] = {}

    def artifact(self, subject: Subject) -> Artifact:
        """Open an artifact's manifest."""
        return open_artifact(subject.folder(self.settings.artifacts))

    def on_cpu(self, subject: Subject) -> OrtModel:
        """Open the artifact's graph on the CPU, in the arithmetic in which it is served."""
        return self._ort(subject, Provider.CPU)

    def on_device(
        self, subject: Subject, *, graph: bool = False, chooses: bool = False, profile: Path | None = None
    ) -> OrtModel:
        """Open the artifact on the GPU; the session is kept for later checks unless it writes a profile.

        Args:
            graph: Whether steps of one token are launched as a CUDA graph.
            chooses: Whether the device chooses tokens, as a runtime does that serves.

        Raises:
            UnsupportedError: A step of this artifact cannot be a CUDA graph.
            ResourceError: A part is missing, or the provider did not load.
        """
        if profile is not None:
            return self._ort(subject, Provider.CUDA, profile=profile)
        if graph and (obstacle := graph_obstacle_of(self.artifact(subject))) is not None:
            raise UnsupportedError(obstacle)
        key = (subject, graph, chooses)
        if key not in self._held:
            self._held[key] = self._ort(subject, Provider.CUDA, cuda_graph=graph, chooses=chooses)
        return self._held[key]  # type: ignore[no-any-return]

    def _ort(self, subject: Subject, provider: Provider, **more: Any) -> OrtModel:
        artifact = self.artifact(subject)
        return OrtModel(
            artifact.path,
            artifact.manifest.interface,
            threads=os.cpu_count() if provider is Provider.CPU else None,
            share_buffer=shares_buffer(artifact.path),
            provider=provider,
            **more,
        )

    def original(self, subject: Subject) -> Any:
        """Return a model of PyTorch on the GPU of the artifact's shape and type, with random weights.

        Raises:
            ResourceError: This torch has no CUDA, or finds no GPU.
        """
        torch = require_torch_cuda()
        dtype = getattr(torch, self.artifact(subject).manifest.target.dtype.value)
        key = (subject.source, dtype)
        if key not in self._held:
            from transformers import AutoModelForCausalLM

            config = config_of(subject.source, self.settings.artifacts)
            with torch_memory(), torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self._held[key] = model.eval()
        return self._held[key]


@contextlib.contextmanager
def torch_memory() -> Iterator[None]:
    """Convert PyTorch's errors of a full GPU to one of a missing resource.

    Raises:
        ResourceError: The GPU has not enough memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"PyTorch has not enough memory: {str(error).splitlines()[0]}") from error


def require_torch_cuda() -> Any:
    """Return the module torch.

    Raises:
        ResourceError: It has no CUDA, or finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise ResourceError(f"torch {torch.__version__} has no CUDA, or finds no GPU")
    return torch


def graph_obstacle_of(artifact: Artifact) -> str | None:
    """Return why a decode step of an artifact cannot be one CUDA graph; None if it can."""
    import onnx_ir as ir

    from llmc.artifact.manifest import MODEL
    from llmc.backends.onnxruntime.cuda_graph import graph_obstacle

    return graph_obstacle(ir.load(artifact.path / MODEL), artifact.manifest.interface)


def vocabulary(manifest: Manifest) -> int:
    """Return the number of logits."""
    size = next(spec.shape[-1] for spec in manifest.interface.outputs if spec.name == "logits")
    if not isinstance(size, int):
        raise UnsupportedError(f"the interface states no number of logits but {size!r}")
    return size


def bound(manifest: Manifest, metric: Metric) -> float | None:
    """Return the artifact's own bound on a metric; None if it has none."""
    return next((gate.max for gate in manifest.target.gates if gate.metric is metric), None)


def drawn_tokens(manifest: Manifest, *shape: int, seed: int = 3) -> np.ndarray:
    """Draw tokens beside the first few, which are special in most vocabularies."""
    random = np.random.default_rng(seed)
    return random.integers(3, vocabulary(manifest), shape, dtype=np.int64)


def largest_context(manifest: Manifest, wanted: int, steps: int) -> int:
    """Return the wanted context, or the largest one that leaves room for `steps` tokens.

    Raises:
        UnsupportedError: The model ends at less than half of it.
    """
    limit = manifest.interface.max_length
    if limit is None or wanted + steps <= limit:
        return wanted
    if 2 * (limit - steps) < wanted:
        raise UnsupportedError(f"the model ends at {limit} positions")
    return limit - steps
