"""Check TensorRT engines on the GPU that they were built for, against their ONNX graph on the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gpu_checks.checks import Check, Found
from gpu_checks.room import Room, drawn_tokens
from gpu_checks.sides import SessionSide, Side, TorchSide
from gpu_checks.speed import STEPS, measure_steps
from gpu_checks.walk import compare, walk, walk_tokens
from llmc.artifact.manifest import Manifest
from llmc.backends import backend_of
from llmc.errors import ResourceError
from llmc.runtime.session import Session

_CONTEXT = 128
#: Logits by which engine and graph may differ, as in targets for CUDA: both round to half precision.
_BOUND = 0.5


def check_engine(room: Room, check: Check) -> Found:
    """Open the engine, hold every level against the graph on the CPU, and time its steps beside PyTorch.

    A session does not open unless the engine writes its cache in place. Prompts run in pieces of the engine's
    size, batches in its optimization profiles, and single steps as a CUDA graph where one is captured.
    The targets' own bounds are for the graph in float32, and do not apply.
    """
    artifact = room.artifact(check.subject)
    manifest = artifact.manifest
    backend = backend_of(manifest.target)
    session = backend.executable(artifact).open()
    graph = backend.open_graph(
        artifact.path, manifest.interface, manifest.target, threads=os.cpu_count(), slots=None
    )
    actual, expected = (_walk(each, manifest) for each in (session, graph))
    figures, beyond = compare(dict.fromkeys(actual, _BOUND), actual, expected)
    sides: dict[str, Side] = {"engine": SessionSide(session)}
    try:
        sides["torch_eager"] = TorchSide(room.original(check.subject), compiled=False)
    except ResourceError as error:
        figures["torch_eager_not_measured"] = error.fact
    context = min(_CONTEXT, (manifest.interface.max_length or _CONTEXT) - STEPS)
    for name, times in measure_steps(sides, drawn_tokens(manifest, 1, context)).items():
        figures[f"{name}_ms"] = float(np.median(times))
    more: dict[str, Any] = {"where": session.where, "notes": list(getattr(session, "notes", ()))}
    return Found({**figures, **more}, beyond)


def _walk(session: Session, manifest: Manifest) -> dict[str, np.ndarray]:
    """Run every level, and a prompt that is longer than the engine takes at once."""
    engine = manifest.target.engine
    most = 0 if engine is None else engine.prefill.most
    pieces = session.prefill(drawn_tokens(manifest, 1, most + most // 4 + 1), steps=0)[:, -1]
    return {**walk(session, walk_tokens(manifest)), "pieces": pieces}
